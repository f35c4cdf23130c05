"""Causal attention as TPU kernels: jax's splash, and our own flash attention in Pallas.

Both are opaque to the partitioner: over several devices, call them in `jax.shard_map` with
`check_vma=False`.

The one hidden state of lib.model is here: within `compiled_kernels()` kernels are traced for a real
TPU although the default backend is a CPU. Everything that traces a model reads it (`forward`,
`loss_fn`), and only a compilation for a device that isn't there sets it.

Pallas is imported where a kernel is made: most programs make none, and it is a tenth of what they
take to start.
"""

import contextlib
import functools
import math
from contextvars import ContextVar
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lib.config import KERNEL_TILE
from lib.files import UserError

# checkpoint_name of what backward needs beside q, k, v: o and its log-sum-exp
RESIDUAL_NAME = "attention_residuals"
# a score that can't be seen: finite, so that a block without a visible key gives no inf - inf
MASKED = -1e30
# what our backward kernel may use of a core's on-chip memory: 128 MiB on v5e and v6e
VMEM_BYTES = 64 * 2**20
# default positions per block of the kernels; splash: fastest on v6e
BLOCKS = {"splash": 1024, "pallas": 512}

_interpret: ContextVar[bool | None] = ContextVar("interpret", default=None)


@contextlib.contextmanager
def compiled_kernels():
    """Within it, kernels are traced for a real TPU although the default backend is a CPU (see the
    top of the file).
    """
    token = _interpret.set(False)
    try:
        yield
    finally:
        _interpret.reset(token)


def _use_interpreter(interpret: bool | None) -> bool:
    """Whether kernels are emulated: as asked, else as `compiled_kernels` says, else on a CPU."""
    if interpret is None:
        interpret = _interpret.get()
    if interpret is not None:
        return interpret
    backend = jax.default_backend()
    if backend not in ("cpu", "tpu"):
        raise UserError(
            f"attention=splash and attention=pallas are TPU kernels, and this is a {backend}: "
            "use attention=jax"
        )
    return backend == "cpu"


def block_size(name: str, T: int, limit: int = 0) -> int:
    """Positions per block of the kernel `name`: the largest multiple of KERNEL_TILE that divides T.

    At most `limit`; 0 for the kernel's own default.
    """
    limit = min(T, limit or BLOCKS[name])
    largest = max(KERNEL_TILE, limit)
    sizes = range(KERNEL_TILE, largest + 1, KERNEL_TILE)
    return max(size for size in sizes if T % size == 0)


# ---- jax's splash kernel -------------------------------------------------------------------------


def splash(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    window: int | None = None,
    *,
    block: int = BLOCKS["splash"],
    interpret: bool | None = None,
):
    """jax's splash-attention TPU kernel. block: queries and keys per block, at most."""
    _, T, N, H = q_BTNH.shape
    block = block_size("splash", T, block)
    interpret = _use_interpreter(interpret)
    kernel = _splash_kernel(T, N, window, block, interpret)

    # splash scales nothing, and wants heads before positions
    scale = 1 / math.sqrt(H)
    q_BNTH = (q_BTNH * scale).swapaxes(1, 2)
    k_BKSH = k_BSKH.swapaxes(1, 2)
    v_BKSH = v_BSKH.swapaxes(1, 2)
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
    return o_BNTH.swapaxes(1, 2)


@functools.lru_cache
def _splash_kernel(T, N, window, block, interpret):
    """The kernel for one sequence; made once per shape, for its tables of blocks take a while."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa

    mask = sa.CausalMask((T, T))
    if window is not None:
        mask = sa.LocalMask((T, T), (window, 0), 0)
    sizes = sa.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    # numpy leaves: what outlives this trace must not belong to it or to a device
    with jax.ensure_compile_time_eval():
        kernel = sa.make_splash_mha(
            sa.MultiHeadMask([mask] * N),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=sizes,
            residual_checkpoint_name=RESIDUAL_NAME,
            interpret=interpret,
        )
        return jax.tree.map(np.asarray, kernel)


# ---- our own kernel ------------------------------------------------------------------------------
#
# Flash attention (Dao 2023) with windows and grouped heads. Scores are held transposed, keys down
# and queries across (s_SQ), so that each query's maximum, sum and log-sum-exp is one lane of a row.
# Queries and keys share one block size; a query block i sees key blocks i-reach .. i, and no other
# block is loaded or computed.


def pallas(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    window: int | None = None,
    *,
    block: int = BLOCKS["pallas"],
    interpret: bool | None = None,
):
    """Our own TPU flash attention. block: queries and keys per block, at most.

    A v4's 16 MiB hold T x H up to 2^18.
    """
    # heads before positions: a block of one head is then one piece of memory
    q_BNTH = q_BTNH.swapaxes(1, 2)
    k_BKSH = k_BSKH.swapaxes(1, 2)
    v_BKSH = v_BSKH.swapaxes(1, 2)

    block = block_size("pallas", q_BTNH.shape[1], block)
    interpret = _use_interpreter(interpret)
    o_BNTH = cast(Any, _flash(q_BNTH, k_BKSH, v_BKSH, window, block, interpret))
    return o_BNTH.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _flash(q_BNTH, k_BKSH, v_BKSH, window, block, interpret):
    o_BNTH, _ = _flash_forward(q_BNTH, k_BKSH, v_BKSH, window, block, interpret)
    return o_BNTH


def _flash_forward(q_BNTH, k_BKSH, v_BKSH, window, block, interpret):
    """o, and what backward needs. The grid: (batch, group of heads, head of it, query block, step
    through its key blocks).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    G = N // K
    blocks = T // block
    reach = _reach(T, window, block)

    # which block of each array a place in the grid works on
    def query_at(b, kv, g, i, step):
        return b, kv * G + g, i, 0

    def row_at(b, kv, g, i, step):
        return b, kv * G + g, 0, i

    def key_at(b, kv, g, i, step):
        # the same block again where a step has nothing to do: then nothing is loaded
        return b, kv, jnp.maximum(i - reach + step, 0), 0

    query = pl.BlockSpec((None, None, block, H), query_at)
    row = pl.BlockSpec((None, None, 1, block), row_at)
    key = pl.BlockSpec((None, None, block, H), key_at)
    o_BNTH, lse_BN1T = pl.pallas_call(
        functools.partial(_forward_kernel, window=window, reach=reach),
        name="flash_forward",
        grid=(B, K, G, blocks, reach + 1),
        in_specs=[query, key, key],
        out_specs=[query, row],
        out_shape=[
            jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        # a query's maximum, sum and weighed values so far
        scratch_shapes=[
            pltpu.VMEM((1, block), jnp.float32),
            pltpu.VMEM((1, block), jnp.float32),
            pltpu.VMEM((H, block), jnp.float32),
        ],
        # only the steps need their order
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",),
        ),
        interpret=interpret,
    )(q_BNTH, k_BKSH, v_BKSH)

    # named, so that rematerialization can keep them
    o_BNTH = checkpoint_name(o_BNTH, RESIDUAL_NAME)
    lse_BNT = checkpoint_name(lse_BN1T[:, :, 0], RESIDUAL_NAME)
    return o_BNTH, (q_BNTH, k_BKSH, v_BKSH, o_BNTH, lse_BNT)


def _flash_backward(window, block, interpret, residuals, do_BNTH):
    """The gradients of q, k and v. The grid: (batch, group of heads, head of it, key block, step
    through the query blocks that see it).
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    q_BNTH, k_BKSH, v_BKSH, o_BNTH, lse_BNT = residuals
    B, N, T, H = q_BNTH.shape
    K = k_BKSH.shape[1]
    G = N // K
    blocks = T // block
    reach = _reach(T, window, block)

    # what softmax's gradient takes away: each query's o times do
    delta_BNT = jnp.einsum("BNTH,BNTH->BNT", o_BNTH, do_BNTH, preferred_element_type=jnp.float32)

    # which block of each array a place in the grid works on
    def query_at(b, kv, g, j, step):
        # the last query block again where a step has nothing to do: then nothing is loaded
        return b, kv * G + g, jnp.minimum(j + step, blocks - 1), 0

    def row_at(b, kv, g, j, step):
        return b, kv * G + g, 0, jnp.minimum(j + step, blocks - 1)

    def key_at(b, kv, g, j, step):
        return b, kv, j, 0

    # gradients are whole heads
    def query_head_at(b, kv, g, j, step):
        return b, kv * G + g, 0, 0

    def key_head_at(b, kv, g, j, step):
        return b, kv, 0, 0

    query = pl.BlockSpec((None, None, block, H), query_at)
    row = pl.BlockSpec((None, None, 1, block), row_at)
    key = pl.BlockSpec((None, None, block, H), key_at)
    dq = pl.BlockSpec((None, None, T, H), query_head_at)
    dkv = pl.BlockSpec((None, None, T, H), key_head_at)
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BNTH, k_BKSH, v_BKSH)]
    return pl.pallas_call(
        functools.partial(_backward_kernel, window=window, blocks=blocks),
        name="flash_backward",
        grid=(B, K, G, blocks, reach + 1),
        in_specs=[query, key, key, query, row, row],
        out_specs=[dq, dkv, dkv],
        out_shape=like,
        scratch_shapes=[pltpu.VMEM((T, H), jnp.float32)] * 3,
        # the heads of a group add to the same dk and dv, one after the other
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 2 + ("arbitrary",) * 3,
            vmem_limit_bytes=VMEM_BYTES,
        ),
        interpret=interpret,
    )(q_BNTH, k_BKSH, v_BKSH, do_BNTH, lse_BNT[:, :, None], delta_BNT[:, :, None])


_flash.defvjp(_flash_forward, _flash_backward)


def _reach(T, window, block) -> int:
    """How many key blocks before its own a query block sees."""
    if window is None:
        return T // block - 1
    # rounded up: the oldest visible key may lie in a block of which most is hidden
    return -(-window // block)


def _dot(a, b, contract):
    """a @ b over the given axis of each, accumulated in float32."""
    axes = ((contract[0],), (contract[1],))
    no_batch = ((), ())
    return jax.lax.dot_general(a, b, (axes, no_batch), preferred_element_type=jnp.float32)


def _scores(q_QH, k_SH, i, j, window):
    """Scaled scores s_SQ of key block j and query block i; MASKED where a key can't be seen."""
    scale = 1 / math.sqrt(q_QH.shape[1])
    s_SQ = _dot(k_SH, q_QH, (1, 1)) * scale

    # how far each key lies before each query: between the blocks, and within them
    key = jax.lax.broadcasted_iota(jnp.int32, s_SQ.shape, 0)
    query = jax.lax.broadcasted_iota(jnp.int32, s_SQ.shape, 1)
    block = s_SQ.shape[0]
    distance = (i - j) * block + query - key
    visible = distance >= 0
    if window is not None:
        visible &= distance <= window
    return jnp.where(visible, s_SQ, MASKED)


def _forward_kernel(  # noqa: PLR0913 (Pallas hands over every buffer)
    q_ref, k_ref, v_ref, o_ref, lse_ref, max_ref, sum_ref, acc_ref, *, window, reach
):
    """A step of online softmax: one key block more for a query block."""
    from jax.experimental import pallas as pl

    i = pl.program_id(3)
    step = pl.program_id(4)
    j = i - reach + step

    @pl.when(step == 0)
    def start():
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(j >= 0)
    def add():
        s_SQ = _scores(q_ref[...], k_ref[...], i, j, window)
        top = jnp.maximum(max_ref[...], s_SQ.max(0, keepdims=True))
        # a query without a visible key so far sums exp(0) = 1s; its first real key makes `shrink`
        # 0, wiping them out
        p_SQ = jnp.exp(s_SQ - top)
        shrink = jnp.exp(max_ref[...] - top)
        # what was summed under the old maximum shrinks to the new one
        sum_ref[...] = shrink * sum_ref[...] + p_SQ.sum(0, keepdims=True)
        shrunk_HQ = shrink * acc_ref[...]
        acc_ref[...] = shrunk_HQ + _dot(v_ref[...], p_SQ.astype(v_ref.dtype), (0, 0))
        max_ref[...] = top

    # the diagonal block, where every query sees at least itself
    @pl.when(step == reach)
    def finish():
        o_QH = (acc_ref[...] / sum_ref[...]).T
        o_ref[...] = o_QH.astype(o_ref.dtype)
        lse_ref[...] = max_ref[...] + jnp.log(sum_ref[...])


def _backward_kernel(  # noqa: PLR0913 (Pallas hands over every buffer)
    q_ref,
    k_ref,
    v_ref,
    do_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_acc,
    dk_acc,
    dv_acc,
    *,
    window,
    blocks,
):
    """All three gradients in one pass: p is recomputed once, whole heads accumulate on chip."""
    from jax.experimental import pallas as pl

    g, j, step = map(pl.program_id, (2, 3, 4))
    i = j + step
    block = q_ref.shape[0]
    last = (j == blocks - 1) & (step == pl.num_programs(4) - 1)

    @pl.when((j == 0) & (step == 0))
    def start_head():
        dq_acc[...] = jnp.zeros_like(dq_acc)

    # the query heads of a group add to the same dk and dv
    @pl.when((g == 0) & (j == 0) & (step == 0))
    def start_group():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when(i < blocks)
    def add():
        q, k, v, do = q_ref[...], k_ref[...], v_ref[...], do_ref[...]
        # probabilities again, and through softmax the gradient of the scores
        p_SQ = jnp.exp(_scores(q, k, i, j, window) - lse_ref[...])
        dp_SQ = _dot(v, do, (1, 1))
        ds_SQ = (p_SQ * (dp_SQ - delta_ref[...])).astype(q.dtype)
        # its part of each gradient, added where it belongs in the whole head
        queries = pl.ds(i * block, block)
        keys = pl.ds(j * block, block)
        dv_acc[keys] += _dot(p_SQ.astype(do.dtype), do, (1, 0))
        dk_acc[keys] += _dot(ds_SQ, q, (1, 0))
        dq_acc[queries] += _dot(ds_SQ, k, (0, 0))

    # the scale of the scores, left out of every step's dq and dk
    scale = 1 / math.sqrt(q_ref.shape[1])

    @pl.when(last)
    def finish_head():
        dq_ref[...] = (dq_acc[...] * scale).astype(dq_ref.dtype)

    @pl.when(last & (g == pl.num_programs(2) - 1))
    def finish_group():
        dk_ref[...] = (dk_acc[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)
