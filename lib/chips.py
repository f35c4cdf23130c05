"""Accelerators by the names that people rent them under: what a chip can do, which topology a name
means, what an hour costs.
"""

import math
import re
from typing import NamedTuple

from lib.files import UserError, choose


class Chip(NamedTuple):
    """Published figures of one chip: dense bfloat16 FLOP/s (T4: float16), memory bytes/s, memory
    bytes, rows that its matrix unit multiplies at once (1: narrow ones cost nothing extra), bytes/s
    that it can send to its neighbours; and what libtpu lets a program use.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    matrix_unit: int = 1
    network: float = 0.0
    usable: float = 0.0


V6E = Chip("TPU v6e", 918e12, 1600e9, 32e9, 256, 400e9, 31.24 * 2**30)
V5E = Chip("TPU v5e", 197e12, 819e9, 16e9, 128, 200e9, 15.75 * 2**30)
V5P = Chip("TPU v5p", 459e12, 2765e9, 95e9, 128, 600e9, 95.73 * 2**30)
V4 = Chip("TPU v4", 275e12, 1228e9, 32e9, 128, 300e9, 30.75 * 2**30)
CHIPS = {  # by a part of jax's device_kind, the first that matches
    "v6 lite": V6E,
    "v6e": V6E,
    "v5 lite": V5E,
    "v5e": V5E,
    "v5": V5P,
    "v4": V4,
    "H200": Chip("H200", 989e12, 4800e9, 141e9, 1, 450e9),
    "H100": Chip("H100 SXM", 989e12, 3350e9, 80e9, 1, 450e9),
    "A100": Chip("A100", 312e12, 2000e9, 80e9, 1, 300e9),
    "T4": Chip("T4", 65e12, 320e9, 16e9),
}


def chip(device_kind: str) -> Chip | None:
    """The CHIPS entry for jax's `device_kind`, None for a CPU or a chip not in the table."""
    return next((c for part, c in CHIPS.items() if part in device_kind), None)


# ---- slices: what is rented ----------------------------------------------------------------------

# The number in a name counts chips for v5e and v6e, but TensorCores for v4 and v5p, whose chips
# have two each: a v5p-8 is four chips, and jax shows four devices, for the two cores of a chip work
# as one ("megacore").
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBE = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}
SLICES = {"v6e": (V6E, FLAT), "v5e": (V5E, FLAT), "v5p": (V5P, CUBE), "v4": (V4, CUBE)}


class Slice(NamedTuple):
    """What a name like v6e-8 stands for: libtpu's topology and its chips (jax devices)."""

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
        return Slice(name, generation, name, math.prod(map(int, match[2].split("x"))))
    version, _, count = name.partition("-")
    if version not in SLICES or not count.isdigit() or int(count) not in SLICES[version][1]:
        names = "; ".join(
            f"{v}-{{{','.join(map(str, sizes))}}}" for v, (_, sizes) in SLICES.items()
        )
        raise UserError(
            f"unknown chip {name!r}: choose one of {names} "
            "(v4 and v5p count cores, two a chip), or a topology like v6e:2x4"
        )
    generation, sizes = SLICES[version]
    shape = sizes[int(count)]
    return Slice(name, generation, f"{version}:{shape}", math.prod(map(int, shape.split("x"))))


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
