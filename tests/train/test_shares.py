"""Checkpoints that several processes write together: two threads stand for them here."""

import math
import threading
import types
from concurrent.futures import Future

import numpy as np
import pytest

from lib.files import UserError, filesystem, parse_json
from lib.train import saving
from lib.train.records import KIND


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return tmp_path / "checkpoints"
    return f"memory://{tmp_path.name}/checkpoints"


@pytest.fixture
def processes(monkeypatch):
    """Each thread is a process; `number.index` says which."""
    number = threading.local()
    monkeypatch.setattr(saving.jax, "process_count", lambda: 2)
    monkeypatch.setattr(saving.jax, "process_index", lambda: number.index)
    return number


def record(step, when):
    said = dict(kind=KIND, format=saving.FORMAT, step=step, metric=None, began=1.0, meta={})
    return said | dict(time=when, split={})


def write(processes, folder, step, when, keep=9, first=(1, 0)):
    """A save by two processes, begun in this order; what each of them returns."""
    ends = {}

    def process(index):
        processes.index = index
        arrays = {"params.a": np.full(3, index + when), "step": np.array(step)}
        try:
            ends[index] = saving._write_share(folder, record(step, when), arrays, keep)
        except UserError as e:
            ends[index] = e

    threads = [threading.Thread(target=process, args=[index]) for index in first]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def names(folder):
    fs, root = filesystem(folder)
    return sorted(path.rstrip("/").rpartition("/")[2] for path in fs.ls(root, detail=False))


@pytest.mark.parametrize("first", [(0, 1), (1, 0)])
def test_two_processes_write_one_checkpoint(folder, processes, first):
    ends = write(processes, folder, 5, 7.0, first=first)
    target = saving.path_of(folder, 5)
    assert ends == {0: target, 1: target}
    files = [f"{top}.{i}-of-2.safetensors" for top in ("params", "state") for i in (0, 1)]
    assert names(folder) == ["step_00000005"], "nothing else is left"
    assert names(target) == sorted(["meta.json", *files]), "no lists are left"
    # the record has the files of both, by their sizes and checksums
    fs, root = filesystem(target)
    written = parse_json(fs.cat_file(f"{root}/meta.json"), "meta.json")
    assert sorted(written["files"]) == sorted(files) and written["time"] == 7.0
    for name, about in written["files"].items():
        assert about["bytes"] == fs.size(f"{root}/{name}")
    assert len({about["sha256"] for about in written["files"].values()}) == 3


def test_the_same_step_again_replaces_what_was_there(folder, processes):
    write(processes, folder, 5, 7.0)
    write(processes, folder, 6, 8.0)
    assert write(processes, folder, 5, 9.0)[0] == saving.path_of(folder, 5)
    target = saving.path_of(folder, 5)
    assert saving._time_of(target) == 9.0 and len(names(target)) == 5
    assert names(folder) == ["step_00000005", "step_00000006"]
    # the older ones go
    write(processes, folder, 7, 10.0, keep=1)
    assert names(folder) == ["step_00000007"]
    assert saving._time_of(saving.path_of(folder, 6)) is None


def test_who_waits_in_vain_says_for_whom(folder, processes, monkeypatch):
    monkeypatch.setattr(saving, "SHARE_TIMEOUT", 0.1)
    for index, match in ((0, "process 1 has not written"), (1, "process 0 has not finished")):
        [end] = write(processes, folder, 5, 7.0 + index, first=(index,)).values()
        assert match in str(end) and "after 0.1 s" in str(end)
    assert saving._time_of(saving.path_of(folder, 5)) is None


def test_waiting_ends_when_it_is_there(monkeypatch):
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    clock.sleep = lambda seconds: now.append(now.pop() + seconds)
    monkeypatch.setattr(saving, "time", clock)
    looks = iter([False, False, True])
    saving._await(lambda: next(looks), None)
    assert now == [2 * saving.LOOK_EVERY]
    with pytest.raises(UserError, match="nobody after 600 s"):
        saving._await(lambda: False, lambda: "nobody")
    assert now[0] == pytest.approx(600, abs=1)


# ---- one process ---------------------------------------------------------------------------------


def test_what_does_not_fit_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    room = types.SimpleNamespace(free=5_000_000_000)
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda folder: room)
    saving._check_folder(tmp_path, 5_000_000_000)
    with pytest.raises(UserError, match=r"takes 7.5 GB but only 5.0 GB are free"):
        saving._check_folder(tmp_path, 7_500_000_000)
    assert list(tmp_path.iterdir()) == [], "nothing was left by the trial"


def test_remains_of_a_save_that_was_killed(tmp_path):
    for name in (".step_1.a.old", ".step_2.b.old", "step_2", ".step_3.c.tmp", ".other.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    saving._tidy(tmp_path)
    left = {path.name: (path / "from").read_text() for path in tmp_path.iterdir()}
    # the old one comes back only where no new one stands
    assert left == {"step_1": ".step_1.a.old", "step_2": "step_2", ".other.tmp": ".other.tmp"}


def test_files_by_their_top_level_key(tmp_path):
    tops = [saving._top(name) for name in ("params.a.b", "opt_state.0", "step", "params", "")]
    assert tops == ["params", "opt_state", "state", "state", "state"]
    arrays = {"params.a": np.ones(2), "params.b": np.ones(3), "step": np.array(1)}
    files = saving._fill(tmp_path, arrays, ".x")
    assert list(files) == ["params.x.safetensors", "state.x.safetensors"]
    for name, about in files.items():
        assert about["bytes"] == (tmp_path / name).stat().st_size
        assert about["sha256"] == saving.sha256(tmp_path / name)


def test_moments_never_go_back_and_a_lower_step_is_another_training(monkeypatch, tmp_path):
    clock = types.SimpleNamespace(now=50.0, time=lambda: clock.now)
    monkeypatch.setattr(saving, "time", clock)
    saver = saving.Saver(tmp_path)
    assert saver._moments(5) == (50.0, 50.0)
    clock.now = 60.0
    assert saver._moments(5) == (60.0, 50.0), "the same step again is the same training"
    clock.now = 10.0
    written, began = saver._moments(6)
    assert (written, began) == (60.0 + saving.TICK, 50.0)
    clock.now = 70.0
    assert saver._moments(4) == (70.0, 70.0)
    assert saver._moments(9)[1] == 70.0
    with pytest.raises(UserError, match="keep=0 checkpoints would keep none"):
        saving.Saver(tmp_path, keep=0)
    saving.Saver(tmp_path, keep=1)


def test_which_training_began_last_in_a_folder(tmp_path, monkeypatch):
    newest = types.SimpleNamespace(began=30.0, step=7, time=35.0)
    older = types.SimpleNamespace(began=10.0, step=9, time=50.0)
    monkeypatch.setattr(saving, "sound_ones", lambda folder: [("b", newest), ("a", older)])
    saver = saving.Saver(tmp_path)
    assert (saver._began, saver._step, saver._time) == (30.0, 7, 50.0)
    newest.began = 60.0
    assert saving.Saver(tmp_path)._time == 60.0
    monkeypatch.setattr(saving, "sound_ones", lambda folder: [])
    empty = saving.Saver(tmp_path)
    assert (empty._began, empty._step, empty._time) == (-math.inf, 0, -math.inf)
    # of several processes only the first looks, and tells the others
    monkeypatch.setattr(saving, "sound_ones", lambda folder: [("b", newest)])
    monkeypatch.setattr(saving.jax, "process_index", lambda: 1)
    assert saving.Saver(tmp_path)._began == -math.inf


@pytest.fixture
def written(monkeypatch):
    """What a Saver hands to the thread that writes, which writes nothing."""
    written = []

    def write(name):
        return lambda *given: written.append((name, *given)) or name

    for name in ("_write", "_write_share"):
        monkeypatch.setattr(saving, name, write(name))
    return written


def test_what_is_handed_to_the_background(tmp_path, monkeypatch, written):
    monkeypatch.setattr(saving.Saver, "_moments", lambda self, step: (20.0 + step, 10.0))
    saver, cursor = saving.Saver(tmp_path, keep=4), {"at": [1]}
    saver.save(np.int64(5), {"a": np.ones(2)}, {"cursor": cursor}, np.float32(2.5))
    cursor["at"].append(2)
    assert saver.wait() == "_write" and saver.wait() is None
    [(_, folder, record, arrays, keep)] = written
    assert (folder, keep, list(arrays)) == (tmp_path, 4, ["a"])
    assert record == dict(
        kind=KIND,
        format=saving.FORMAT,
        step=5,
        metric=2.5,
        time=25.0,
        began=10.0,
        meta={"cursor": {"at": [1]}},
    )
    saver.save(6, {"a": np.ones(2)})
    saver.wait()
    assert written[1][2]["metric"] is None and written[1][2]["meta"] == {}
    # each of several processes writes its share, and says how the whole is made of them
    monkeypatch.setattr(saving.jax, "process_count", lambda: 2)
    saver.save(7, {"a": np.ones(2)})
    assert saver.wait() == "_write_share" and "split" in written[2][2]


def test_how_a_save_has_ended_is_told_once(tmp_path):
    saver = saving.Saver(tmp_path)
    assert saver.failure() is saver.written() is saver.wait() is None
    saver._job = job = Future()
    assert saver.failure() is saver.written() is None and saver._job is job
    job.set_result("path")
    assert saver.failure() is None and saver.written() == "path" and saver.written() is None
    saver._job = job = Future()
    error = OSError("full")
    job.set_exception(error)
    assert saver.written() is None and saver.failure() is error
    assert saver.failure() is saver.wait() is None


def test_processes_take_over_the_times_of_the_first(monkeypatch):
    monkeypatch.setattr(saving.multihost_utils, "broadcast_one_to_all", lambda numbers: numbers)
    moments = [1764183600.123456, -math.inf]
    assert saving._from_first(moments) == moments


def test_what_is_kept(tmp_path, monkeypatch):
    checkpoints = [(tmp_path / name, None) for name in ("d", "c", "b", "a")]
    monkeypatch.setattr(saving, "sound_ones", lambda folder: checkpoints)
    monkeypatch.setattr(saving, "lowest", lambda checkpoints: tmp_path / "b")
    gone = []
    monkeypatch.setattr(saving, "_remove", lambda path: gone.append(path.name))
    for written, keep, removed in (("d", 1, "ca"), ("a", 1, "c"), ("d", 2, "a"), ("d", 4, "")):
        saving._prune(tmp_path, tmp_path / written, keep)
        assert "".join(gone) == removed
        gone.clear()


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    kept, link, plain = tmp_path / "kept", tmp_path / "step_1", tmp_path / "step_2"
    for folder in (kept, plain):
        folder.mkdir()
        (folder / "meta.json").write_text("{}")
    link.symlink_to(kept)
    saving._remove(link)
    saving._remove(plain)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "meta.json").exists()


class Remote:
    """A remote folder that only notes what is done in it."""

    def __init__(self, there=()):
        self.there, self.done = there, []

    def exists(self, path):
        return path in self.there

    def __getattr__(self, name):
        return lambda *paths, **options: self.done.append((name, *paths))


def test_a_remote_checkpoint_is_none_until_its_record_has_arrived(monkeypatch):
    for there, first in ((("root/meta.json",), [("rm_file", "root/meta.json")]), ((), [])):
        fs = Remote(there)
        monkeypatch.setattr(saving, "filesystem", lambda path, fs=fs: (fs, "root"))
        saving._upload("here", "s3://there", {"a": 1, "b": 2})
        sent = [("put_file", f"here/{name}", f"root/{name}") for name in ("a", "b", "meta.json")]
        assert fs.done == [*first, ("makedirs", "root"), *sent]
    fs.done.clear()
    saving._remove("s3://there")
    assert fs.done == [("rm_file", "root/meta.json"), ("rm", "root")]
