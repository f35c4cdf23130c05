"""Tables and the sums of their lines' gradients, on numbers that can be added up by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.model import tables
from lib.model.tables import VALUES, Lines

IDS = np.array([[2, 0, 2]])
CONFIG = types.SimpleNamespace(dtype=jnp.bfloat16, value_embeds=True, tied_head=False)


def numbers(*shape):
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


@pytest.fixture
def in_parts(monkeypatch):
    """As where each device holds a part of every table; the part is all of it here."""
    asked = []

    def gather(name, part, stacked=False):
        asked.append((name, stacked))
        return part

    monkeypatch.setattr(tables, "gather", gather)
    monkeypatch.setattr(tables, "is_gathered", lambda name: True)
    return asked


def test_turned_by_token_and_back():
    params = {"embed": numbers(3, 2), VALUES: numbers(2, 3, 1, 2)}
    turned = tables.by_token(params)
    # of token 1 what both layers add
    assert turned[VALUES].shape == (3, 4) and turned[VALUES][1].tolist() == [2, 3, 8, 9]
    assert turned["embed"] is params["embed"]
    np.testing.assert_array_equal(tables.by_layer(turned, params)[VALUES], params[VALUES])
    plain = {"embed": numbers(3, 2)}
    assert tables.by_token(plain) is plain and tables.by_layer(plain, plain) is plain


def test_tables_in_parts_are_not_turned(in_parts):
    params = {VALUES: numbers(2, 3, 1, 2)}
    assert tables.by_token(params) is params and tables.by_layer(params, params) is params
    assert tables.as_held(params) is params


@pytest.mark.parametrize(("heads", "order"), [(8, "3, 2, 1, 0"), (10, "3, 1, 2, 0")])
def test_gradients_lie_as_a_tpu_holds_the_tables(heads, order):
    """Told to its compiler alone, minor axis first."""
    grads = {"embed": numbers(3, 2), VALUES: numbers(2, 3, heads, 4)}
    traced = jax.jit(tables.as_held).trace(grads)
    on_tpu = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert f"result_layouts = [dense<[{order}]>" in on_tpu
    assert "result_layouts" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    held = tables.as_held(grads)
    assert held["embed"] is grads["embed"]
    np.testing.assert_array_equal(held[VALUES], grads[VALUES])
    plain = {"embed": numbers(3, 2)}
    assert tables.as_held(plain) is plain


def test_lines_are_those_of_the_tokens():
    params = {"embed": numbers(3, 2), VALUES: numbers(2, 3, 1, 2), "head": 1}
    found = tables.looked_up(params, tables.by_token(params), IDS, CONFIG)
    assert found["embed"].lines.tolist() == [[[4, 5], [0, 1], [4, 5]]]
    values = found[VALUES].lines
    assert values.shape == (2, 1, 3, 1, 2) and values.dtype == jnp.bfloat16
    assert values[1, 0, :, 0].tolist() == [[10, 11], [6, 7], [10, 11]]
    assert found["head"] == 1
    # the same, whether lines stand there or the table
    for name, look_up in (("embed", tables.token_embedding), (VALUES, tables.value_embeddings)):
        np.testing.assert_array_equal(look_up(found, IDS, CONFIG), look_up(params, IDS, CONFIG))
        assert look_up(found, IDS, CONFIG) is found[name].lines
    tied = types.SimpleNamespace(**vars(CONFIG) | dict(tied_head=True))
    assert (
        tables.looked_up(params, params | tables.by_token(params), IDS, tied)["embed"]
        is params["embed"]
    )
    without = types.SimpleNamespace(**vars(CONFIG) | dict(value_embeds=False))
    assert tables.value_embeddings(params, IDS, without) == {}
    by_layer = {VALUES: {3: params[VALUES][1]}}
    [(layer, lines)] = tables.value_embeddings(by_layer, IDS, CONFIG).items()
    assert layer == 3 and lines[0, :, 0].tolist() == [[10, 11], [6, 7], [10, 11]]


# sums of ones, and gradients: of token 2 the first and the third line
LINES = {"embed": numbers(1, 3, 2), VALUES: numbers(2, 1, 3, 1, 2)}
EMBED = [[3, 4], [1, 1], [1 + 0 + 4, 1 + 1 + 5]]
VALUE = [[[3, 4], [1, 1], [5, 7]], [[9, 10], [1, 1], [17, 19]]]


def test_gradients_of_lines_are_added_where_they_came_from():
    params = {"embed": jnp.ones((3, 2)), VALUES: jnp.ones((2, 3, 1, 2)), "head": jnp.ones(2)}
    grads = {name: Lines(lines.astype(jnp.bfloat16)) for name, lines in LINES.items()}
    grads["head"] = jnp.array([2.0, 3.0])
    added = tables.add_gradients(tables.by_token(params), grads, IDS)
    added = tables.by_layer(added, params)
    assert added["embed"].tolist() == EMBED and added["head"].tolist() == [3, 4]
    assert added[VALUES][:, :, 0].tolist() == VALUE
    assert {a.dtype.name for a in added.values()} == {"float32"}


def test_layers_taken_apart_have_tables_of_their_own():
    stacked = numbers(2, 3, 1, 2)
    params = {"embed": numbers(3, 2), VALUES: {0: stacked[0], 2: stacked[1]}}
    turned = tables.by_token(params)
    assert {layer: rows.shape for layer, rows in turned[VALUES].items()} == {0: (3, 2), 2: (3, 2)}
    found = tables.value_embeddings(tables.looked_up(params, turned, IDS, CONFIG), IDS, CONFIG)
    whole = tables.value_embeddings(params, IDS, CONFIG)
    for layer in (0, 2):
        assert found[layer].shape == (1, 3, 1, 2) and found[layer].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found[layer], whole[layer])

    ones = {"embed": jnp.ones((3, 2)), VALUES: {0: jnp.ones((3, 1, 2)), 2: jnp.ones((3, 1, 2))}}
    lines = {layer: Lines(LINES[VALUES][nth]) for nth, layer in enumerate((0, 2))}
    grads = {"embed": Lines(LINES["embed"]), VALUES: lines}
    added = tables.by_layer(tables.add_gradients(tables.by_token(ones), grads, IDS), ones)
    assert added["embed"].tolist() == EMBED
    assert [added[VALUES][layer][:, 0].tolist() for layer in (0, 2)] == VALUE


def test_so_are_those_of_tables_in_parts(in_parts):
    params = {"embed": jnp.ones((3, 2)), VALUES: jnp.ones((2, 3, 1, 2))}
    grads = {name: Lines(lines) for name, lines in LINES.items()}
    added = tables.add_gradients(params, grads, IDS)
    assert added["embed"].tolist() == EMBED and added[VALUES][:, :, 0].tolist() == VALUE
    assert set(in_parts) == {("embed", False), (VALUES, True)}
    in_parts.clear()
    values = tables.value_embeddings(params | {VALUES: numbers(2, 3, 1, 2)}, IDS, CONFIG)
    assert values[1, 0, :, 0].tolist() == [[10, 11], [6, 7], [10, 11]]
    assert set(in_parts) == {(VALUES, True)}
