"""Checkpoints: any pytree with its metadata, written whole or not at all, restored bit for bit.

A checkpoint is a folder step_00001000/ with one safetensors file per top-level key of the tree
(params.safetensors, …; tensors are named by their path in the tree, joined by ".") and meta.json:
format, step, metric, time, the size and SHA-256 of every file, and the caller's own metadata.
Several processes write one file each per key, with the parts that they hold. Remote folders (gs://,
s3://, hf://, …) hold the same files; there meta.json is uploaded last, and a folder without it is
no checkpoint.
"""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lib.files import (
    UserError,
    choose,
    filesystem,
    first_line,
    is_remote,
    join,
    reaching,
    replacing,
    sha256,
    writing,
)

KIND, FORMAT = "rawchat checkpoint", 1
NAME = re.compile(r"step_\d{8,}")
SHARE_TIMEOUT = 600  # seconds that processes wait for each other's files


# ---- the tree as named arrays --------------------------------------------------------------------


def _named(tree) -> dict:
    """Leaves by path; a dict key that holds a "." may make two paths alike, which no file could
    tell apart.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(
            "two leaves of the tree have the same path once its keys are joined by '.'"
        )
    return named


def _is_key(x) -> bool:
    if not hasattr(x, "dtype"):
        return False
    # public in jax's manual, not in its types
    return jax.dtypes.issubdtype(  # pyright: ignore[reportPrivateImportUsage]
        x.dtype, jax.dtypes.prng_key
    )


def _to_host(tree) -> tuple[dict, dict]:
    """Numpy copies by path of what this process is to write, and the shapes of the arrays that
    several processes hold parts of.

    Process 0 writes what it has the whole of. Of the others each writes the parts that it holds
    first, as "PATH@START,START".
    """
    named = {k: jax.random.key_data(x) if _is_key(x) else x for k, x in _named(tree).items()}
    split = {
        k: x
        for k, x in named.items()
        if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated
    }
    mine = {k: x for k, x in named.items() if k not in split} if jax.process_index() == 0 else {}
    for k, x in mine.items():
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            mine[k] = x.addressable_data(0)
    for k, x in split.items():
        for shard in x.addressable_shards:
            if shard.replica_id == 0:
                mine[f"{k}@{','.join(str(i.start or 0) for i in shard.index)}"] = shard.data
    host = {}
    for k, a in jax.device_get(mine).items():
        # On CPU device_get only shares the buffer, which the next train step is given to overwrite.
        shared = (
            not isinstance(mine[k], jax.Array)
            or next(iter(mine[k].sharding.device_set)).platform == "cpu"
        )
        host[k] = (np.array if shared else np.asarray)(a, order="C")
        if host[k].dtype.kind in "OUSM":
            raise TypeError(
                f"{k} is a {type(a).__name__}, not a number or array: put it in the metadata"
            )
    return host, {k: list(x.shape) for k, x in split.items()}


def _joined(arrays: dict, shapes: dict) -> dict:
    """The arrays with the parts that several processes wrote put together."""
    whole = {k: a for k, a in arrays.items() if "@" not in k}
    for key, part in arrays.items():
        name, _, starts = key.partition("@")
        if starts:
            whole.setdefault(name, np.empty(shapes[name], part.dtype))[
                tuple(slice(int(i), int(i) + n) for i, n in zip(starts.split(","), part.shape))
            ] = part
    return whole


def _top(name: str) -> str:
    """The file a leaf goes to: that of its top-level key, so that e.g. the parameters can be read
    alone.
    """
    top = re.match(r"(\w+)\.", name)
    return top[1] if top else "state"


def _stored(leaf):
    """Something with the shape and dtype that a leaf is stored with."""
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def nbytes(tree) -> int:
    """Bytes a checkpoint of `tree` takes; for arrays or ShapeDtypeStructs."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in map(_stored, jax.tree.leaves(tree)))


def _like(a, leaf):
    """The stored array `a` as the kind of thing the template's `leaf` is, with its sharding if it
    has one.
    """
    if isinstance(leaf, (bool, int, float)):
        return type(leaf)(a)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return a
    if leaf.sharding is None:
        array = jnp.asarray(a)
    else:
        # each host its own part
        array = jax.make_array_from_callback(a.shape, leaf.sharding, lambda index: a[index])
    if _is_key(leaf):
        impl = []
        # a ShapeDtypeStruct will do
        jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf)
        array = jax.random.wrap_key_data(array, impl=impl[0])
    return array


# ---- writing -------------------------------------------------------------------------------------


def save(folder, step: int, tree, meta: dict | None = None, *, keep: int = 3, metric=None):
    """Save `tree` and JSON-able `meta` as folder/step_NNNNNNNN and return its path, all at once;
    else like `Saver`.
    """
    with Saver(folder, keep) as saver:
        saver.save(step, tree, meta, metric)
        return saver.wait()


class Saver:
    """Saves in the background: `save` returns once the tree is copied to host memory, one save is
    written at a time.

    Kept are the `keep` newest checkpoints and the one with the lowest `metric` ever (a NaN is never
    best). An error met while writing is raised by the next `save` or `wait`; leaving the `with`
    block waits. Making a Saver checks that the folder can be written and has room for `size` bytes
    (as from `nbytes`), so that a run learns it before it computes. On several hosts all must call
    `save`, each writes what it holds, and the folder must be one that all share.
    """

    def __init__(self, folder, keep: int = 3, size: int = 0):
        if keep < 1:
            raise UserError(f"keep={keep} checkpoints would keep none: use 1 or more")
        self.folder, self.keep, self._job = folder, keep, None
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        if jax.process_index() == 0:
            _check_folder(folder, size)

    def save(self, step: int, tree, meta: dict | None = None, metric=None):
        self.wait()
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        record = {
            "kind": KIND,
            "format": FORMAT,
            "step": int(step),
            "metric": metric,
            "time": time.time(),
        }
        # a copy: the caller's cursor goes on meanwhile
        record["meta"] = json.loads(json.dumps(meta or {}))
        arrays, shapes = _to_host(tree)
        if jax.process_count() == 1:
            self._job = self._pool.submit(_write, self.folder, record, arrays, self.keep)
        else:
            # JAX has no float64 unless told
            time_of_0 = multihost_utils.broadcast_one_to_all(
                np.array([record["time"]]).view(np.uint32)
            )
            record |= {"split": shapes, "time": float(np.asarray(time_of_0).view(np.float64)[0])}
            self._job = self._pool.submit(_write_share, self.folder, record, arrays, self.keep)

    def wait(self):
        """Block until the running save, if any, is on disk; returns its path, or raises what it
        met.
        """
        job, self._job = self._job, None
        return job.result() if job else None

    def failure(self) -> BaseException | None:
        """What the last save met, once it has ended badly; None while it is well or under way.

        It is told once: a later `save` or `wait` doesn't raise it again.
        """
        if self._job is None or not self._job.done():
            return None
        error = self._job.exception()
        if error is not None:
            self._job = None
        return error

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._pool.shutdown(wait=True)
        self.wait()


def _check_folder(folder, size):
    fs, root = filesystem(folder)
    with reaching(folder):
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/.probe", b"probe")
        fs.rm_file(f"{root}/.probe")
    if is_remote(folder):
        return
    _tidy(Path(folder))
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"a checkpoint takes {size / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free in "
            f"{folder}: "
            "free some space or choose another folder"
        )


def path_of(folder, step: int):
    """Where in `folder` the checkpoint of a step stands."""
    return join(folder, f"step_{step:08d}")


def _write(folder, record, arrays, keep):
    target = path_of(folder, record["step"])
    if is_remote(folder):
        with tempfile.TemporaryDirectory() as tmp:
            with writing(tmp):
                _seal(Path(tmp), record, arrays)
            _upload(tmp, target, record["files"])
    else:
        with replacing(target) as tmp:
            tmp.mkdir()
            _seal(tmp, record, arrays)
    _prune(folder, target, keep)
    return target


def _seal(folder, record, arrays):
    record["files"] = _fill(folder, arrays)
    (folder / "meta.json").write_text(json.dumps(record, indent=1))


def _write_share(folder, record, arrays, keep):
    """`_write` on one of several processes: each leaves its files and a list of them, process 0 the
    record once all lists are there.
    """
    target = path_of(folder, record["step"])
    index, count = jax.process_index(), jax.process_count()
    # a name that all know and no earlier save had; remote folders have no rename, so parts go where
    # they stay
    place = target
    if not is_remote(folder):
        place = Path(folder) / f".{Path(target).name}.{record['time']:.6f}.tmp"

    def listed(i):
        return f"share-{record['time']:.6f}-{i}-of-{count}.json"

    with tempfile.TemporaryDirectory() as tmp, reaching(place):
        fs, root = filesystem(place)
        fs.makedirs(root, exist_ok=True)
        if index == 0 and fs.exists(f"{root}/meta.json"):
            fs.rm_file(f"{root}/meta.json")
        local = Path(tmp if is_remote(folder) else place)
        files = _fill(local, arrays, f".{index}-of-{count}")
        if is_remote(folder):
            for name in files:
                fs.put_file(f"{local}/{name}", f"{root}/{name}")
        fs.pipe_file(f"{root}/.{listed(index)}", json.dumps(files).encode())
        # whole or not there, for those who wait for it
        fs.mv(f"{root}/.{listed(index)}", f"{root}/{listed(index)}")
        if index:
            _await(
                lambda: _written(target) == record["time"],
                lambda: f"process 0 has not finished {target}",
            )
            return target

        def absent():
            missing = [i for i in range(count) if not fs.exists(f"{root}/{listed(i)}")]
            return ", ".join(map(str, missing))

        _await(
            lambda: (
                fs.invalidate_cache() or all(fs.exists(f"{root}/{listed(i)}") for i in range(count))
            ),
            lambda: f"process {absent()} has not written its share of {target}",
        )
        record["files"] = {}
        for i in range(count):
            record["files"] |= json.loads(fs.cat_file(f"{root}/{listed(i)}"))
            fs.rm_file(f"{root}/{listed(i)}")
        fs.pipe_file(f"{root}/meta.json", json.dumps(record, indent=1).encode())
    if not is_remote(folder):
        with replacing(target) as own:
            os.rename(place, own)
    _prune(folder, target, keep)
    return target


def _written(path):
    """When the checkpoint at `path` was written, None if there is none."""
    with contextlib.suppress(UserError):
        return _record(path)["time"]


def _await(there: Callable[[], bool], what: Callable[[], str]):
    deadline = time.monotonic() + SHARE_TIMEOUT
    while not there():
        if time.monotonic() > deadline:
            raise UserError(
                f"{what()} after {SHARE_TIMEOUT} s: all processes must call save, and the folder "
                "must be one that all hosts share"
            )
        time.sleep(0.05)


def _fill(folder, arrays, suffix="") -> dict:
    """Write the arrays into files of `folder`; {file: its size and checksum}."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    files = {}
    for top in sorted({_top(name) for name in arrays}):
        path = folder / f"{top}{suffix}.safetensors"
        try:
            save_file({name: a for name, a in arrays.items() if _top(name) == top}, path)
        except SafetensorError as e:  # this is how it tells of a full disk
            if code := re.search(r"os error (\d+)", str(e)):
                raise OSError(int(code[1]), str(e)) from e
            raise
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def _upload(local, target, files):
    fs, root = filesystem(target)
    with reaching(target):
        if fs.exists(f"{root}/meta.json"):
            fs.rm_file(f"{root}/meta.json")
        fs.makedirs(root, exist_ok=True)
        for name in [*files, "meta.json"]:
            fs.put_file(f"{local}/{name}", f"{root}/{name}")


def _tidy(folder):
    """Clear what a save killed halfway has left; put back the old folder if it was killed between
    the two renames.
    """
    for old in folder.glob(".step_*.old"):
        name = old.name[1:].partition(".")[0]
        if not (folder / name).exists():
            os.rename(old, folder / name)
    for stale in [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")]:
        shutil.rmtree(stale, ignore_errors=True)


def _prune(folder, written, keep):
    """Delete whole checkpoints that are neither among the `keep` newest nor the best; damaged ones
    are left alone.
    """
    whole = _whole(folder)
    kept = {str(path) for path, _ in whole[:keep]} | {str(written), str(_lowest(whole))}
    for path in (path for path, _ in whole if str(path) not in kept):
        with reaching(path):
            if is_remote(path):
                fs, root = filesystem(path)
                fs.rm_file(f"{root}/meta.json")
                fs.rm(root, recursive=True)
            else:
                # if killed now, the next run clears it away
                hidden = path.with_name(f".{path.name}.tmp")
                os.rename(path, hidden)
                shutil.rmtree(hidden)


# ---- finding and reading -------------------------------------------------------------------------


def _record(path) -> dict:
    """meta.json of a checkpoint whose files are all there in full length, or a UserError that says
    what is wrong.
    """
    fs, root = filesystem(path)
    with reaching(path):
        try:
            record = json.loads(fs.cat_file(f"{root}/meta.json"))
            if not isinstance(record, dict) or record.get("kind") != KIND:
                raise UserError(
                    f"{path} was not written by rawchat: name a folder step_NNNNNNNN that it has "
                    "written"
                )
            if record["format"] > FORMAT:
                raise UserError(
                    f"{path} has checkpoint format {record['format']}, newer than the {FORMAT} "
                    "known here: "
                    "update rawchat"
                )
            for name, file in record["files"].items():
                if not re.fullmatch(r"\w+(\.\d+-of-\d+)?\.safetensors", name):
                    raise ValueError(f"unexpected file {name!r}")
                size = fs.size(f"{root}/{name}") if fs.exists(f"{root}/{name}") else None
                if size != file["bytes"]:
                    found = (
                        "is missing"
                        if size is None
                        else f"has {size} bytes instead of {file['bytes']}"
                    )
                    raise UserError(
                        f"{path}/{name} {found}: delete this checkpoint and use an older one"
                    )
            return {key: record[key] for key in ("step", "metric", "time", "files", "meta")} | {
                "split": record.get("split", {})
            }
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path} is not a checkpoint (no meta.json in it): name a folder step_NNNNNNNN "
                "that "
                "rawchat has written"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}/meta.json is damaged: delete this checkpoint and use an older one"
            ) from None


@contextlib.contextmanager
def _verified(path, files):
    """Yield a local folder with the named files (fetched if remote), their checksums compared with
    the record's.
    """
    with tempfile.TemporaryDirectory() as tmp:
        local = Path(tmp if is_remote(path) else path)
        if is_remote(path):
            fs, root = filesystem(path)
            with reaching(path):
                for name in files:
                    fs.get_file(f"{root}/{name}", str(local / name))
        for name, file in files.items():
            if sha256(local / name) != file["sha256"]:
                raise UserError(
                    f"{path}/{name} does not match its checksum: delete this checkpoint, use an "
                    "older one"
                )
        yield local


def _scan(folder) -> list:
    """(path, record, or the UserError met) of every checkpoint, the one written last first."""
    fs, root = filesystem(folder)
    with reaching(folder):
        try:
            found = [p.rstrip("/").rpartition("/")[2] for p in fs.ls(root, detail=False)]
        except FileNotFoundError:
            found = []
    scanned = []
    for name in filter(NAME.fullmatch, found):
        path = join(folder, name)
        try:
            scanned.append((path, _record(path)))
        except UserError as e:
            scanned.append((path, e))
    # By time, not step: a run taken up again at step 500 makes the old step 1000 history. Damaged
    # ones come first.
    when = lambda r: (r["time"], r["step"]) if isinstance(r, dict) else (math.inf, 0)  # noqa: E731
    return sorted(scanned, key=lambda item: when(item[1]), reverse=True)


def _whole(folder) -> list:
    return [(path, record) for path, record in _scan(folder) if isinstance(record, dict)]


def _lowest(whole):
    rated = [(record["metric"], path) for path, record in whole if record["metric"] is not None]
    return min(rated, key=lambda item: item[0])[1] if rated else None


def latest(folder):
    """Path of the newest sound checkpoint in `folder`, None if there is none; warns about damaged
    ones it passes over.

    Local files are checked against their checksums, remote ones by size (`restore` checks what it
    fetches).
    """
    scanned = _scan(folder)
    for path, record in scanned:
        try:
            if isinstance(record, UserError):
                raise record
            with _verified(path, {} if is_remote(path) else record["files"]):
                return path
        except UserError as e:
            warnings.warn(f"passing over a checkpoint: {e}", stacklevel=2)
            last = e
    if scanned:
        raise UserError(f"no checkpoint of {len(scanned)} in {folder} can be used ({last})")
    return None


def best(folder):
    """Path of the checkpoint with the lowest metric in `folder`, None if none has a metric."""
    return _lowest(_whole(folder))


def restore(path, template=None, only: str | None = None):
    """(tree, meta) of a checkpoint, bit for bit; `meta` is the caller's own plus "step" and
    "metric".

    `path`: a checkpoint, a folder of them (the newest is taken) or a run folder with checkpoints/
    in it; may be remote. `template`: a tree of arrays, ShapeDtypeStructs and numbers; paths, shapes
    and dtypes must be the same as the stored ones, and arrays get the template's sharding. Without
    it nested dicts of numpy arrays come back (list positions are keys then, and random keys their
    raw data). `only`: read just this top-level key, e.g. "params"; tree and template are then what
    is under it.
    """
    from safetensors.numpy import load_file

    path = _resolve(path)
    record = _record(path)
    files = record["files"]
    if only:
        choose("part of the checkpoint", only, {f.partition(".")[0] for f in files})
        files = {f: entry for f, entry in files.items() if f.partition(".")[0] == only}
    arrays = {}
    with _verified(path, files) as local:
        for name in files:
            arrays |= load_file(local / name)
    arrays = _joined(arrays, record["split"])
    if only:
        arrays = {name.removeprefix(f"{only}."): a for name, a in arrays.items()}
    if template is None:
        return _nested(arrays), _meta(record)
    wanted = _named(template)
    _compare(path, arrays, wanted)
    leaves = [_like(arrays[k], x) for k, x in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(template), leaves), _meta(record)


def read_meta(path) -> dict:
    """The `meta` that `restore` would return, without reading any tensor."""
    return _meta(_record(_resolve(path)))


def _meta(record) -> dict:
    return record["meta"] | {"step": record["step"], "metric": record["metric"]}


def _resolve(path):
    """The checkpoint that `path` stands for."""
    fs, root = filesystem(path)
    with reaching(path):
        if NAME.fullmatch(root.rpartition("/")[2]) or fs.exists(f"{root}/meta.json"):
            return path
        folder = join(path, "checkpoints") if fs.isdir(f"{root}/checkpoints") else path
    if found := latest(folder):
        return found
    raise UserError(
        f"no checkpoint in {path}: train first, or name a run folder, its checkpoints folder or "
        "one of the "
        "step_NNNNNNNN in it"
    )


def _nested(arrays) -> dict:
    tree = {}
    for name, a in arrays.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = a
    return tree


def _compare(path, arrays, wanted):
    here, there = (
        {k: f"{s.dtype} {tuple(s.shape)}" for k, s in ((k, _stored(x)) for k, x in tree.items())}
        for tree in (wanted, arrays)
    )
    differ = [
        f"{k} is {there.get(k, 'missing')} in it and {here.get(k, 'missing')} here"
        for k in sorted(here | there)
        if here.get(k) != there.get(k)
    ]
    if differ:
        more = f" (and {len(differ) - 3} more)" if len(differ) > 3 else ""
        raise UserError(
            f"{path} does not fit: {', '.join(differ[:3])}{more}; use the config in its meta.json, "
            "or another checkpoint"
        )


# ---- Hugging Face Hub ----------------------------------------------------------------------------

# one at a time: two commits to a repository at once conflict
_uploads = ThreadPoolExecutor(1, "hub")


def check_hub(repo: str, token: str | None = None, private: bool = True):
    """Make the Hub model repository `repo` ("user/name") unless it exists; UserError if that is not
    allowed.
    """
    import huggingface_hub as hub

    try:
        hub.HfApi(token=token).create_repo(repo, private=private, exist_ok=True)
    except Exception as e:
        raise _hub_error(repo, e) from e


def _hub_error(repo, e) -> UserError:
    status = getattr(getattr(e, "response", None), "status_code", None)
    advice = (
        "the token is wrong, has run out or may not write there: make one with write access at "
        "https://huggingface.co/settings/tokens"
        if status in (401, 403)
        else "check the name and the network"
        if status is None or status >= 500
        else "check the name"
    )
    return UserError(f"cannot upload to the Hub repository {repo} ({first_line(e)}): {advice}")


def upload_to_hub(folder, repo: str, token: str | None = None, private: bool = True):
    """Upload the files of `folder` to the root of a Hub repository, in the background and as one
    commit.

    Returns a Future of the commit's address; a failure (wrong token, no network, the folder pruned
    meanwhile) is one printed sentence and the Future holds None. `restore("hf://user/name")` reads
    an uploaded checkpoint.
    """
    import huggingface_hub as hub

    def upload():
        try:
            check_hub(repo, token, private)
            return str(
                hub.HfApi(token=token).upload_folder(
                    repo_id=repo, folder_path=folder, commit_message=f"upload {Path(folder).name}"
                )
            )
        except Exception as e:
            print(f"warning: {e if isinstance(e, UserError) else _hub_error(repo, e)}")

    return _uploads.submit(upload)
