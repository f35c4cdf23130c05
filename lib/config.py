"""The one configuration object: frozen, static under jit, and derived from one dial."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from lib import runtime
from lib.files import UserError, choose, first_line, parse_json, read_text, write_atomic

MLPS = ("relu2", "gelu", "swiglu")
REMATS = ("none", "dots", "layer")
DTYPES = ("auto", "float32", "mixed", "bfloat16")
OPTIMIZER_NAMES = ("muon", "adamw")
ATTENTION_NAMES = ("einsum", "jax", "splash", "pallas")
MAX_LAYERS = 10_000  # beyond it the program alone would take longer to write than anyone waits
KERNEL_TILE = 128  # lanes of a TPU register: kernels work on whole tiles of the sequence
# sequence_len x head_dim up to which our kernel's accumulators fit on chip (compiled for v5e, v5p,
# v6e)
WHOLE_HEAD = 2**21
# leading channels of the residual stream that feed these gates
SMEAR_CHANNELS, VALUE_GATE_CHANNELS = 24, 12
# the fields that count something, of which there must be one at least
COUNTS = (
    "vocab_size",
    "sequence_len",
    "n_layer",
    "n_embd",
    "n_head",
    "n_kv_head",
    "head_dim",
    "mlp_dim",
    "loss_chunk",
    "microbatch",
    "total_batch_size",
    "num_steps",
)
# real numbers that make no sense below 0
NOT_NEGATIVE = (
    "softcap",
    "matrix_lr",
    "embedding_lr",
    "unembedding_lr",
    "scalar_lr",
    "adamw_lr",
    "weight_decay",
    "reference_tokens",
    "warmup_steps",
    "warmdown_ratio",
    "final_lr_frac",
)
REFERENCE_BATCH = 2**19  # tokens per step at which the base learning rates were tuned (depth 12)


def check_attention(
    name: str,
    *,
    sequence_len: int,
    head_dim: int,
    n_head: int,
    n_kv_head: int,
    window: int | None = None,
):
    """UserError when implementation `name` can't do these sizes, with the nearest that it can."""
    choose("attention", name, ATTENTION_NAMES)
    _check_groups(n_head, n_kv_head)
    if window is not None and window < 0:
        raise UserError(
            f"window={window} must be at least 0 (only itself), or None for all of the past"
        )
    # our kernel keeps whole heads on chip, padded to whole tiles
    padded_head = round_up(head_dim, KERNEL_TILE)
    longest = WHOLE_HEAD // padded_head // KERNEL_TILE * KERNEL_TILE
    if name in ("splash", "pallas") and sequence_len % KERNEL_TILE:
        good = nearest_multiple(sequence_len, KERNEL_TILE)
        if name == "pallas":
            good = min(good, longest)
        raise UserError(
            f"attention={name} needs sequence_len to be a multiple of {KERNEL_TILE}, "
            f"got {sequence_len}: use sequence_len={good}, or attention=einsum"
        )
    if name == "pallas" and sequence_len > longest:
        raise UserError(
            f"attention=pallas holds whole heads on chip, at most sequence_len={longest} at "
            f"head_dim={head_dim}, got {sequence_len}: use that, or attention=splash"
        )


def _check_groups(n_head: int, n_kv_head: int):
    """Each key/value head serves as many query heads as the others."""
    if n_head % n_kv_head:
        small = [k for k in range(1, math.isqrt(n_head) + 1) if n_head % k == 0]
        divisors = small + [n_head // k for k in small]
        good = max(k for k in divisors if k <= n_kv_head)
        raise UserError(
            f"n_kv_head={n_kv_head} does not divide n_head={n_head}: use n_kv_head={good}"
        )


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return -(-size // multiple) * multiple


def nearest_multiple(size: int, multiple: int) -> int:
    """The multiple nearest to `size`, at least one."""
    return max(1, round(size / multiple)) * multiple


def divisible_batch(config: "Config", ways: int, grow: bool = False) -> dict[str, int]:
    """The change of microbatch and batch with which rows can be split over `ways` devices.

    All conditions hold at once after it: the batch is whole microbatches, a microbatch whole rows
    for each device. grow: the microbatch is for one device, and made larger for more of them.
    Empty where nothing has to change.
    """
    rows = config.total_batch_size // config.sequence_len
    if grow:
        if rows % ways == 0:
            return {}
        row_unit = math.lcm(config.microbatch, ways)
        unit = row_unit * config.sequence_len
        return {"total_batch_size": nearest_multiple(config.total_batch_size, unit)}

    if config.microbatch % ways == 0:
        return {}
    if rows % ways == 0:
        # the batch may stay: a microbatch that divides it, near the one that was asked for
        possible = [m for m in range(ways, rows + 1, ways) if rows % m == 0]
        return {"microbatch": min(possible, key=lambda m: abs(m - config.microbatch))}
    microbatch = round_up(config.microbatch, ways)
    unit = microbatch * config.sequence_len
    total = nearest_multiple(config.total_batch_size, unit)
    return {"microbatch": microbatch, "total_batch_size": total}


def _has_bfloat16() -> bool:
    """Whether the default device has bfloat16: TPUs, and GPUs from Ampere on."""
    backend = jax.default_backend()
    if backend in ("cpu", "tpu"):
        return backend == "tpu"
    # NVIDIA's number; AMD's names (gfx942) are of cards that have it
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return not re.match(r"[0-7]\.", capability)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Config:
    """Everything that shapes the model and its training. Changing a field recompiles; nothing else
    does.

    Sizes are counts, `*_lr` are base rates before width and batch scaling, batch and horizon are in
    tokens. Every bad combination raises UserError here, before anything is compiled.
    """

    # shape
    vocab_size: int = 32768
    sequence_len: int = 2048
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 6
    n_kv_head: int = 6
    head_dim: int = 128
    mlp: str = "relu2"  # relu2 | gelu | swiglu
    mlp_dim: int = 3072
    # tiled over layers: S sees about a quarter of the sequence, L all; the last layer is L
    window_pattern: str = "SSSL"
    # parts
    rope_base: float = 100_000.0
    qk_norm: bool = True  # RMSNorm on queries and keys after rotation
    qk_scale: float = 1.2  # on both, sharpening attention; 1.0 for none
    softcap: float = 15.0  # logits become softcap * tanh(logits / softcap); 0 for none
    resid_scales: bool = True  # learned per-layer scale of the residual stream
    x0_scales: bool = True  # learned per-layer re-injection of the embedding
    value_embeds: bool = True  # gated token embeddings added to the values of every other layer
    smear: bool = True  # gated mixing of the previous token's embedding
    backout: bool = True  # subtract a share of the middle layer's output before the head
    tied_head: bool = False
    # other people's models (lib.interop) have no norm on token embeddings, and a larger eps
    embed_norm: bool = True
    norm_eps: float = 2.0**-23  # added to the mean square in every norm: float32's machine epsilon
    # computation
    # a key of lib.model.attention.ATTENTION, or auto: splash on TPU, jax on GPU, einsum on CPU
    attention: str = "auto"
    # queries and keys per block of splash and pallas, at most; 0: their own default
    attention_block: int = 0
    # auto: float32 on CPU, bfloat16 elsewhere; masters are always float32. mixed: float32, but
    # what large products multiply is bfloat16; auto trains so on CPUs that have such products
    compute_dtype: str = "auto"
    # what backward recomputes: none | dots (cheap work and one projection per layer) | layer (all
    # of it)
    remat: str = "none"
    loss_chunk: int = 2048  # tokens whose logits exist at one time
    # tokens with a target come first, and chunks without any get no logits; set on a CPU
    skip_ignored: bool = False
    # one compiled body per group of equal layers; False unrolls: slower to compile
    scan_layers: bool = True
    # rows per forward pass, of all devices together; gradients accumulate to total_batch_size
    microbatch: int = 4
    # training
    optimizer: str = "muon"
    total_batch_size: int = REFERENCE_BATCH  # tokens per optimizer step
    num_steps: int = 2520
    # planned horizon: training tokens per parameter of the blocks and the head
    tokens_per_param: float = 12.0
    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    adamw_lr: float = 0.001  # the matrices' rate when optimizer is adamw
    weight_decay: float = 0.28
    # horizon of the depth-12 model that weight decay is scaled against; 0 for no scaling
    reference_tokens: float = 0.0
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05
    seed: int = 42

    def __post_init__(self):
        _check_types(self)
        _check_choices(self)
        _check_counts(self)
        _check_ranges(self)
        _check_heads(self)
        _check_windows(self)
        _check_gates(self)
        _check_batch(self)
        _check_kernels(self)

    # ---- derived ---------------------------------------------------------------------------------

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding tables: vocab_size rounded up to a multiple of 64; logits are
        cropped back.
        """
        return -(-self.vocab_size // 64) * 64

    @property
    def windows(self) -> tuple[int, ...]:
        """Per layer, how many keys before itself a query sees; a long layer's is sequence_len."""
        short = -(-self.sequence_len // 4 // 128) * 128
        pattern = self.window_pattern.upper()
        kinds = [pattern[i % len(pattern)] for i in range(self.n_layer - 1)] + ["L"]
        return tuple(self.sequence_len if k == "L" else short for k in kinds)

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The layers whose values get token embeddings: every other one, the last included."""
        if not self.value_embeds:
            return ()
        return tuple(range((self.n_layer - 1) % 2, self.n_layer, 2))

    @property
    def batch_lr_scale(self) -> float:
        """Square-root learning-rate scaling with the batch, 1 at REFERENCE_BATCH."""
        return math.sqrt(self.total_batch_size / REFERENCE_BATCH)

    @property
    def scaling_params(self) -> int:
        """Parameters of the block matrices and the head: what the horizon is measured in."""
        attention = 2 * self.n_embd * (self.n_head + self.n_kv_head) * self.head_dim
        mlp = (3 if self.mlp == "swiglu" else 2) * self.n_embd * self.mlp_dim
        gates = len(self.value_layers) * VALUE_GATE_CHANNELS * self.n_kv_head
        return self.n_layer * (attention + mlp) + gates + self.n_embd * self.padded_vocab

    @property
    def flops_per_token(self) -> int:
        """Training FLOPs per token: 6 per multiplying parameter plus 12 N H min(window, T) of
        attention per layer.

        The convention of PaLM's appendix B with windows: scores within the window counted whole,
        causality not deducted.
        """
        scores = sum(
            12 * self.n_head * self.head_dim * min(w, self.sequence_len) for w in self.windows
        )
        return 6 * (self.scaling_params + SMEAR_CHANNELS * self.smear) + scores

    @property
    def target_tokens(self) -> int:
        """Training tokens that tokens_per_param asks for."""
        return int(self.tokens_per_param * self.scaling_params)

    @property
    def scaled_weight_decay(self) -> float:
        """Matrix weight decay for this batch and horizon: 0.28 sqrt(B/2^19) D_ref/D with the
        default base.
        """
        scale = self.reference_tokens / self.target_tokens if self.reference_tokens else 1.0
        return self.weight_decay * self.batch_lr_scale * scale

    @property
    def dtype(self):
        """The dtype that activations are computed in."""
        if self.compute_dtype == "mixed":
            return jax.numpy.dtype("float32")
        if self.compute_dtype != "auto":
            return jax.numpy.dtype(self.compute_dtype)
        return jax.numpy.dtype("bfloat16" if _has_bfloat16() else "float32")

    @property
    def operand_dtype(self):
        """The dtype of what the large products over whole rows multiply; decoding's are `dtype`."""
        return jax.numpy.dtype("bfloat16") if self.compute_dtype == "mixed" else self.dtype

    @property
    def attention_name(self) -> str:
        """The key of ATTENTION in use, with auto decided by the default backend.

        On a TPU whose libtpu does not compile Pallas kernels (tried once a process), auto is
        einsum: of the two without kernels the one that holds less and takes less time (LOG.md).
        """
        if self.attention != "auto":
            return self.attention
        backend = jax.default_backend()
        if backend == "tpu":
            return "einsum" if runtime.kernel_fault() else "splash"
        return "einsum" if backend == "cpu" else "jax"

    @property
    def accumulate(self) -> int:
        """Microbatches per optimizer step."""
        return self.total_batch_size // (self.microbatch * self.sequence_len)

    # ---- one dial --------------------------------------------------------------------------------

    @classmethod
    def from_depth(
        cls, depth: int, *, aspect_ratio: int = 64, target_flops: float = 0.0, **overrides
    ) -> "Config":
        """All sizes, horizon, batch and decay from the number of layers; anything can be overridden
        by name.

        Width is depth * aspect_ratio rounded up to whole heads. Horizon D = tokens_per_param *
        (block matrices + head), or as many steps as `target_flops` buys. Batch = 2^round(log2(2^19
        (D / D_12)^0.383)), D_12 being the same rule at depth 12 (the reference's scaling rules;
        checked against its numbers at depths 4 to 26).
        """
        if depth < 1:
            raise UserError(f"depth must be at least 1, got {depth}")
        _check_given(overrides)
        # one row a step, so that nothing but the shape can be wrong yet
        shape = _shape(depth, aspect_ratio, **_known(overrides))
        one_row: dict[str, Any] = dict(
            total_batch_size=shape["sequence_len"], microbatch=1, num_steps=1
        )
        probe = cls(**shape | one_row)
        # the rules are anchored at depth 12, with everything but its sizes as asked
        others = {name: value for name, value in overrides.items() if name not in _SIZES}
        at_12 = cls(**_shape(12, aspect_ratio, **others) | one_row)

        config: dict[str, Any] = dict(shape, reference_tokens=float(at_12.target_tokens))
        if "total_batch_size" not in overrides:
            growth = probe.target_tokens / at_12.target_tokens
            batch = 2 ** round(math.log2(REFERENCE_BATCH * growth**0.383))
            unit = probe.sequence_len * overrides.get("microbatch", 1)
            config["total_batch_size"] = nearest_multiple(batch, unit) if batch % unit else batch
        if "microbatch" not in overrides:
            rows = config["total_batch_size"] // probe.sequence_len
            possible = [m for m in range(1, min(rows, cls.microbatch) + 1) if rows % m == 0]
            config["microbatch"] = max(possible, default=1)
        if "num_steps" not in overrides:
            per_step = config["total_batch_size"]
            if target_flops:
                steps = round(target_flops / (probe.flops_per_token * per_step))
            else:
                steps = probe.target_tokens // per_step
            config["num_steps"] = max(1, steps)
        return cls(**config)

    @classmethod
    def from_heads(cls, n_head: int, *, aspect_ratio: int = 64, **overrides) -> "Config":
        """The same dial from the other side: n_embd = n_head * head_dim, depth = n_embd /
        aspect_ratio.
        """
        if n_head < 1:
            raise UserError(f"n_head must be at least 1, got {n_head}")
        width = n_head * overrides.get("head_dim", cls.head_dim)
        depth = max(1, round(width / aspect_ratio))
        return cls.from_depth(
            depth, aspect_ratio=aspect_ratio, **dict(n_embd=width, n_head=n_head) | overrides
        )

    @classmethod
    def preset(cls, name: str, **overrides) -> "Config":
        """A named starting point from PRESETS, with overrides by field name."""
        return cls.from_depth(**dict(choose("preset", name, PRESETS)) | overrides)

    # ---- files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict) -> "Config":
        return cls(**_known(d))

    def replace(self, **changes) -> "Config":
        return dataclasses.replace(self, **_known(changes))

    def save(self, path):
        """Write as JSON, or as YAML when the name ends in .yaml or .yml."""
        if str(path).endswith((".yaml", ".yml")):
            import yaml

            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        else:
            text = json.dumps(self.to_dict(), indent=1) + "\n"
        write_atomic(path, text)

    @classmethod
    def load(cls, path) -> "Config":
        """Read what `save` wrote."""
        if not Path(path).exists():
            raise UserError(f"no config at {path}: give the path of a config.json or config.yaml")
        text = read_text(path)
        if not str(path).endswith((".yaml", ".yml")):
            return cls.from_dict(parse_json(text, path, cure="write one with Config.save"))

        import yaml

        try:
            return cls.from_dict(yaml.safe_load(text))
        except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as e:
            raise _not_a_config(path, e) from None


def _not_a_config(path, error) -> UserError:
    return UserError(
        f"{path} is not a rawchat config ({first_line(error)}): write one with Config.save"
    )


# ---- checks: each says what is wrong in one sentence, with the nearest value that is right -------


def _check_types(config: Config):
    """Values have their field's type; a whole number does for a real one."""
    for f in dataclasses.fields(config):
        kind: Any = f.type
        value = getattr(config, f.name)
        is_bool = isinstance(value, bool)
        if kind is float and isinstance(value, int) and not is_bool:
            object.__setattr__(config, f.name, float(value))
        elif not isinstance(value, kind) or (kind is int and is_bool):
            raise UserError(f"config field {f.name} must be {kind.__name__}, got {value!r}")
        elif kind is float and not math.isfinite(value):
            raise UserError(f"config field {f.name} must be a finite number, got {value}")


def _check_choices(config: Config):
    choose("mlp", config.mlp, MLPS)
    choose("remat", config.remat, REMATS)
    choose("compute_dtype", config.compute_dtype, DTYPES)
    choose("optimizer", config.optimizer, OPTIMIZER_NAMES)


def _check_counts(config: Config):
    for name in COUNTS:
        _check_count(name, getattr(config, name))
    if config.n_layer > MAX_LAYERS:
        raise UserError(f"n_layer={config.n_layer} is more than {MAX_LAYERS}: use fewer layers")


def _check_count(name: str, count: int):
    if count < 1:
        raise UserError(f"config field {name} must be at least 1, got {count}")


def _check_ranges(config: Config):
    if config.norm_eps <= 0:
        raise UserError(f"norm_eps={config.norm_eps} must be above 0: use 1e-6 or 1e-5")
    for name in ("rope_base", "qk_scale", "tokens_per_param"):
        _check_above_0(name, getattr(config, name))
    for name in NOT_NEGATIVE:
        value = getattr(config, name)
        if value < 0:
            raise UserError(f"config field {name} must be 0 or more, got {value}")


def _check_above_0(name: str, value: float):
    if value <= 0:
        raise UserError(f"config field {name} must be above 0, got {value}")


def _check_given(overrides: dict):
    """UserError for what the scaling rules would divide by, before they do."""
    for name, value in overrides.items():
        if name in COUNTS and isinstance(value, int):
            _check_count(name, value)
        if name == "tokens_per_param" and isinstance(value, int | float):
            _check_above_0(name, value)


def _check_heads(config: Config):
    _check_groups(config.n_head, config.n_kv_head)
    if config.head_dim % 2:
        raise UserError(
            f"head_dim={config.head_dim} must be even for rotary embeddings: "
            f"use {config.head_dim + 1}"
        )


def _check_windows(config: Config):
    pattern = config.window_pattern
    if not pattern or set(pattern.upper()) - set("SL"):
        raise UserError(
            f"window_pattern={pattern!r} must be letters S (short) and L (long), like SSSL"
        )


def _check_gates(config: Config):
    least = max(SMEAR_CHANNELS * config.smear, VALUE_GATE_CHANNELS * config.value_embeds)
    if config.n_embd < least:
        raise UserError(
            f"n_embd={config.n_embd} is below the {least} channels that the gates read: raise it, "
            "or set smear=false and value_embeds=false"
        )


def _check_batch(config: Config):
    unit = config.microbatch * config.sequence_len
    if config.total_batch_size % unit:
        near = nearest_multiple(config.total_batch_size, unit)
        raise UserError(
            f"total_batch_size={config.total_batch_size} tokens is not a multiple of microbatch x "
            f"sequence_len = {unit}: use total_batch_size={near}"
        )


def _check_kernels(config: Config):
    block = config.attention_block
    if block % KERNEL_TILE or block < 0:
        raise UserError(
            f"attention_block={block} must be a multiple of {KERNEL_TILE}, or 0 for the kernel's "
            "own choice: use 512 or 1024"
        )
    if config.attention != "auto":
        check_attention(
            config.attention,
            sequence_len=config.sequence_len,
            head_dim=config.head_dim,
            n_head=config.n_head,
            n_kv_head=config.n_kv_head,
        )


# ---- fields --------------------------------------------------------------------------------------

_SIZES = {
    "n_layer",
    "n_embd",
    "n_head",
    "n_kv_head",
    "mlp_dim",
    "total_batch_size",
    "microbatch",
    "num_steps",
}


def _known(d: dict) -> dict:
    names = [f.name for f in dataclasses.fields(Config)]
    for name in d:
        choose("config field", name, names)
    return d


def _shape(depth: int, aspect_ratio: int, **overrides) -> dict[str, Any]:
    """Field values for a depth: width in whole heads, as many kv heads as heads, mlp four times as
    wide.
    """
    head_dim = overrides.get("head_dim", Config.head_dim)
    n_embd = overrides.get("n_embd", -(-depth * aspect_ratio // head_dim) * head_dim)
    n_head = overrides.get("n_head", max(1, n_embd // head_dim))
    # SwiGLU has three matrices: two thirds of the hidden width keeps the parameter count (Shazeer
    # 2020)
    mlp_dim = -(-n_embd * 8 // 3 // 128) * 128 if overrides.get("mlp") == "swiglu" else 4 * n_embd
    derived = dict(
        n_layer=depth,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_head,
        mlp_dim=mlp_dim,
        sequence_len=Config.sequence_len,
    )
    return derived | overrides


_PLAIN = dict(
    window_pattern="L",
    qk_norm=False,
    qk_scale=1.0,
    softcap=0.0,
    resid_scales=False,
    x0_scales=False,
    value_embeds=False,
    smear=False,
    backout=False,
    optimizer="adamw",
)
PRESETS = {
    # two laptop cores, minutes: narrow, short context, small vocabulary; rates for a run a hundred
    # times shorter than usual
    "cpu_demo": dict(
        depth=4,
        vocab_size=4096,
        sequence_len=256,
        n_embd=128,
        n_head=2,
        n_kv_head=2,
        head_dim=64,
        total_batch_size=4096,
        microbatch=16,
        num_steps=800,
        scan_layers=False,
        loss_chunk=1024,
        matrix_lr=0.2,
        embedding_lr=3.0,
        unembedding_lr=0.08,
        warmup_steps=20,
    ),
    # a first hour on the chips that free accounts are lent, on simple English (TinyStories)
    "colab_free_v5e": dict(
        depth=8,
        vocab_size=8192,
        sequence_len=1024,
        head_dim=128,
        n_kv_head=2,
        total_batch_size=2**17,
        microbatch=32,
        num_steps=3600,
    ),
    # a T4 has no bfloat16, and in float32 a fortieth of a v5e's speed
    "colab_free_t4": dict(
        depth=6,
        vocab_size=8192,
        sequence_len=512,
        total_batch_size=2**16,
        microbatch=32,
        num_steps=1200,
    ),
    # one v5e chip, 16 GB: MXU 128 x 128
    "colab_v5e": dict(depth=12, head_dim=128, n_kv_head=2, value_embeds=False, microbatch=4),
    # one v6e chip, 32 GB: MXU 256 x 256 wants head width 256; few KV heads, small microbatches
    # one chunk of logits a microbatch: on v6e that saves more traffic than it costs memory (LOG.md)
    "colab_v6e": dict(
        depth=16, head_dim=256, n_kv_head=2, value_embeds=False, microbatch=4, loss_chunk=8192
    ),
    "gpu": dict(depth=12, microbatch=8, remat="dots"),
    # what nanochat's parts are measured against: the plain recipes of GPT-2 and of Llama, in this
    # house's frame
    "gpt2_like": dict(depth=12, mlp="gelu", tied_head=True, **_PLAIN),
    "llama_like": dict(depth=12, mlp="swiglu", n_kv_head=2, **_PLAIN),
    "nanochat_d12": dict(depth=12),
    # on a v6e a fifth of a step less than scanned layers and smaller chunks, for 1.7 times as long
    # to compile (LOG.md)
    "nanochat_d20": dict(depth=20, remat="dots", scan_layers=False, loss_chunk=8192),
    "nanochat_d24": dict(depth=24, remat="dots", scan_layers=False, loss_chunk=4096),
}
