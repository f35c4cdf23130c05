"""A pytree as arrays with names, and back: what stands in the files of a checkpoint.

A leaf is named by its path in the tree, "params.blocks.wq". Of an array that several processes hold
parts of, each writes the parts that it holds first, under names like "params.blocks.wq@0,64": the
path, and where the part starts.
"""

import collections
import math

import jax
import numpy as np

from lib.files import UserError

# between the path of an array and where a part of it starts
PART = "@"


def named(tree) -> dict:
    """Leaves by path. ValueError where a dict's keys make paths that no file could tell apart."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    by_path = {}
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if PART in name:
            raise ValueError(f"{name!r} has a {PART!r}, which marks the parts of an array")
        by_path[name] = leaf

    if len(by_path) < len(leaves):
        raise ValueError(
            "two leaves of the tree have the same path once its keys are joined by '.'"
        )
    return by_path


def is_random_key(leaf) -> bool:
    """Whether it is one of JAX's typed random keys, which are stored as plain integers."""
    if not hasattr(leaf, "dtype"):
        return False
    # public in jax's manual, not in its types
    prng_key = jax.dtypes.prng_key  # pyright: ignore[reportPrivateImportUsage]
    issubdtype = jax.dtypes.issubdtype  # pyright: ignore[reportPrivateImportUsage]
    return issubdtype(leaf.dtype, prng_key)


def _stored(leaf):
    """Something with the shape and dtype that a leaf is stored with."""
    if is_random_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    if hasattr(leaf, "dtype"):
        return leaf
    return np.asarray(leaf)


def nbytes(tree) -> int:
    """Bytes a checkpoint of `tree` takes; for arrays or ShapeDtypeStructs."""
    arrays = map(_stored, jax.tree.leaves(tree))
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


# ---- to the files --------------------------------------------------------------------------------


def to_host(tree) -> tuple[dict, dict]:
    """(numpy copies by name of what this process is to write, shapes of the arrays in parts)."""
    leaves = {}
    for path, leaf in named(tree).items():
        leaves[path] = jax.random.key_data(leaf) if is_random_key(leaf) else leaf
    in_parts = {path: leaf for path, leaf in leaves.items() if _is_in_parts(leaf)}

    # process 0 writes what it has the whole of
    local = {}
    if jax.process_index() == 0:
        for path, leaf in leaves.items():
            if path not in in_parts:
                local[path] = _local(leaf)

    # of the rest each process writes what no other holds before it
    for path, leaf in in_parts.items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                starts = ",".join(str(span.start or 0) for span in shard.index)
                local[path + PART + starts] = shard.data

    # one call for all, so that the transfers overlap
    fetched = jax.device_get(local)
    copies = {name: _copy(name, local[name], array) for name, array in fetched.items()}
    return copies, {path: list(leaf.shape) for path, leaf in in_parts.items()}


def _is_in_parts(leaf) -> bool:
    """Whether no process holds the whole of it."""
    if not isinstance(leaf, jax.Array):
        return False
    return not leaf.is_fully_addressable and not leaf.is_fully_replicated


def _local(leaf):
    """The copy that this process holds of something that each process has the whole of."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf.addressable_data(0)
    return leaf


def _copy(name: str, leaf, array) -> np.ndarray:
    """What `leaf` was fetched as, in row-major order and in memory of its own."""
    fetched = isinstance(leaf, jax.Array) and _platform(leaf) != "cpu"
    if fetched:
        copy = np.asarray(array, order="C")
    else:
        # on a CPU device_get only shares the buffer, which the next step is given to overwrite
        copy = np.array(array, order="C")

    # texts, dates and Python objects
    if copy.dtype.kind in "OUSM":
        kind = type(array).__name__
        raise TypeError(f"{name} is a {kind}, not a number or array: put it in the metadata")
    return copy


def _platform(array: jax.Array) -> str:
    return next(iter(array.sharding.device_set)).platform


# ---- and back ------------------------------------------------------------------------------------


def join_parts(arrays: dict, shapes: dict) -> dict:
    """The arrays, with those that several processes wrote put together.

    Raises ValueError, KeyError or TypeError where names and shapes don't belong together.
    """
    whole, parts = {}, collections.defaultdict(list)
    for name, array in arrays.items():
        path, mark, starts = name.partition(PART)
        if mark:
            parts[path].append(([int(start) for start in starts.split(",")], array))
        else:
            whole[path] = array

    for path, pieces in parts.items():
        whole[path] = _assemble(pieces, shapes[path])
    return whole


def _assemble(pieces: list, shape: list[int]) -> np.ndarray:
    """One array of parts, each given by where it starts."""
    # looked at first: a shape that someone made up might not fit into memory
    if sum(part.size for _, part in pieces) != math.prod(shape):
        raise ValueError("the parts of an array are not as large as the whole")

    array = np.empty(shape, pieces[0][1].dtype)
    for starts, part in pieces:
        spans = [slice(start, start + n) for start, n in zip(starts, part.shape, strict=True)]
        array[tuple(spans)] = part
    return array


def nested(arrays: dict) -> dict:
    """Dicts of dicts from paths; ValueError where one path is the beginning of another."""
    tree: dict = {}
    for name, array in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name} lies below an array")
        node[last] = array
    return tree


def check_fits(path, arrays: dict, wanted: dict):
    """UserError where stored arrays have other names, shapes or dtypes than the template's leaves.

    path: the checkpoint's, for the sentence.
    """
    there = {name: _kind(array) for name, array in arrays.items()}
    here = {name: _kind(leaf) for name, leaf in wanted.items()}
    differences = []
    for name in sorted(here | there):
        stored, asked = there.get(name, "missing"), here.get(name, "missing")
        if stored != asked:
            differences.append(f"{name} is {stored} in it and {asked} here")

    if differences:
        shown = ", ".join(differences[:3])
        if len(differences) > 3:
            shown += f" (and {len(differences) - 3} more)"
        raise UserError(
            f"{path} does not fit: {shown}; use the config in its meta.json, or another checkpoint"
        )


def _kind(leaf) -> str:
    """dtype and shape as people read them."""
    stored = _stored(leaf)
    return f"{stored.dtype} {tuple(stored.shape)}"


def like(array: np.ndarray, leaf):
    """The stored array as the kind of thing that the template's `leaf` is.

    It gets the sharding that the leaf has, if any.
    """
    if isinstance(leaf, (bool, int, float)):
        return type(leaf)(array)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return array

    # on the devices, of which each gets its own part
    if leaf.sharding is None:
        # copied, for it may be donated; without a program of its own for each shape
        placed = jax.device_put(array, may_alias=False)
    else:
        placed = jax.make_array_from_callback(array.shape, leaf.sharding, lambda i: array[i])
    if is_random_key(leaf):
        return jax.random.wrap_key_data(placed, impl=_key_kind(leaf))
    return placed


def _key_kind(key):
    """The algorithm of a random key; a ShapeDtypeStruct of one will do."""
    kinds = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), key)
    return kinds[0]
