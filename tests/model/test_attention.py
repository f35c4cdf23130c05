import importlib
import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.config import check_attention
from lib.files import UserError
from lib.model import attention
from lib.model.attention import ATTENTION
from lib.model.kernels import RESIDUAL_NAME, compiled_kernels
from lib.model.transformer import loss_fn
from tests.helpers import programs
from tests.model.test_model import TINY, tiny_params

BLOCKS = {
    "einsum": dict(block=128),
    "jax": {},
    "splash": dict(block=128),
    "pallas": dict(block=128),
}
KERNELS = ("splash", "pallas")


def reference(q, k, v, window):
    """Scores of every pair, softmax, product: nothing clever."""
    T, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    i, j = np.arange(T)[:, None], np.arange(T)
    visible = (j <= i) & (j >= i - (T if window is None else window))
    s = jnp.where(visible, jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(q.shape[-1]), -jnp.inf)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(s, axis=-1), v)


def inputs(B, T, N, K, H, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (B, T, n, H), dtype) for key, n in zip(keys, (N, K, K, N))]


def with_gradients(attend):
    def run(q, k, v, do):
        o, vjp = jax.vjp(attend, q, k, v)
        return o, *vjp(do)

    return jax.jit(run)


CASES = {  # T, N, K, window
    "all_heads": (256, 2, 2, None),
    "groups_window_off_blocks": (384, 4, 2, 100),
    "one_kv_head_window_just_over_a_block": (384, 2, 1, 129),
    "window_beyond_the_sequence": (256, 2, 1, 300),
    "sequence_off_blocks": (200, 4, 2, 70),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ATTENTION)
def test_values_and_gradients(name, case):
    T, N, K, window = CASES[case]
    if name in KERNELS and T % 128:
        with pytest.raises(UserError, match="multiple of 128"):
            ATTENTION[name](*inputs(1, T, N, K, 8)[:3], window)
        return
    args = inputs(1, T, N, K, 16)
    got = with_gradients(lambda q, k, v: ATTENTION[name](q, k, v, window, **BLOCKS[name]))(*args)
    want = with_gradients(lambda q, k, v: reference(q, k, v, window))(*args)
    for what, a, b in zip(("o", "dq", "dk", "dv"), got, want):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5, err_msg=what)


@pytest.mark.parametrize("name", ATTENTION)
def test_window_counts_keys_before_the_query(name):
    """With equal scores the output is the mean of the visible values, here their positions."""
    T, window = 256, 3
    q = jnp.zeros((1, T, 1, 8))
    position = jnp.broadcast_to(jnp.arange(T, dtype=jnp.float32)[None, :, None, None], q.shape)
    o = ATTENTION[name](q, q, position, window)[0, :, 0, 0]
    np.testing.assert_allclose(
        o, (np.arange(T) + np.maximum(np.arange(T) - window, 0)) / 2, rtol=1e-5
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_bfloat16(name):
    args = inputs(1, 256, 4, 2, 32, jnp.bfloat16)
    got = with_gradients(lambda q, k, v: ATTENTION[name](q, k, v, 128, **BLOCKS[name]))(*args)
    want = with_gradients(lambda q, k, v: reference(q, k, v, 128))(
        *(x.astype(jnp.float32) for x in args)
    )
    for what, a, b in zip(("o", "dq", "dk", "dv"), got, want):
        assert a.dtype == jnp.bfloat16
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 0.01, (what, error)


@pytest.mark.parametrize("name", ["einsum", *KERNELS])
def test_residuals_can_be_saved_by_name(name):
    q, k, v, _ = inputs(1, 256, 2, 1, 16)

    def residuals(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        attend = jax.checkpoint(lambda q, k, v: ATTENTION[name](q, k, v, 100), policy=policy)
        return [
            x.shape
            for x in jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[1], q, k, v))
        ]

    without, saved = residuals(), residuals(RESIDUAL_NAME)
    o_and_lse = (
        {(1, 1, 512, 16), (1, 1, 512, 1)} if name == "einsum" else {(1, 2, 256, 16), (1, 2, 256)}
    )
    assert set(saved) - set(without) == o_and_lse


@pytest.mark.parametrize("remat, times", [("none", 1), ("dots", 1), ("layer", 2)])
def test_cudnns_attention_runs_once_unless_all_is_recomputed(monkeypatch, remat, times):
    """Traced as on a GPU that has it, with what jax would ask the card answered by hand."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_: False)
    monkeypatch.setattr(attention, "_has_cudnn_flash", lambda dtype: True)
    changes = dict(attention="jax", compute_dtype="bfloat16", head_dim=64, n_layer=1)
    config = TINY.replace(**changes, remat=remat)
    x = np.zeros((2, 128), np.int32)

    def loss(params):
        return loss_fn(params, config, x, x)[0]

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(tiny_params(config)))
    assert jaxpr.count(f"= {attention.CUDNN_FORWARD}[") == times
    assert jaxpr.count("= dot_product_attention_bwd_wrapper[") == 1


@pytest.mark.parametrize("name", KERNELS)
def test_interpreter_only_on_cpu(name):
    q, k, v, _ = inputs(1, 128, 2, 1, 16)
    interpreted = lambda **options: (
        "interpret=True"
        in str(jax.make_jaxpr(lambda q, k, v: ATTENTION[name](q, k, v, None, **options))(q, k, v))
    )
    assert interpreted() and not interpreted(interpret=False)
    with compiled_kernels():
        assert not interpreted() and interpreted(interpret=True)
    assert interpreted()


@pytest.mark.parametrize(
    "gpu, dtype, expected",
    [
        (
            dict(platform="gpu", version="cuda 12", compute_capability="9.0"),
            jnp.bfloat16,
            ["cudnn"],
        ),
        (dict(platform="gpu", version="cuda 12", compute_capability="9.0"), jnp.float32, ["xla"]),
        (dict(platform="gpu", version="cuda 12", compute_capability="7.5"), jnp.float16, ["xla"]),
        (
            dict(platform="gpu", version="rocm 6", compute_capability="gfx942"),
            jnp.bfloat16,
            ["xla"],
        ),
        (dict(platform="tpu", version="libtpu", compute_capability=None), jnp.bfloat16, ["xla"]),
        (
            dict(platform="gpu", version="cuda 12", compute_capability="8.0", lacks="head width"),
            jnp.bfloat16,
            ["cudnn", "xla"],
        ),
    ],
)
def test_jax_uses_cudnn_where_it_can(monkeypatch, gpu, dtype, expected):
    device = SimpleNamespace(
        platform=gpu["platform"],
        client=SimpleNamespace(platform_version=gpu["version"]),
        compute_capability=gpu["compute_capability"],
    )
    tried = []

    def attention(q, k, v, *, implementation, is_causal, local_window_size):
        assert is_causal and local_window_size == (5, 0)
        tried.append(implementation)
        if implementation == "cudnn" and "lacks" in gpu:
            raise NotImplementedError(gpu["lacks"])
        return q

    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    ATTENTION["jax"](*inputs(1, 8, 2, 1, 8, dtype)[:3], 5)
    assert tried == expected


@pytest.mark.parametrize(
    "name, change, says",
    [
        ("flash", {}, "einsum, jax, pallas, splash"),
        ("einsum", dict(n_kv_head=3), "use n_kv_head=2"),
        ("jax", dict(window=-1), "at least 0"),
        ("splash", dict(sequence_len=1000), "use sequence_len=1024"),
        ("splash", dict(sequence_len=40), "use sequence_len=128"),
        ("pallas", dict(sequence_len=2000), "use sequence_len=2048"),
        ("pallas", dict(sequence_len=32768), "sequence_len=16384"),
        ("pallas", dict(sequence_len=16384, head_dim=192), "sequence_len=8192"),
    ],
)
def test_what_cannot_be_done_is_said(name, change, says):
    sizes = dict(sequence_len=2048, head_dim=128, n_head=4, n_kv_head=2)
    for possible in ATTENTION:
        check_attention(possible, **sizes, window=512)
    with pytest.raises(UserError, match=says):
        check_attention(name, **sizes | change)


def test_tpu_kernels_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for name in KERNELS:
        with pytest.raises(UserError, match="use attention=jax"):
            ATTENTION[name](*inputs(1, 128, 2, 1, 8)[:3])


def test_cached_decoding_is_refused():
    q, k, v, _ = inputs(1, 8, 2, 2, 8)
    for attend in ATTENTION.values():
        with pytest.raises(UserError, match="1 queries and 8 keys"):
            attend(q[:, :1], k, v, None)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU without one needs the preflight extra: pip install libtpu",
)
@pytest.mark.tpu
def test_compiles_for_a_tpu():
    """Forward and backward in bfloat16; a policy that saves the residuals leaves no second forward
    kernel.
    """
    env = dict(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v6e-1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",
    )
    run = programs.run("compile_attention", env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n") == [
        "einsum 0",
        "jax 0",
        "splash 2",
        "pallas 2",
        "splash 2",
        "pallas 2",
        "",
    ]
