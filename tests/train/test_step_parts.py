"""The step's small parts, by hand: what is refused, and whose compiled program is whose."""

import jax
import pytest

from lib.config import Config
from lib.files import UserError
from lib.parallel import make_layout
from lib.parallel.layout import state_shardings
from lib.preflight.overview import shape_lines
from lib.train import step

CONFIG = Config(sequence_len=128, num_steps=9)


def test_the_mixed_mode_needs_a_jax_that_can_multiply_so(monkeypatch):
    step.check_mixed()
    asked = []
    monkeypatch.setattr(step, "check_mixed", lambda: asked.append(1))
    for dtype, checked in (("float32", []), ("bfloat16", []), ("mixed", [1])):
        step.make_train_step(CONFIG.replace(compute_dtype=dtype))
        assert asked == checked
    monkeypatch.undo()

    def einsum(*given, **more):
        raise jax.errors.JaxRuntimeError("not here")

    monkeypatch.setattr(step.jnp, "einsum", einsum)
    with pytest.raises(UserError, match="which jax .* cannot do here: take float32"):
        step.check_mixed()


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A CPU that multiplies bfloat16, and a jax that optimizes."""
    monkeypatch.setattr(step.runtime, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(type(jax.config), "read", lambda self, name: False)


def test_auto_trains_in_the_mixed_mode_on_such_a_cpu(monkeypatch, fast_bfloat16):
    assert step.for_training(CONFIG) == CONFIG.replace(compute_dtype="mixed")
    mixed = step.make_train_step(CONFIG.replace(compute_dtype="mixed"))
    assert step.make_train_step(CONFIG) is mixed
    # the plan and the record say so
    assert step.computed_in(CONFIG) == "float32 with products of bfloat16"
    assert f"{step.computed_in(CONFIG)} on float32" in "\n".join(shape_lines(CONFIG, None))
    # only training does: what is measured and written stays float32
    assert CONFIG.operand_dtype == CONFIG.dtype == "float32"

    for asked in ("float32", "bfloat16"):
        config = CONFIG.replace(compute_dtype=asked)
        assert step.for_training(config) == config
        assert step.computed_in(config) == asked


@pytest.mark.parametrize("lack", ["a CPU", "such products", "such a jax", "optimizations"])
def test_auto_is_float32_without(lack, monkeypatch, fast_bfloat16):
    if lack == "a CPU":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elif lack == "such products":
        monkeypatch.setattr(step.runtime, "multiplies_bfloat16", lambda: False)
    elif lack == "such a jax":
        monkeypatch.setattr(step, "_refusal_of_mixed", lambda: ValueError("no"))
    else:
        monkeypatch.setattr(type(jax.config), "read", lambda self, name: True)
    assert step.for_training(CONFIG) == CONFIG


def test_a_gpus_step_keeps_products_apart(monkeypatch):
    assert step._compiler_options() == {}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = step._compiler_options()
    monkeypatch.undo()
    # this compiler knows the option, and refuses what it does not know
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    (name,) = options
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={f"{name}s": "0"})(1)


def test_who_shares_a_compiled_step():
    one = step.make_train_step(CONFIG)
    assert one is step.make_train_step(CONFIG.replace(num_steps=5, matrix_lr=1.0, seed=4))
    assert one is not step.make_train_step(CONFIG.replace(n_layer=CONFIG.n_layer + 1))


def test_a_states_shapes_come_with_the_places_of_its_parts():
    layout = make_layout("dp", CONFIG, jax.devices()[:1])
    plain, placed = step.state_template(CONFIG), step.state_template(CONFIG, layout)
    places = jax.tree.leaves(state_shardings(layout, CONFIG, plain))
    leaves = jax.tree.leaves(plain), jax.tree.leaves(placed), places
    for one, other, place in zip(*leaves, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.sharding is None and other.sharding == place
