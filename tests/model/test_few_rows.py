"""Products of a few rows with weights read as they are stored, against numpy's in float64."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import model
from lib.generate import Sampling, generate
from lib.model import decoding, few_rows
from lib.model.linear import linear
from tests.model.test_model import TINY, relative, tiny_params

FLOAT32 = TINY.replace(compute_dtype="float32")


@pytest.fixture(autouse=True)
def built():
    if not few_rows.is_built():
        pytest.skip("no C++ compiler here")


@pytest.fixture
def everywhere(monkeypatch):
    """Let models as small as a test's be decoded so."""
    monkeypatch.setattr(decoding, "CACHED", 0)


def drawn(seed, *shape, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape) * 20
    return jnp.asarray(values).astype(dtype)


def exact(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


# ---- the products --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("inputs", [1, 63, 64, 200, 515])
def test_products_are_numpys_for_any_shape_and_kind_of_weight(inputs, dtype):
    # every size of a group of rows, and outputs that fill no whole tile
    for rows, outputs in (1, 1), (2, 7), (3, 50), (6, 9), (15, 130), (32, 5):
        x = drawn(rows, rows, inputs)
        w = drawn(outputs, outputs, inputs, dtype=dtype)
        y = few_rows.product(x, w)
        assert y.dtype == jnp.float32
        assert relative(y, exact(x) @ exact(w).T) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 8, 31])
def test_a_row_gets_the_same_whatever_the_number_of_threads(rows):
    # large enough for many parts, whose borders lie elsewhere with one core more
    x, w = drawn(0, rows, 256), drawn(1, 1005, 256)
    whole = few_rows.product(x, w)
    for start in range(0, 1005, 204):
        part = few_rows.product(x, w[start : start + 204])
        np.testing.assert_array_equal(part, whole[:, start : start + 204])


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_products_of_pairs(rows):
    for count, inputs, outputs in (1, 40, 65), (3, 130, 64), (5, 17, 24):
        x = drawn(0, count, rows, inputs)
        w = drawn(1, count, outputs, inputs)
        want = np.einsum("XMI,XOI->XMO", exact(x), exact(w))
        assert relative(few_rows.products(x, w), want) < 1e-6
        turned = jnp.swapaxes(w, 1, 2)
        assert relative(few_rows.products_by_input(x, turned), want) < 1e-6


def test_two_threads_at_once_do_not_meet():
    x, w = drawn(0, 4, 512), drawn(1, 2048, 512)
    want = np.asarray(few_rows.product(x, w))
    wrong = []

    def often():
        for _ in range(50):
            if not np.array_equal(few_rows.product(x, w), want):
                wrong.append(1)

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_linear_layer_of_many_rows_is_xlas(monkeypatch):
    w_OI = drawn(0, 6, 48, dtype=jnp.int8)
    w = {"few_rows": w_OI.reshape(2, 3, 48), "scale": drawn(1, 2, 3)}
    called = []
    product = few_rows.product
    monkeypatch.setattr(few_rows, "product", lambda *a: called.append(1) or product(*a))
    for tokens in (few_rows.MOST_ROWS, few_rows.MOST_ROWS + 1):
        x_BTD = drawn(2, 1, tokens, 48)
        y_BTNH = linear("BTD,DNH->BTNH", x_BTD, w)
        want = np.einsum("BTD,NHD,NH->BTNH", exact(x_BTD), exact(w["few_rows"]), exact(w["scale"]))
        assert relative(y_BTNH, want) < 1e-6
    assert len(called) == 1
    # in bfloat16 the result is rounded, and nothing before
    x_BTD = drawn(3, 1, 1, 48, dtype=jnp.bfloat16)
    y_BTNH = linear("BTD,DNH->BTNH", x_BTD, w)
    want = np.einsum("BTD,NHD,NH->BTNH", exact(x_BTD), exact(w["few_rows"]), exact(w["scale"]))
    assert y_BTNH.dtype == jnp.bfloat16 and relative(y_BTNH, want) < 4e-3


# ---- decoding with them --------------------------------------------------------------------------


def test_decoding_says_the_same_as_xlas_products(everywhere, monkeypatch):
    prompts = np.random.default_rng(0).integers(0, 90, (3, 12)).tolist()
    sampling = Sampling(20, temperature=0.0)
    ours = generate(tiny_params(), FLOAT32, prompts, sampling)
    monkeypatch.setattr(few_rows, "is_built", lambda: False)
    assert ours == generate(tiny_params(), FLOAT32, prompts, sampling)

    # and by numbers: many tokens at once, then one after the other
    plain = model.decoding_params(tiny_params(), FLOAT32)
    read = decoding.for_few_rows(plain, FLOAT32)
    tokens = np.array(prompts)
    caches = [model.init_cache(FLOAT32, 3, 16) for _ in range(2)]
    for part in (tokens[:, :10], tokens[:, 10:11], tokens[:, 11:]):
        both = []
        for i, params in enumerate((plain, read)):
            logits, caches[i] = model.forward(params, FLOAT32, part, caches[i])
            both.append(logits)
        assert relative(both[1], both[0]) < 1e-5


def test_the_mixed_mode_reads_bfloat16_and_rounds_nothing_else(everywhere):
    mixed = TINY.replace(compute_dtype="mixed")
    ready = model.decoding_params(tiny_params(), mixed)
    assert ready["blocks"][0]["wo"]["few_rows"].dtype == jnp.bfloat16
    assert ready["head"]["few_rows"].dtype == jnp.bfloat16

    # the same with weights that were rounded before
    def rounded(name, a):
        matrix = name in (*decoding.INPUTS, "head", "embed")
        return a.astype(jnp.bfloat16).astype(jnp.float32) if matrix else a

    params = tiny_params()
    blocks = {name: rounded(name, a) for name, a in params["blocks"].items()}
    params |= {"blocks": blocks} | {"head": rounded("head", params["head"])}
    want = model.decoding_params(params, FLOAT32)
    tokens = np.random.default_rng(0).integers(0, 90, (2, 1))
    both = []
    for p, config in ((ready, mixed), (want, FLOAT32)):
        logits, _ = model.forward(p, config, tokens, model.init_cache(config, 2, 16))
        both.append(logits)
    assert relative(*both) < 1e-5


def test_small_models_in_floats_stay_xlas(monkeypatch):
    built = []
    monkeypatch.setattr(few_rows, "is_built", lambda: built.append(1) or True)
    for config in (FLOAT32, TINY.replace(compute_dtype="mixed")):
        ready = model.decoding_params(tiny_params(), config)
        assert not decoding.is_for_few_rows(ready["blocks"][0]["wo"]) and not built
    # in int8 they are faster however small
    small = model.decoding_params(model.quantized(tiny_params(), FLOAT32), FLOAT32)
    assert set(small["blocks"][0]["wo"]) == {"few_rows", "scale"}
    assert small["head"]["few_rows"].dtype == jnp.int8


def test_what_is_traced_or_on_another_device_stays_xlas(everywhere, monkeypatch):
    def is_read_so():
        return decoding.is_for_few_rows(model.decoding_params(tiny_params(), FLOAT32)["head"])

    assert is_read_so()
    shapes = jax.eval_shape(lambda p: model.decoding_params(p, FLOAT32), tiny_params())
    assert not decoding.is_for_few_rows(shapes["head"])
    with monkeypatch.context() as m:
        m.setattr(jax, "device_count", lambda: 8)
        assert not is_read_so()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert not is_read_so()


# ---- how it is built -----------------------------------------------------------------------------


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Nothing is built yet; what is built is a file that compiles at once, in a folder of the
    test's.
    """
    source = tmp_path / "functions.cc"
    source.write_text('extern "C" { void FewRows() {} void FewRowsByInput() {} }')
    monkeypatch.setattr(few_rows, "SOURCE", source)
    monkeypatch.setattr(few_rows, "CACHE", tmp_path / "built")
    monkeypatch.setattr(few_rows, "is_built", few_rows.is_built.__wrapped__)
    # XLA takes a name once
    names = []
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda name, *_, **__: names.append(name))
    return names


def test_it_is_compiled_once(fresh, monkeypatch):
    compiled = []
    compile_ = few_rows._compile
    monkeypatch.setattr(few_rows, "_compile", lambda *a: compiled.append(a) or compile_(*a))
    assert few_rows.is_built() and few_rows.is_built()
    assert len(compiled) == 1 and set(fresh) == set(few_rows.TARGETS)
    assert [path.suffix for path in few_rows.CACHE.iterdir()] == [".so"]
    # another processor may not know the same instructions
    monkeypatch.setattr(few_rows, "_processor", lambda: "another")
    assert few_rows.is_built()
    assert len(compiled) == 2


def test_a_compiler_that_does_not_know_this_processor_compiles_for_any(fresh, monkeypatch):
    monkeypatch.setattr(few_rows, "NATIVE", "-march=unheard-of")
    assert few_rows.is_built()


def test_without_a_compiler_xla_decodes_and_says_why(fresh, everywhere, monkeypatch):
    monkeypatch.setattr(few_rows, "COMPILERS", ("no-such-compiler",))
    with pytest.warns(UserWarning, match=r"more slowly here.*no C\+\+ compiler.*apt install"):
        ready = model.decoding_params(tiny_params(), FLOAT32)
    assert not decoding.is_for_few_rows(ready["head"])


def test_what_does_not_compile_is_told_and_leaves_nothing(fresh, tmp_path, monkeypatch):
    broken = tmp_path / "broken.cc"
    broken.write_text("int main() { return nonsense; }")
    monkeypatch.setattr(few_rows, "SOURCE", broken)
    with pytest.warns(UserWarning, match=r"cannot compile .*broken.cc: .*nonsense"):
        assert not few_rows.is_built()
    assert not list(few_rows.CACHE.iterdir())


def test_a_folder_that_cannot_be_written_is_told(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(few_rows, "CACHE", tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="more slowly here"):
        assert not few_rows.is_built()
