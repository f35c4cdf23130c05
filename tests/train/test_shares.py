"""Checkpoints that several processes write together: two threads stand for them here."""

import threading
import types

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
