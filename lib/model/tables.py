"""Tables that are only looked up (token embedding, value embeddings) and their gradients.

A microbatch reads some thousand lines of a table, and only those have a gradient. Autodiff writes
it as a whole table nevertheless, zeros nearly everywhere, and a step that adds up microbatches then
reads and writes every table for each of them: at depth 20 a third of all memory traffic. So such a
step looks its lines up first (`looked_up`), differentiates with respect to those, and adds their
gradients to its sums where they belong (`add_gradients`).

For that it turns the stacked value embeddings token by token: (V, Lv K H), of each token what all
layers add. One line is then a row in one piece. As they are stacked, a TPU would pad ten heads to
the sixteen of a register, in a copy of all tables. Those of layers taken apart are (V, K H) each:
lines and sums of one layer are small enough to be turned on the chip.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lib.config import Config
from lib.parallel.collectives import gather, is_gathered

VALUES = "value_embeds"


class Lines(NamedTuple):
    """In a table's place among the parameters: its lines for the tokens at hand, (B, T, ...), or
    (Lv, B, T, ...) of stacked tables, in the compute dtype.
    """

    lines: Any


def token_embedding(params, ids_BT, config: Config):
    """The lines of the token embedding (B, T, D), in the compute dtype."""
    table = params["embed"]
    if isinstance(table, Lines):
        return table.lines
    return gather("embed", table)[ids_BT].astype(config.dtype)


def value_embeddings(params, ids_BT, config: Config) -> Any:
    """The value embeddings of these tokens, (Lv, B, T, K, H) or {layer: (B, T, K, H)} as the tables
    are.

    Looked up before the layers, not within them: a scan over layers would copy a whole table for
    each.
    """
    if not config.value_embeds:
        return {}
    tables = params[VALUES]
    if isinstance(tables, Lines):
        return tables.lines

    def look_up(table_VKH):
        if isinstance(table_VKH, Lines):
            return table_VKH.lines
        return gather(VALUES, table_VKH, stacked=True)[ids_BT].astype(config.dtype)

    if isinstance(tables, dict):
        return {layer: look_up(table_VKH) for layer, table_VKH in tables.items()}
    # where each device holds a part, one whole table after the other: all at once fill a chip
    if is_gathered(VALUES):
        return jax.lax.map(look_up, tables)
    return tables[:, ids_BT].astype(config.dtype)


# ---- a step that adds up microbatches ------------------------------------------------------------


def by_token(params):
    """The parameters, or sums like them, with value embeddings turned to (V, Lv K H); where layers
    were taken apart, to (V, K H) each.

    Not where each device holds a part of every table.
    """
    if VALUES not in params or is_gathered(VALUES):
        return params
    if isinstance(params[VALUES], dict):
        rows = jax.tree.map(lambda table_VKH: table_VKH.reshape(len(table_VKH), -1), params[VALUES])
        return params | {VALUES: rows}
    tables_VLKH = jnp.moveaxis(params[VALUES], 1, 0)
    return params | {VALUES: tables_VLKH.reshape(len(tables_VLKH), -1)}


def by_layer(sums, params):
    """`by_token` undone: sums in the shapes of the parameters."""
    if VALUES not in params or is_gathered(VALUES):
        return sums
    if isinstance(params[VALUES], dict):
        shaped = jax.tree.map(lambda a, table: a.reshape(table.shape), sums[VALUES], params[VALUES])
        return sums | {VALUES: shaped}
    Lv, V, K, H = params[VALUES].shape
    tables_VLKH = sums[VALUES].reshape(V, Lv, K, H)
    return sums | {VALUES: jnp.moveaxis(tables_VLKH, 1, 0)}


def as_held(grads):
    """Gradients with those of stacked value embeddings lying in memory as a TPU holds the tables.

    Otherwise XLA lets them lie as they were added up, by token, and turns the tables and both
    moments instead: up to three copies, where a step holds most.
    """
    if VALUES not in grads or is_gathered(VALUES):
        return grads

    def place(tables_LVKH):
        # a TPU stores tiles of 8 by 128 over the last two axes: fewer heads would be padded
        full = tables_LVKH.shape[2] % 8 == 0
        order = (0, 1, 2, 3) if full else (0, 2, 1, 3)
        return with_layout_constraint(tables_LVKH, Layout(order))

    placed = jax.lax.platform_dependent(grads[VALUES], tpu=place, default=lambda a: a)
    return grads | {VALUES: placed}


def looked_up(params, turned, ids_BT, config: Config):
    """The parameters with `Lines` in the place of each table that these tokens only look up.

    turned: the parameters `by_token`.
    """
    lines = {}
    # a tied table is the head as well, and has a gradient everywhere
    if "embed" in params and not config.tied_head:
        lines["embed"] = Lines(token_embedding(params, ids_BT, config))
    if isinstance(params.get(VALUES), dict):
        lines[VALUES] = _lines_by_layer(params[VALUES], turned[VALUES], ids_BT, config)
    elif VALUES in params:
        lines[VALUES] = Lines(_value_lines(params[VALUES], turned[VALUES], ids_BT, config))
    return params | lines


def _lines_by_layer(tables, turned, ids_BT, config: Config) -> dict[int, Lines]:
    """The lines (B, T, K, H) of each layer's own table."""
    found = {}
    for layer, table_VKH in tables.items():
        lines_BTX = turned[layer][ids_BT].astype(config.dtype)
        found[layer] = Lines(lines_BTX.reshape(*ids_BT.shape, *table_VKH.shape[1:]))
    return found


def _value_lines(tables, turned_VX, ids_BT, config: Config):
    """The lines (Lv, B, T, K, H) of stacked tables."""
    if is_gathered(VALUES):
        return value_embeddings({VALUES: tables}, ids_BT, config)
    Lv, _, K, H = tables.shape
    lines_BTLKH = turned_VX[ids_BT].reshape(*ids_BT.shape, Lv, K, H).astype(config.dtype)
    return jnp.moveaxis(lines_BTLKH, 2, 0)


def add_gradients(sums, grads, ids_BT):
    """`sums` (float32, `by_token`) plus the gradients of what `looked_up` made of the parameters.

    Those of lines are added in place, where the lines came from.
    """

    def add_lines(total, lines):
        return total.at[ids_BT].add(lines.astype(jnp.float32))

    def add_values(total, lines):
        # turned while they are narrow: XLA would widen them first
        rows_BTX = lines.reshape(*ids_BT.shape, -1)
        return add_lines(total, jax.lax.optimization_barrier(rows_BTX))

    def add(name, total, grad):
        if name == VALUES and isinstance(grad, dict):
            return {layer: add_values(total[layer], grad[layer].lines) for layer in total}
        if not isinstance(grad, Lines):
            return jax.tree.map(jnp.add, total, grad)
        if is_gathered(name):
            each = _add_to_each_part if name == VALUES else _add_to_part
            return each(name, total, grad.lines.astype(jnp.float32), ids_BT)
        if name == VALUES:
            return add_values(total, jnp.moveaxis(grad.lines, 0, 2))
        return add_lines(total, grad.lines)

    return {name: add(name, sums[name], grads[name]) for name in sums}


def _add_to_part(name: str, total, lines, ids_BT, stacked: bool = False):
    """This device's part of a table's sum, plus that part of the lines of all devices."""

    # what a look-up in the gathered table sends back: lines to their places, and these to parts
    def look_up(part):
        return gather(name, part, stacked)[ids_BT]

    _, send_back = jax.vjp(look_up, total)
    return total + send_back(lines)[0]


def _add_to_each_part(name: str, totals, lines, ids_BT):
    """`_add_to_part` of stacked tables, one after the other."""

    def add(totals, layer_and_lines):
        layer, lines_of_layer = layer_and_lines
        total = _add_to_part(name, totals[layer], lines_of_layer, ids_BT, stacked=True)
        return totals.at[layer].set(total), None

    return jax.lax.scan(add, totals, (jnp.arange(len(totals)), lines))[0]
