"""Accelerators by the names that people rent them under: what a chip can do, which topology a name
means, what an hour costs.
"""

import math
import re
from typing import NamedTuple

from lib.files import UserError, choose


class Chip(NamedTuple):
    """Published figures of one chip: dense FLOP/s in `dtype`, memory bytes/s, memory bytes, rows
    that its matrix unit multiplies at once (1: narrow ones cost nothing extra), bytes/s that it can
    send to its neighbours; what libtpu lets a program use; and how many of it make what is sold as
    one chip.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    matrix_unit: int = 1
    network: float = 0.0
    usable: float = 0.0
    devices: int = 1
    # what `auto` computes in there
    dtype: str = "bfloat16"

    @property
    def is_tpu(self) -> bool:
        return self.name.startswith("TPU")


# TPUs: https://cloud.google.com/tpu/docs/v6e, /v5e, /v5p, /v4 and /tpu7x; network is a half of the
# bidirectional bandwidth there, usable what libtpu's compiler says when it is asked for too much
V6E = Chip("TPU v6e", 918e12, 1600e9, 32e9, 256, 400e9, 31.24 * 2**30)
V5E = Chip("TPU v5e", 197e12, 819e9, 16e9, 128, 200e9, 15.75 * 2**30)
V5P = Chip("TPU v5p", 459e12, 2765e9, 95e9, 128, 600e9, 95.73 * 2**30)
V4 = Chip("TPU v4", 275e12, 1228e9, 32e9, 128, 300e9, 30.75 * 2**30)
# A chip of TPU7x is two devices to jax (libtpu 0.0.52 shows eight for 2x2x1). This is one of them:
# half of 2307 TFLOP/s, 7380 GB/s, 192 GiB and 1200 GB/s.
V7X = Chip("TPU7x", 1153.5e12, 3690e9, 96 * 2**30, 256, 300e9, 94.74 * 2**30, 2)

# GPUs: NVIDIA's data sheets, without sparsity (which doubles the printed figures); network is one
# direction of NVLink, or of PCIe where there is none
H200 = Chip("H200", 989e12, 4800e9, 141e9, 1, 450e9)  # h200-datasheet
H100 = Chip("H100 SXM", 989e12, 3350e9, 80e9, 1, 450e9)  # h100-datasheet
H100_PCIE = Chip("H100 PCIe", 756e12, 2000e9, 80e9, 1, 64e9)  # h100-datasheet; PCIe gen 5
# dgx-b200-datasheet, an eighth of it: 72 PFLOP/s of sparse FP8, 64 TB/s, 1440 GB, 14.4 TB/s
B200 = Chip("B200", 2250e12, 8000e9, 180e9, 1, 900e9)
A100 = Chip("A100", 312e12, 2000e9, 80e9, 1, 300e9)  # a100-80gb-datasheet, SXM
A100_40 = Chip("A100 40GB", 312e12, 1555e9, 40e9, 1, 300e9)  # a100-datasheet, SXM
L4 = Chip("L4", 121e12, 300e9, 24e9, 1, 32e9)  # l4-datasheet: 242 sparse; PCIe gen 4
# Colab's and Google's G4: rtx-pro-6000-blackwell-server-edition; PCIe gen 5. No sheet prints its
# dense bfloat16: 4 PFLOP/s of sparse FP4, rounded, over eight would be 500.
RTX_PRO_6000 = Chip("RTX PRO 6000", 480e12, 1597e9, 96e9, 1, 64e9)
# t4-datasheet: it has no bfloat16, and its 65 TFLOP/s of float16 are of no use here; PCIe gen 3
T4 = Chip("T4", 8.1e12, 320e9, 16e9, 1, 16e9, dtype="float32")

CHIPS = {  # by a part of jax's device_kind, the first that matches
    "v6 lite": V6E,
    "v6e": V6E,
    "v5 lite": V5E,
    "v5e": V5E,
    "v5": V5P,
    "v4": V4,
    "TPU7x": V7X,
    "B200": B200,
    "H200": H200,
    "H100 PCIe": H100_PCIE,
    "H100": H100,
    "A100-SXM4-40GB": A100_40,
    "A100-PCIE-40GB": A100_40,
    "A100": A100,
    "RTX PRO 6000": RTX_PRO_6000,
    "L4": L4,
    "T4": T4,
}


def chip(device_kind: str) -> Chip | None:
    """The CHIPS entry for jax's `device_kind`, None for a CPU or a chip not in the table."""
    for part, known in CHIPS.items():
        # an L40 is no L4
        if re.search(rf"{part}(?!\d)", device_kind):
            return known
    return None


# ---- slices: what is rented ----------------------------------------------------------------------

# The number in a name counts chips for v5e and v6e, but TensorCores for v4, v5p and TPU7x, whose
# chips have two each: a v5p-8 is four chips, and jax shows four devices, for the two cores of a
# chip work as one ("megacore"). Those of a TPU7x do not: a tpu7x-8 is eight devices.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}
SLICES = {
    "v6e": (V6E, FLAT),
    "v5e": (V5E, FLAT),
    "v5p": (V5P, CUBE),
    "v4": (V4, CUBE),
    "tpu7x": (V7X, CUBE),
}

# GPUs that share one machine
NODES = (1, 2, 4, 8)
GPUS = {
    "b200": B200,
    "h200": H200,
    "h100": H100,
    "h100-pcie": H100_PCIE,
    "a100": A100,
    "a100-40gb": A100_40,
    "rtx-pro-6000": RTX_PRO_6000,
    "l4": L4,
    "t4": T4,
}


class Slice(NamedTuple):
    """What a name like v6e-8 stands for: libtpu's topology (a GPU's name) and its chips (jax
    devices).
    """

    name: str
    chip: Chip
    topology: str
    chips: int


def tpu_slice(name: str) -> Slice:
    """The Slice of a name like v6e-1 or v5p-8, or of a topology like v6e:2x4.

    UserError lists the names.
    """
    if match := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name):
        generation, _ = choose("TPU generation", match[1], SLICES)
        return Slice(name, generation, name, _devices(generation, match[2]))
    version, _, count = name.partition("-")
    if version not in SLICES or not count.isdigit() or int(count) not in SLICES[version][1]:
        raise UserError(
            f"unknown chip {name!r}: choose one of {_tpu_names()} "
            "(v4, v5p and tpu7x count cores, two a chip), or a topology like v6e:2x4"
        )
    generation, sizes = SLICES[version]
    shape = sizes[int(count)]
    return Slice(name, generation, f"{version}:{shape}", _devices(generation, shape))


def _devices(generation: Chip, shape: str) -> int:
    """How many devices jax sees in a shape of chips."""
    return math.prod(map(int, shape.split("x"))) * generation.devices


def _tpu_names() -> str:
    names = [f"{version}-{{{','.join(map(str, sizes))}}}" for version, (_, sizes) in SLICES.items()]
    return "; ".join(names)


def rented(name: str) -> Slice:
    """The Slice of what can be rented: a `tpu_slice`, or GPUs of one machine like h100-8.

    UserError lists the names.
    """
    kind, _, count = name.rpartition("-")
    if kind in GPUS and count.isdigit() and int(count) in NODES:
        return Slice(name, GPUS[kind], kind, int(count))
    if name.partition("-")[0].partition(":")[0] in SLICES:
        return tpu_slice(name)
    gpus = ", ".join(f"{gpu}-N" for gpu in GPUS)
    raise UserError(
        f"unknown chip {name!r}: choose one of {_tpu_names()}; or GPUs of one machine, {gpus} "
        f"with N of {', '.join(map(str, NODES))}"
    )


# ---- money: EDIT THIS TABLE. Prices move; those of others are wrong the day after ----------------

PRICES_DATE = "2026-11"  # when the table was last touched; nothing here was read from a bill
PRICES_SOURCE = (
    "https://cloud.google.com/tpu/pricing (US regions), https://colab.research.google.com/signup"
)
# Spot is what us-central1 asked in SkyPilot's catalogue of Google's price list (v8, commit
# 006059e), which has the same on-demand prices. It moves and differs by region: the dearest in the
# US were 1.35 (v6e), 0.60 (v5e) and 1.68 (v5p).
PRICES = {  # dollars per chip and hour; None: not known to us, ask the source
    "TPU v6e": {"on-demand": 2.70, "flex-start": 1.35, "spot": 0.54},
    "TPU v5e": {"on-demand": 1.20, "flex-start": None, "spot": 0.24},
    "TPU v5p": {"on-demand": 4.20, "flex-start": None, "spot": 0.84},
    "TPU v4": {"on-demand": 3.22, "flex-start": None, "spot": None},
    # an eighth of Lambda's machine of eight, in SkyPilot's catalogue of its list (v8, commit
    # 0f40703); of one GPU alone they asked 6.99 and 4.29, and 3.29 for the PCIe card
    "B200": {"on-demand": 6.69, "flex-start": None, "spot": None},
    "H100 SXM": {"on-demand": 3.99, "flex-start": None, "spot": None},
    "H100 PCIe": {"on-demand": 3.29, "flex-start": None, "spot": None},
    "A100": {"on-demand": 2.79, "flex-start": None, "spot": None},
    # g4-standard-48 in us-central1, as dstack listed it (dstackai/dstack pull request 3213)
    "RTX PRO 6000": {"on-demand": 4.50, "flex-start": None, "spot": None},
}
COLAB_UNIT = 9.99 / 100  # dollars per compute unit
# Units per hour. Colab publishes none, its Resources panel shows them, and they move: a T4 was 1.84
# in April 2024 (mccormickml.com, where an A100 was 11.77), and about 1.07 on 2026-09-27 (measured
# in a public repository, which has none for A100, v5e and v6e). None: not known.
COLAB_UNITS = {"TPU v6e": None, "TPU v5e": None, "H100 SXM": None, "A100": None, "T4": 1.07}


def price_per_hour(name: str, how: str = "on-demand", units: float | None = None) -> float | None:
    """Dollars per hour of one chip called `name` in PRICES; how: a key of its entry, or "colab",
    with `units` an hour if given. None: not known.
    """
    if how == "colab":
        units = units or COLAB_UNITS.get(name)
        return units * COLAB_UNIT if units else None
    return choose("way to pay", how, PRICES[name] | {"colab": None}) if name in PRICES else None
