import errno
import hashlib
import http.server
import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lib import files
from lib.files import Unreachable, UserError, filesystem
from lib.train import checkpoint, records, saving, trees
from lib.train.checkpoint import (
    Saver,
    best,
    check_hub,
    latest,
    nbytes,
    read_meta,
    restore,
    save,
    upload_to_hub,
)
from tests.helpers import programs

ROOT = Path(__file__).resolve().parents[2]


class State(NamedTuple):
    params: Any
    opt_state: Any
    step: Any


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    # NaNs too
    bits = lambda *shape: jnp.asarray(
        rng.integers(0, 2**16, shape, np.uint16).view(ml_dtypes.bfloat16)
    )
    params = {
        "wte": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        "blocks": {"wq": bits(2, 3, 4)},
        "scale": jnp.float32(1.5),
    }
    return State(
        params,
        ((jnp.zeros((0, 3)), None), [rng.normal(size=4), {"count": 7, "rate": 0.1, "on": True}]),
        jnp.int32(seed),
    )


def bits(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes()) for x in leaves]


def damage(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return (
        tmp_path / "checkpoints"
        if request.param == "local"
        else f"memory://{tmp_path.name}/checkpoints"
    )


def names(folder):
    return sorted(str(path).rpartition("/")[2] for path, _ in checkpoint.scan(folder))


# ---- round trip ----------------------------------------------------------------------------------


def test_round_trip_is_bitwise_for_every_kind_of_leaf(folder):
    state = make_state(3)
    meta = {"config": {"depth": 4}, "cursor": {"row": 2**60}, "loss": 0.1 + 0.2}
    path = save(folder, 1000, state, meta, metric=jnp.float32(1.5))
    assert str(path).endswith("/step_00001000")
    for template in (state, jax.eval_shape(lambda: state.params)):
        only = None if template is state else "params"
        got, got_meta = restore(path, template, only)
        assert bits(got) == bits(state if only is None else state.params)
        assert got_meta == meta | {"step": 1000, "metric": 1.5}
    assert read_meta(folder) == meta | {"step": 1000, "metric": 1.5}
    got, _ = restore(path, state)
    assert [type(x) for x in jax.tree.leaves(got)] == [type(x) for x in jax.tree.leaves(state)]
    plain, _ = restore(path)
    assert (
        bits(plain["params"]) == bits(state.params) and plain["opt_state"]["1"]["1"]["rate"] == 0.1
    )


def test_random_keys(tmp_path):
    tree = {"key": jax.random.split(jax.random.key(5, impl="rbg"), 3)}
    path = save(tmp_path, 1, tree)
    for template in (tree, jax.eval_shape(lambda: tree)):
        got, _ = restore(path, template)
        assert got["key"].dtype == tree["key"].dtype
        assert (jax.random.key_data(got["key"]) == jax.random.key_data(tree["key"])).all()


def test_template_sharding_is_used(tmp_path):
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    array = jax.device_put(jnp.arange(8.0), sharding)
    path = save(tmp_path, 1, {"w": array})
    got, _ = restore(path, {"w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)})
    assert got["w"].sharding == sharding and bits(got) == bits({"w": array})


def test_the_saved_state_is_that_of_the_call_though_buffers_are_donated_and_overwritten(
    tmp_path, monkeypatch
):
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    x, host, cursor = jnp.arange(300_000.0), np.zeros(1000), {"row": 1}
    want = np.asarray(x).tobytes()
    overwritten = threading.Event()
    write = safetensors.numpy.save_file

    def write_late(arrays, path):
        assert overwritten.wait(60)
        write(arrays, path)

    monkeypatch.setattr(safetensors.numpy, "save_file", write_late)
    with Saver(tmp_path) as saver:
        saver.save(1, {"x": x, "host": host}, cursor)
        for _ in range(3):
            x = step(x)
        x.block_until_ready()
        host[:] = 1
        cursor["row"] = 2
        overwritten.set()
    got, meta = restore(tmp_path, {"x": x, "host": host})
    assert np.asarray(got["x"]).tobytes() == want and not got["host"].any() and meta["row"] == 1
    files = latest(tmp_path) / "state.safetensors"
    before = files.read_bytes()
    step(got["x"]).block_until_ready()  # a restored array may be donated as well
    assert files.read_bytes() == before


def test_transposed_arrays_keep_their_values(tmp_path):
    a = np.arange(6.0).reshape(2, 3).T
    got, _ = restore(save(tmp_path, 1, {"a": a}))
    assert (got["a"] == a).all()


@pytest.mark.slow
def test_several_hosts_save_and_restore_arrays_split_in_every_way(tmp_path):
    count = 4
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    hosts = [programs.start("save_on_hosts", tmp_path, address, i, count) for i in range(count)]
    assert [host.wait(300) for host in hosts] == [0] * count
    tree, _ = restore(tmp_path)
    whole = np.arange(32.0).reshape(8, 4)
    assert set(tree) == {"rows", "columns", "both", "all"}
    assert all((array == whole).all() for array in tree.values())
    # each part was written once
    files = (tmp_path / "step_00000001").glob("state.*.safetensors")
    parts = [name for file in files for name in safetensors.numpy.load_file(file)]
    assert len(parts) == len(set(parts)) == 1 + 2 + count // 2 + count


# ---- what is kept --------------------------------------------------------------------------------


def test_keeps_the_newest_and_the_best_and_nan_is_never_best(folder):
    with Saver(folder, keep=2) as saver:
        for step, metric in enumerate([3.0, 1.0, float("nan"), 2.0, 2.5, None], 1):
            saver.save(step, {"w": np.full(3, step)}, metric=metric)
    assert names(folder) == ["step_00000002", "step_00000005", "step_00000006"]
    assert str(best(folder)).endswith("step_00000002") and str(latest(folder)).endswith(
        "step_00000006"
    )
    assert restore(latest(folder))[1]["metric"] is None
    assert restore(folder)[0]["w"][0] == 6


def test_a_run_taken_up_at_an_earlier_step_is_the_newest(tmp_path):
    save(tmp_path, 500, {"w": np.zeros(1)})
    save(tmp_path, 1000, {"w": np.zeros(1)})
    save(tmp_path, 600, {"w": np.ones(1)}, keep=2)
    assert latest(tmp_path).name == "step_00000600" and names(tmp_path) == [
        "step_00000600",
        "step_00001000",
    ]


@pytest.fixture
def clock(monkeypatch):
    """The machine's clock, as checkpoints see it: set(hours)."""
    now = [1e9]
    monkeypatch.setattr(saving.time, "time", lambda: now[0])

    def set_to(hours):
        now[0] = 1e9 + 3600 * hours

    return set_to


def test_a_clock_that_was_ahead_changes_nothing(folder, clock):
    clock(24)
    save(folder, 100, {"w": np.ones(1)})
    # set right, and the run goes on in another process
    clock(1)
    with Saver(folder) as saver:
        for step in (200, 300):
            saver.save(step, {"w": np.ones(1)})
    assert str(latest(folder)).endswith("step_00000300")
    times = [record.time for _, record in reversed(checkpoint.scan(folder))]
    assert times == sorted(set(times)) and times[0] == 1e9 + 24 * 3600
    assert len({record.began for _, record in checkpoint.scan(folder)}) == 1

    # taken up again at an earlier step: newer than all of before, whatever the clock says
    clock(0)
    save(folder, 150, {"w": np.ones(1)})
    assert str(latest(folder)).endswith("step_00000150")
    save(folder, 160, {"w": np.ones(1)})
    assert str(latest(folder)).endswith("step_00000160")
    assert restore(folder)[1]["step"] == 160


def test_within_a_training_the_last_step_is_the_newest(tmp_path, clock):
    clock(5)
    for step in (10, 20):
        save(tmp_path, step, {"w": np.ones(1)})
    # as if the clock had gone back between the two
    edit(time=1e9)(tmp_path / "step_00000020")
    assert latest(tmp_path).name == "step_00000020"


def test_checkpoints_that_tell_no_training_are_ordered_by_time(tmp_path, clock):
    for step, hours in ((500, 1), (1000, 2), (600, 3)):
        path = save(tmp_path, step, {"w": np.ones(1)}, keep=9)
        record = json.loads((path / "meta.json").read_text())
        del record["began"]
        (path / "meta.json").write_text(json.dumps(record | {"time": 1e9 + 3600 * hours}))
    assert latest(tmp_path).name == "step_00000600"
    clock(0)
    save(tmp_path, 700, {"w": np.ones(1)}, keep=9)
    assert latest(tmp_path).name == "step_00000700"


def test_saving_a_step_again_replaces_it(folder):
    for value in (1, 2):
        save(folder, 5, {"w": np.full(3, value)})
    assert names(folder) == ["step_00000005"] and restore(folder)[0]["w"][0] == 2


def test_restore_finds_the_checkpoint_of_a_run_folder(tmp_path):
    save(tmp_path / "run" / "checkpoints", 7, {"w": np.ones(2)})
    for path in ("run", "run/checkpoints", "run/checkpoints/step_00000007"):
        assert restore(str(tmp_path / path))[1]["step"] == 7
    assert latest(tmp_path / "run" / "none") is None and best(tmp_path / "run" / "none") is None


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep=0"):
        Saver(tmp_path, keep=0)


# ---- damage --------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path / "params.safetensors", 50)


def flip(path):
    damage(path / "params.safetensors")


def lose_file(path):
    (path / "params.safetensors").unlink()


def lose_meta(path):
    (path / "meta.json").unlink()


def cut_meta(path):
    os.truncate(path / "meta.json", 40)


def edit(**entries):
    def change(path):
        (path / "meta.json").write_text(
            json.dumps(json.loads((path / "meta.json").read_text()) | entries)
        )

    return change


def grow(path):
    with open(path / "params.safetensors", "ab") as f:
        f.write(b"more")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def promised_pipe(path):
    """A pipe of the size that meta.json promises: reading it would wait for ever."""
    replace_by_pipe(path / "params.safetensors")
    record = json.loads((path / "meta.json").read_text())
    record["files"]["params.safetensors"]["bytes"] = 0
    (path / "meta.json").write_text(json.dumps(record))


DAMAGE = {
    "truncated": (truncate, "params.safetensors has 50 bytes instead of"),
    "grown": (grow, "params.safetensors has .* bytes instead of"),
    "bit flipped": (flip, "params.safetensors does not match its checksum"),
    "file missing": (lose_file, "params.safetensors is missing"),
    "no meta": (lose_meta, "no meta.json"),
    "meta cut": (cut_meta, "meta.json is damaged"),
    "foreign": (edit(kind="other"), "not written by rawchat"),
    "foreign list": (lambda path: (path / "meta.json").write_text("[]"), "not written by rawchat"),
    "newer": (edit(format=99), "format 99, newer than .* update rawchat"),
    "path outside": (
        edit(files={"../x.safetensors": {"bytes": 1, "sha256": ""}}),
        "meta.json is damaged",
    ),
    "no files": (edit(files=None), "meta.json is damaged .files"),
    "no checksum": (
        edit(files={"params.safetensors": {"bytes": 1}}),
        "meta.json is damaged .files",
    ),
    "size is text": (
        edit(files={"params.safetensors": {"bytes": "1", "sha256": "0" * 64}}),
        "meta.json is damaged .files",
    ),
    "time is text": (edit(time="now"), "meta.json is damaged .time"),
    "step is null": (edit(step=None), "meta.json is damaged .step"),
    "metric is text": (edit(metric="low"), "meta.json is damaged .metric"),
    "meta is a list": (edit(meta=[1]), "meta.json is damaged .meta"),
    "format is text": (edit(format="1"), "meta.json is damaged .format"),
    "shapes of text": (edit(split={"x": ["a"]}), "meta.json is damaged .split"),
    "deep": (lambda path: (path / "meta.json").write_text('{"a":' * 200_000), "json is damaged"),
    "deep list": (lambda path: (path / "meta.json").write_text("[" * 200_000), "json is damaged"),
    "no text": (lambda path: (path / "meta.json").write_bytes(b"\xff\0"), "json is damaged"),
    "pipe for meta": (lambda path: replace_by_pipe(path / "meta.json"), "no ordinary file"),
    "pipe": (lambda path: replace_by_pipe(path / "params.safetensors"), "has 0 bytes instead"),
    "empty pipe": (lambda path: promised_pipe(path), "no ordinary file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_and_the_newest_good_one_offered(kind, tmp_path):
    harm, sentence = DAMAGE[kind]
    state = make_state()
    save(tmp_path, 1, state)
    bad = save(tmp_path, 2, state)
    harm(bad)
    with pytest.raises(UserError, match=sentence) as e:
        restore(bad, state)
    assert "\n" not in str(e.value)
    with pytest.warns(UserWarning, match=sentence):
        assert latest(tmp_path).name == "step_00000001"
    shutil.rmtree(tmp_path / "step_00000001")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no checkpoint of 1 in"):
        latest(tmp_path)


def forge(path, content: bytes, **entries):
    """Replace a checkpoint's params, with the checksum that belongs to them."""
    file = path / "params.safetensors"
    file.write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(files={file.name: entry}, **entries)(path)


HEADER = 2**62
FORGED = {
    "no safetensors": (b"x" * 100, {}),
    "endless header": (HEADER.to_bytes(8, "little") + b"{}", {}),
    "part without a start": ({"params.w@": np.ones(2)}, {"split": {"params.w": [2]}}),
    "start in words": ({"params.w@…": np.ones(2)}, {"split": {"params.w": [2]}}),
    "part of nothing": ({"params.w@0": np.ones(2)}, {}),
    "part of too much": ({"params.w@0": np.ones(2)}, {"split": {"params.w": [10**15]}}),
    "part outside": ({"params.w@7": np.ones(2)}, {"split": {"params.w": [2]}}),
    "too many axes": ({"params.w@0,0": np.ones(2)}, {"split": {"params.w": [2]}}),
    "below an array": ({"params.w": np.ones(2), "params.w.b": np.ones(2)}, {}),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_arrays_are_one_sentence(kind, tmp_path):
    content, entries = FORGED[kind]
    if isinstance(content, dict):
        content = safetensors.numpy.save(content)
    path = save(tmp_path, 1, {"params": {"w": np.ones(2)}})
    forge(path, content, **entries)
    with pytest.raises(UserError, match="step_00000001.*delete this checkpoint") as caught:
        restore(path, only="params")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_looked_for_again(tmp_path, monkeypatch):
    """A training goes on beside whoever loads its model."""
    save(tmp_path, 1, {"w": np.full(3, 1)})
    real, others = records.sha256, [2, 3]

    def slowly(path):
        if others:
            step = others.pop(0)
            save(tmp_path, step, {"w": np.full(3, step)}, keep=1)
        return real(path)

    monkeypatch.setattr(records, "sha256", slowly)
    tree, meta = restore(tmp_path)
    assert meta["step"] == tree["w"][0] == 3 and not others

    others += [4, 5]
    assert latest(tmp_path).name == "step_00000005"
    # named by its own path there is no other one
    with pytest.raises(checkpoint.Gone, match="step_00000001 is not a checkpoint"):
        restore(tmp_path / "step_00000001")


def test_a_checkpoint_that_is_a_link_can_be_read_and_pruned(tmp_path):
    elsewhere = save(tmp_path / "elsewhere", 1, {"w": np.ones(2)})
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "step_00000001").symlink_to(elsewhere)
    (tmp_path / "here" / "step_00000009").symlink_to(tmp_path / "nothing")
    assert restore(tmp_path / "here" / "step_00000001")[0]["w"].sum() == 2
    save(tmp_path / "here", 2, {"w": np.ones(2)}, keep=1)
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"step_00000002", "step_00000009"}
    assert restore(elsewhere)[0]["w"].sum() == 2


def test_no_probe_is_written_through_a_link(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".probe").symlink_to(tmp_path / "mine.txt")
    Saver(tmp_path / "store")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert [p.name for p in (tmp_path / "store").iterdir()] == [".probe"]


def test_remote_bit_flip_is_noticed(tmp_path):
    path = save("memory://b/run", 1, make_state())
    fs, root = filesystem(path)
    data = bytearray(fs.cat_file(f"{root}/params.safetensors"))
    data[-1] ^= 1
    fs.pipe_file(f"{root}/params.safetensors", bytes(data))
    with pytest.raises(
        UserError,
        match="memory://b/run/step_00000001/params.safetensors does not match its checksum",
    ):
        restore(path)
    fs.rm_file(f"{root}/meta.json")  # an upload that never ended
    with pytest.raises(UserError, match="no meta.json"):
        restore(path)
    fs.rm("/b", recursive=True)


MISFITS = {
    "shape": (
        lambda s: s._replace(step=np.zeros(2, np.int32)),
        r"step is int32 \(\) in it and int32 \(2,\) here",
    ),
    "dtype": (
        lambda s: s._replace(step=np.float32(0)),
        r"step is int32 \(\) in it and float32 \(\) here",
    ),
    "missing": (lambda s: s._replace(step=None), r"step is int32 \(\) in it and missing here"),
    "extra": (
        lambda s: s._replace(params=s.params | {"ve": jnp.ones(3)}),
        "params.ve is missing in it",
    ),
    "all": (lambda s: {"x": jnp.ones(1)}, r"\(and \d more\); use the config"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_template_that_does_not_fit_is_told_where(kind, tmp_path):
    change, sentence = MISFITS[kind]
    path = save(tmp_path, 1, make_state())
    with pytest.raises(UserError, match=f"step_00000001 does not fit: .*{sentence}"):
        restore(path, change(make_state()))


def test_foreign_and_missing_folders(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "model.safetensors"):
        with pytest.raises(UserError, match="no checkpoint in .*train first"):
            restore(path)
    with pytest.raises(UserError, match="step_00000009 is not a checkpoint"):
        restore(tmp_path / "step_00000009")
    save(tmp_path, 1, {"params": {"w": np.ones(1)}})
    with pytest.raises(
        UserError, match="unknown part of the checkpoint 'opt': choose one of params"
    ):
        restore(tmp_path, only="opt")


def test_what_is_no_array_is_refused_before_writing(tmp_path):
    for tree in ({"name": "x"}, {"o": np.array([object()])}):
        with pytest.raises(TypeError, match="put it in the metadata"):
            save(tmp_path, 1, tree)
    with pytest.raises(ValueError, match="same path"):
        save(tmp_path, 1, {"a.b": 1, "a": {"b": 2}})
    with pytest.raises(ValueError, match="a@0"):
        save(tmp_path, 1, {"a@0": 1})
    assert names(tmp_path) == []


# ---- failed saves --------------------------------------------------------------------------------


def test_full_disk_harms_nothing_and_is_told_at_the_next_call(tmp_path, monkeypatch):
    saver = Saver(tmp_path, keep=1)
    saver.save(1, make_state(1))
    saver.wait()

    def full(arrays, path):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as disk:
        disk.setattr(safetensors.numpy, "save_file", full)
        saver.save(2, make_state(2))
        with pytest.raises(UserError, match="step_00000002: the disk is full"):
            saver.save(3, make_state(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert bits(restore(tmp_path, make_state(1))[0]) == bits(make_state(1))
    saver.save(4, make_state(4))  # room again
    assert saver.wait().name == "step_00000004"


def test_a_failed_save_is_told_at_once_and_only_once(tmp_path, monkeypatch):
    saver, started = Saver(tmp_path), threading.Event()
    assert saver.failure() is None

    def lost(arrays, path):
        assert started.wait(60)
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    with monkeypatch.context() as disk:
        disk.setattr(safetensors.numpy, "save_file", lost)
        saver.save(1, make_state())
        assert saver.failure() is None  # under way: it does not wait
        started.set()
        while not (error := saver.failure()):
            time.sleep(0.01)
    assert re.fullmatch(r"cannot reach .*step_00000001: .*mount it again.*", str(error))
    assert isinstance(error, UserError)
    assert saver.failure() is None and saver.wait() is None
    # the place is back
    saver.save(2, make_state())
    assert saver.wait().name == "step_00000002" and saver.failure() is None


@pytest.mark.parametrize("code", ["EIO", "ENOTCONN", "ESTALE", "ETIMEDOUT"])
def test_a_place_that_went_away_is_one_sentence_wherever_it_is_met(tmp_path, monkeypatch, code):
    path = save(tmp_path, 1, {"w": np.ones(2)})
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    def lost(*args, **kwargs):
        raise error

    sentences = []
    for place, name in (
        (os, "stat"),
        (os, "scandir"),
        (os, "listdir"),
        (os, "makedirs"),
        (records, "sha256"),
        (shutil, "disk_usage"),
        (safetensors.numpy, "save_file"),
    ):
        with monkeypatch.context() as disk:
            disk.setattr(place, name, lost)
            disk.setattr(os, "mkdir", lost)
            for action in (
                lambda: restore(path),
                lambda: read_meta(tmp_path),
                lambda: save(tmp_path, 2, {"w": np.ones(2)}),
            ):
                try:
                    action()
                except UserError as e:
                    sentences.append(str(e))
    assert len(sentences) > 10
    assert all("does not answer: mount it again" in sentence for sentence in sentences)


def test_a_place_that_went_away_is_no_damage_to_pass_over(tmp_path, monkeypatch):
    """Otherwise a training would go on from an older checkpoint."""
    for step in (1, 2):
        save(tmp_path, step, {"w": np.ones(2)})
    real = records.sha256

    def lost(path):
        if "step_00000002" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(records, "sha256", lost)
    with pytest.raises(Unreachable, match="step_00000002"):
        latest(tmp_path)


def test_disk_without_room_is_known_before_the_run(tmp_path):
    assert nbytes({"a": jax.ShapeDtypeStruct((10, 2), jnp.bfloat16), "k": jax.random.key(0)}) == 48
    with pytest.raises(UserError, match=r"takes 1000000.0 GB but only .* GB are free"):
        Saver(tmp_path, size=10**15)


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        Saver(tmp_path / "file" / "checkpoints")

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(UserError, match="that file system is read-only"):
        Saver(tmp_path / "new")


@pytest.mark.parametrize(
    "address, sentence",
    [("gs://bucket/run", "gs://bucket .*install gcsfs"), ("foo://b", "foo://b .*not known: foo")],
)
def test_remote_that_cannot_be_had(address, sentence, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    # nor does it know the class of an earlier test
    registry = importlib.import_module("fsspec.registry")
    monkeypatch.delitem(registry._registry, "gs", raising=False)
    files._store.cache_clear()
    with pytest.raises(UserError, match=f"cannot reach {sentence}.*check the address"):
        Saver(address)


def test_remote_upload_that_breaks_leaves_the_older_one(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    folder = "memory://b/run"
    save(folder, 1, make_state(1))
    put = MemoryFileSystem.put_file

    def breaking(self, local, remote, **kwargs):
        if "opt_state" in remote:
            raise ConnectionError("network is gone")
        return put(self, local, remote, **kwargs)

    with monkeypatch.context() as network:
        network.setattr(MemoryFileSystem, "put_file", breaking)
        with pytest.raises(
            UserError, match="cannot reach memory://b/run/step_00000002 .network is gone"
        ):
            save(folder, 2, make_state(2))
    with pytest.warns(UserWarning, match="no meta.json"):
        assert latest(folder).endswith("step_00000001")
    assert latest(save(folder, 2, make_state(2)).rpartition("/")[0]).endswith("step_00000002")

    # nor does the meta.json of an earlier save stand over the files of a second that breaks
    with monkeypatch.context() as network:
        network.setattr(MemoryFileSystem, "put_file", breaking)
        with pytest.raises(UserError, match="network is gone"):
            save(folder, 2, make_state(5))
    fs, root = filesystem(folder)
    assert not fs.exists(f"{root}/step_00000002/meta.json")
    with pytest.warns(UserWarning, match="no meta.json"):
        assert latest(folder).endswith("step_00000001")
    filesystem(folder)[0].rm("/b", recursive=True)


@pytest.mark.slow
def test_kill_9_in_the_middle_of_saving(tmp_path):
    process = programs.start("save_slowly", tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    assert any(p.name.endswith(".tmp") for p in tmp_path.iterdir())
    tree, meta = restore(tmp_path)
    assert meta["step"] == 1 and tree["params"]["w"].sum() == 1000
    save(tmp_path, 3, tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path):
    path = save(tmp_path, 1, {"w": np.ones(3)})
    path.rename(tmp_path / ".step_00000001.0123abcd.old")
    (tmp_path / ".step_00000001.0123abcd.tmp").mkdir()
    Saver(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"] and restore(path)[0][
        "w"
    ].sum() == 3


# ---- Hub -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A Hub on the loopback interface that knows no token."""
    import huggingface_hub
    import huggingface_hub.constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    make = huggingface_hub.HfApi

    def at(port):
        monkeypatch.setattr(
            huggingface_hub, "HfApi", lambda token: make(f"http://127.0.0.1:{port}", token=token)
        )

    at(server.server_port)
    yield at
    server.shutdown()
    server.server_close()


def test_hub_with_a_wrong_token(hub, tmp_path, capsys):
    path = save(tmp_path, 1, {"w": np.ones(2)})
    with pytest.raises(
        UserError, match="cannot upload to the Hub repository me/model .*the token is wrong"
    ):
        check_hub("me/model", "hf_wrong")
    assert upload_to_hub(path, "me/model", "hf_wrong").result(60) is None
    out = capsys.readouterr().out
    assert "warning: cannot upload" in out and len(out.splitlines()) == 1


def test_hub_without_network(hub, tmp_path, capsys):
    hub(1)
    path = save(tmp_path, 1, {"w": np.ones(2)})
    assert upload_to_hub(path, "me/model", "hf_any").result(60) is None
    out = capsys.readouterr().out
    assert "check the name and the network" in out and len(out.splitlines()) == 1


@pytest.mark.parametrize("addressable, replicated", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_an_array_is_in_parts_where_no_process_has_the_whole(monkeypatch, addressable, replicated):
    class Leaf:
        is_fully_addressable, is_fully_replicated = bool(addressable), bool(replicated)

    monkeypatch.setattr(jax, "Array", Leaf)
    assert trees._is_in_parts(Leaf()) == (not addressable and not replicated)
