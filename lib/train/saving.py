"""Writing checkpoints in the background, whole or not at all, and clearing old ones away.

A local checkpoint is written beside its place and renamed into it. Remote folders have no rename:
there meta.json is taken away first and uploaded last, and a folder without it is no checkpoint.
"""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lib.files import (
    UserError,
    filesystem,
    is_remote,
    parse_json,
    reaching,
    replacing,
    save_tensors,
    sha256,
    to_json,
    writing,
)
from lib.train.records import FORMAT, KIND, lowest, path_of, read_record, sound_ones
from lib.train.trees import to_host

SHARE_TIMEOUT = 600  # seconds that processes wait for each other's files
LOOK_EVERY = 0.05  # seconds between two looks whether they are there
TICK = 0.001  # seconds that two moments of one folder are apart at least


class Saver:
    """Saves in the background: `save` returns once the tree is copied to host memory.

    One save is written at a time. Kept are the `keep` newest checkpoints and the one with the
    lowest `metric` ever (a NaN is never best). An error met while writing is told once: by
    `failure`, or raised by the next `save` or `wait`; leaving the `with` block waits. Making a
    Saver checks that the folder can be written and has room for `size` bytes (as from `nbytes`), so
    that a run learns it before it computes. On several hosts all must call `save`, each writes what
    it holds, and the folder must be one that all share.
    """

    def __init__(self, folder, keep: int = 3, size: int = 0):
        if keep < 1:
            raise UserError(f"keep={keep} checkpoints would keep none: use 1 or more")
        self.folder, self.keep = folder, keep
        self._job: Future | None = None
        self._pool = ThreadPoolExecutor(1, "checkpoint")

        # process 0 knows what is there, and tells the others when they save
        self._began, self._step, self._time = -math.inf, 0, -math.inf
        if jax.process_index() == 0:
            _check_folder(folder, size)
            self._look_back()

    def _look_back(self):
        """Remember which training began last in this folder, its last step, and the last time."""
        # newest first
        records = [record for _, record in sound_ones(self.folder)]
        if records:
            self._began, self._step = records[0].began, records[0].step
            self._time = max(max(record.time, record.began) for record in records)

    def save(self, step: int, tree, meta: dict | None = None, metric=None):
        """Copy `tree` and begin to write it as the checkpoint of `step`, with JSON-able `meta`."""
        self.wait()
        arrays, shapes = to_host(tree)
        written, began = self._moments(int(step))
        record = {
            "kind": KIND,
            "format": FORMAT,
            "step": int(step),
            # a NaN is kept as none, and rates nothing
            "metric": None if metric is None else float(metric),
            "time": written,
            "began": began,
            # a copy: the caller's cursor goes on meanwhile
            "meta": json.loads(to_json(meta or {})),
        }
        # here the background begins
        write = _write
        if jax.process_count() > 1:
            record["split"] = shapes
            write = _write_share
        self._job = self._pool.submit(write, self.folder, record, arrays, self.keep)

    def _moments(self, step: int) -> tuple[float, float]:
        """When a checkpoint is written and when its training began, by this folder's own clock.

        It never goes back, whatever the machine's does. A step below the newest one is another
        training, taken up again from an earlier checkpoint or begun anew.
        """
        now = max(time.time(), self._time + TICK)
        if step < self._step or self._began == -math.inf:
            self._began = now
        if jax.process_count() > 1:
            now, self._began = _from_first([now, self._began])
        self._step, self._time = step, now
        return now, self._began

    def wait(self):
        """Block until the running save, if any, is on disk.

        Returns its path, or raises what it met.
        """
        job, self._job = self._job, None
        return job.result() if job else None

    def failure(self) -> BaseException | None:
        """What the last save met, once it has ended badly; None while it is well or under way.

        This looks and does not wait. It is told once: no later `save` or `wait` raises it again.
        """
        if self._job is None or not self._job.done():
            return None
        error = self._job.exception()
        if error is not None:
            self._job = None
        return error

    def written(self):
        """The path of a save that has been written and was not told of yet, else None.

        This looks and does not wait.
        """
        if self._job is None or not self._job.done() or self._job.exception() is not None:
            return None
        job, self._job = self._job, None
        return job.result()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._pool.shutdown(wait=True)
        self.wait()


def _from_first(numbers: list[float]) -> list[float]:
    """The numbers of process 0, on all."""
    # as pairs of integers: JAX has no float64 unless told
    halves = np.array(numbers, np.float64).view(np.uint32)
    told = np.asarray(multihost_utils.broadcast_one_to_all(halves))
    return told.view(np.float64).tolist()


# ---- the folder ----------------------------------------------------------------------------------


def _check_folder(folder, size: int):
    """UserError where nothing can be written or there is no room; clears old remains away."""
    fs, root = filesystem(folder)
    # a name that no link can be waiting under
    probe = f"{root}/.probe-{uuid.uuid4().hex[:8]}"
    with reaching(folder):
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(probe, b"probe")
        fs.rm_file(probe)
    if is_remote(folder):
        return

    with reaching(folder):
        _tidy(Path(folder))
        free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"a checkpoint takes {size / 1e9:.1f} GB but only {free / 1e9:.1f} GB are free in "
            f"{folder}: free some space or choose another folder"
        )


def _tidy(folder: Path):
    """Clear what a save killed halfway has left."""
    # killed between the two renames of a replacement: the old one is put back
    for old in folder.glob(".step_*.old"):
        name = old.name[1:].partition(".")[0]
        if not (folder / name).exists():
            os.rename(old, folder / name)
    for stale in [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.old")]:
        shutil.rmtree(stale, ignore_errors=True)


def _prune(folder, written, keep: int):
    """Delete whole checkpoints that are neither among the `keep` newest nor the best.

    Damaged ones are left alone.
    """
    checkpoints = sound_ones(folder)
    # what was written just now stays, even if an older one counts as newer
    kept = {str(path) for path, _ in checkpoints[:keep]}
    kept |= {str(written), str(lowest(checkpoints))}
    for path, _ in checkpoints:
        if str(path) not in kept:
            with reaching(path):
                _remove(path)


def _remove(path):
    """Delete a checkpoint in such a way that what is left of it, if killed now, is none."""
    if is_remote(path):
        fs, root = filesystem(path)
        fs.rm_file(f"{root}/meta.json")
        fs.rm(root, recursive=True)
        return

    # the next run clears it away
    hidden = path.with_name(f".{path.name}.tmp")
    os.rename(path, hidden)
    if hidden.is_symlink():
        hidden.unlink()
    else:
        shutil.rmtree(hidden)


# ---- one process ---------------------------------------------------------------------------------


def _write(folder, record: dict, arrays: dict, keep: int):
    """Write a checkpoint and prune the others; returns its path."""
    target = path_of(folder, record["step"])
    if is_remote(folder):
        with tempfile.TemporaryDirectory() as local:
            with writing(local):
                _seal(Path(local), record, arrays)
            _upload(local, target, record["files"])
    else:
        with replacing(target) as tmp:
            tmp.mkdir()
            _seal(tmp, record, arrays)
    _prune(folder, target, keep)
    return target


def _seal(folder: Path, record: dict, arrays: dict):
    """Fill a folder with the arrays' files and, last, the record of them."""
    record["files"] = _fill(folder, arrays)
    (folder / "meta.json").write_text(to_json(record))


def _fill(folder: Path, arrays: dict, suffix: str = "") -> dict:
    """Write the arrays into files of `folder`; {file: its size and checksum}."""
    # one file for each top-level key
    by_file: dict[str, dict] = {}
    for name, array in arrays.items():
        by_file.setdefault(_top(name), {})[name] = array

    files = {}
    for top, content in sorted(by_file.items()):
        path = folder / f"{top}{suffix}.safetensors"
        save_tensors(content, path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files


def _top(name: str) -> str:
    """The file a leaf goes to: that of its top-level key, so that parameters can be read alone."""
    top = re.match(r"(\w+)\.", name)
    return top[1] if top else "state"


def _upload(local, target, files: dict):
    """Send a checkpoint's files; until meta.json has arrived, none stands there."""
    fs, root = filesystem(target)
    with reaching(target):
        if fs.exists(f"{root}/meta.json"):
            fs.rm_file(f"{root}/meta.json")
        fs.makedirs(root, exist_ok=True)
        for name in [*files, "meta.json"]:
            fs.put_file(f"{local}/{name}", f"{root}/{name}")


# ---- several processes ---------------------------------------------------------------------------


def _write_share(folder, record: dict, arrays: dict, keep: int):
    """`_write` on one of several processes.

    Each leaves its files and a list of them; process 0 adds the record once all lists are there.
    """
    target = path_of(folder, record["step"])
    # a name that all know and no earlier save had; remote parts go where they stay
    place = target
    if not is_remote(folder):
        place = Path(folder) / f".{Path(target).name}.{record['time']:.6f}.tmp"

    with reaching(place):
        _leave(place, record, arrays)
        if jax.process_index():
            _await(
                lambda: _time_of(target) == record["time"],
                lambda: f"process 0 has not finished {target}",
            )
            return target
        _collect(place, target, record)

    if not is_remote(folder):
        with replacing(target) as own:
            os.rename(place, own)
    _prune(folder, target, keep)
    return target


def _list_name(record: dict, index: int) -> str:
    """The file in which a process lists its files of a save."""
    return f"share-{record['time']:.6f}-{index}-of-{jax.process_count()}.json"


def _leave(place, record: dict, arrays: dict):
    """Write this process's files into `place`, and then the list of them."""
    fs, root = filesystem(place)
    index, count = jax.process_index(), jax.process_count()
    fs.makedirs(root, exist_ok=True)
    # from here on no checkpoint stands there until all is new
    if index == 0 and fs.exists(f"{root}/meta.json"):
        fs.rm_file(f"{root}/meta.json")

    # the files, by way of this machine's disk where the place is remote
    with tempfile.TemporaryDirectory() as tmp:
        local = Path(tmp if is_remote(place) else place)
        files = _fill(local, arrays, f".{index}-of-{count}")
        if is_remote(place):
            for name in files:
                fs.put_file(f"{local}/{name}", f"{root}/{name}")

    # whole or not there, for those who wait for it
    name = _list_name(record, index)
    fs.pipe_file(f"{root}/.{name}", to_json(files).encode())
    fs.mv(f"{root}/.{name}", f"{root}/{name}")


def _collect(place, target, record: dict):
    """Wait for the lists of all processes and write the record of all their files."""
    fs, root = filesystem(place)
    lists = {i: f"{root}/{_list_name(record, i)}" for i in range(jax.process_count())}

    def missing() -> list[str]:
        fs.invalidate_cache()
        return [str(i) for i, path in lists.items() if not fs.exists(path)]

    _await(
        lambda: not missing(),
        lambda: f"process {', '.join(missing())} has not written its share of {target}",
    )
    # one record of them all, which makes it a checkpoint
    record["files"] = {}
    for path in lists.values():
        record["files"] |= parse_json(fs.cat_file(path), path)
        fs.rm_file(path)
    fs.pipe_file(f"{root}/meta.json", to_json(record).encode())


def _time_of(path) -> float | None:
    """When the checkpoint at `path` was written, None if there is none."""
    with contextlib.suppress(UserError):
        return read_record(path).time
    return None


def _await(is_there: Callable[[], bool], complaint: Callable[[], str]):
    """Wait for another process; UserError after SHARE_TIMEOUT."""
    deadline = time.monotonic() + SHARE_TIMEOUT
    while not is_there():
        if time.monotonic() > deadline:
            raise UserError(
                f"{complaint()} after {SHARE_TIMEOUT} s: all processes must call save, and the "
                "folder must be one that all hosts share"
            )
        time.sleep(LOOK_EVERY)
