"""Checkpoints: any pytree with its metadata, written whole or not at all, restored bit for bit.

A checkpoint is a folder step_00001000/ with one safetensors file per top-level key of the tree
(params.safetensors, …; tensors are named by their path in the tree, joined by ".") and meta.json:
format, step, metric, when it was written and when its training began, the size and SHA-256 of every
file, and the caller's own metadata. Several processes write one file each per key, with the parts
that they hold. Remote folders (gs://, s3://, hf://, …) hold the same files.

`trees` is about the arrays, `records` about finding checkpoints, `saving` about writing them, `hub`
about uploading them.
"""

import jax

from lib.files import UserError, choose
from lib.train.hub import check_hub, upload_to_hub
from lib.train.records import (
    CURE,
    Gone,
    best,
    latest,
    part_of,
    path_of,
    read_record,
    resolve,
    retried,
    scan,
    verified,
)
from lib.train.saving import Saver
from lib.train.trees import check_fits, join_parts, like, named, nbytes, nested

__all__ = [
    "Gone",
    "Saver",
    "best",
    "check_hub",
    "latest",
    "nbytes",
    "path_of",
    "read_meta",
    "restore",
    "retried",
    "save",
    "scan",
    "upload_to_hub",
]


def save(folder, step: int, tree, meta: dict | None = None, *, keep: int = 3, metric=None):
    """Save `tree` and JSON-able `meta` as folder/step_NNNNNNNN and return its path.

    All at once; else like `Saver`.
    """
    with Saver(folder, keep) as saver:
        saver.save(step, tree, meta, metric)
        return saver.wait()


def restore(path, template=None, only: str | None = None) -> tuple:
    """(tree, meta) of a checkpoint, bit for bit; `meta` has "step" and "metric" besides its own.

    path: a checkpoint, a folder of them (the newest is taken) or a run folder with checkpoints/ in
    it; may be remote. template: a tree of arrays, ShapeDtypeStructs and numbers; paths, shapes and
    dtypes must be the same as the stored ones, and arrays get the template's sharding. Without it
    nested dicts of numpy arrays come back (list positions are keys then, and random keys their raw
    data). only: read just this top-level key, e.g. "params"; tree and template are then what is
    under it.
    """
    return retried(lambda: _restore(resolve(path, only), template, only))


def _restore(path, template, only: str | None) -> tuple:
    record = read_record(path)
    files = record.files
    if only:
        choose("part of the checkpoint", only, {part_of(name) for name in files})
        files = {name: entry for name, entry in files.items() if part_of(name) == only}

    arrays = _read_arrays(path, files, record.shapes)
    if only:
        arrays = {name.removeprefix(f"{only}."): array for name, array in arrays.items()}

    # plain dicts, or what the template asks for
    if template is None:
        try:
            return nested(arrays), record.told
        except ValueError as e:
            raise UserError(f"{path} is damaged ({e}): {CURE}") from e
    wanted = named(template)
    check_fits(path, arrays, wanted)
    leaves = [like(arrays[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), record.told


def _read_arrays(path, files: dict, shapes: dict) -> dict:
    """All arrays of these files, after their checksums were compared."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    arrays = {}
    with verified(path, files) as local:
        for name in files:
            try:
                arrays |= load_file(local / name)
            except (SafetensorError, ValueError, KeyError, TypeError) as e:
                # its checksum is right, so it was never one of ours
                raise UserError(f"{path}/{name} holds no arrays that can be read: {CURE}") from e
    try:
        return join_parts(arrays, shapes)
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path} has parts that don't make a whole array: {CURE}") from e


def read_meta(path) -> dict:
    """The `meta` of a checkpoint, or of the newest in a folder, without reading any tensor.

    None is compared with its checksum either, so that this takes no time: whoever wants the one
    that `restore` would take names the path that `latest` gives.
    """
    return retried(lambda: read_record(resolve(path, only="")).told)
