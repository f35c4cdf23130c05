"""lib/files.py: JSON that others can read, one reader, one way to read a path."""

import errno
import json
import os
import shlex
from pathlib import Path

import pytest

from lib import files
from lib.files import UserError, read_json, update_json

# ---- writing


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, why in (("pipe", "no ordinary file"), ("folder", "a folder stands there")):
        with pytest.raises(UserError, match=why):
            files.write_atomic(tmp_path / name, "x")
    with pytest.raises(UserError, match="no ordinary file"):
        files.write_json("/dev/null", {})
    with pytest.raises(UserError, match="too long"):
        files.write_atomic(tmp_path / ("x" * 999), "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


# ---- JSON


def test_json_on_disk_holds_no_nan(tmp_path):
    path = tmp_path / "results.json"
    value = dict(a=float("nan"), b=[1.5, float("inf")], c=(-float("inf"), dict(d="NaN")))
    files.write_json(path, value)
    assert "NaN" not in path.read_text().replace('"NaN"', "") and "Infinity" not in path.read_text()
    assert files.read_json(path) == dict(a=None, b=[1.5, None], c=[None, dict(d="NaN")])
    files.update_json(path, e=float("inf"))
    assert json.loads(path.read_text())["e"] is None


def test_nan_of_older_runs_is_read_as_nothing(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"val_bpb": Infinity, "loss": NaN}')
    assert files.read_json(path) == dict(val_bpb=None, loss=None)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"5", b"\xff\xfe\x00", b"\0" * 100, b"[" * 200_000, b'{"a":' * 200_000],
)
def test_damaged_json_is_one_sentence_with_a_cure(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    for read in (files.read_json, lambda path: files.update_json(path, a=1)):
        with pytest.raises(UserError, match="results.json.*: delete it and run again") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        ("pipe", "no ordinary file"),
        ("none", "No such file"),
        (".", "ordinary"),
    ):
        for read in (files.read_json, files.read_text, files.read_bytes):
            with pytest.raises(UserError, match=message):
                read(tmp_path / path)


@pytest.mark.parametrize("code", ["EIO", "ENOTCONN", "ESTALE", "ETIMEDOUT"])
def test_a_lost_mount_is_one_sentence(tmp_path, code):
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    for context in (files.writing, files.reading, files.reaching):
        with pytest.raises(files.Unreachable, match="cannot reach .*place: .*mount it") as caught:
            with context(tmp_path / "place"):
                raise error
        assert "\n" not in str(caught.value)


# ---- whole files


@pytest.fixture
def journal(monkeypatch):
    """What is synced to the disk and renamed, in this order."""
    events = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def synced(fd):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
        fsync(fd)

    def moved(move):
        def spy(old, new):
            events.append(("move", os.path.basename(new)))
            move(old, new)

        return spy

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", moved(replace))
    monkeypatch.setattr(os, "rename", moved(rename))
    return events


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, journal):
    files.write_atomic(tmp_path / "a.json", "{}")
    (sync, tmp), move, folder = journal
    assert sync == "sync" and tmp.startswith(".a.json.") and tmp.endswith(".tmp")
    assert move == ("move", "a.json") and folder == ("sync", tmp_path.name)


def test_so_is_a_folder_with_all_that_is_in_it(tmp_path, journal):
    for _ in range(2):  # the second time it replaces one
        with files.replacing(tmp_path / "step") as tmp:
            (tmp / "sub").mkdir(parents=True)
            for name in ("a", "sub/b"):
                (tmp / name).write_text(name)
        named = journal.index(("move", "step"))
        assert {name for kind, name in journal[:named]} >= {"a", "b", "sub"}
        assert journal[-1] == ("sync", tmp_path.name) and journal.index(journal[-1]) > named
        journal.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


# ---- paths


@pytest.fixture
def folder(tmp_path):
    """A folder with a hidden file, a linked folder, a loop, a dead link and a pipe."""
    folder = tmp_path / "a"
    (folder / "sub/.hidden").mkdir(parents=True)
    for name in ("1.txt", "sub/2.txt", ".3.txt", "sub/.hidden/4.txt"):
        (folder / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/5.txt").write_text("5")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "sub/loop").symlink_to(folder)
    (folder / "dead.txt").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe.txt")
    return folder


def names(paths, folder):
    return sorted(str(path.relative_to(folder)) for path in paths)


def test_a_folder_is_read_through_links_and_without_what_is_hidden(folder):
    assert names(files.find_files(folder), folder) == ["1.txt", "link/5.txt", "sub/2.txt"]
    assert files.find_files(f"{folder}/") == files.find_files(folder)


def test_globs_and_homes(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert names(files.find_files("~/a/*.txt"), folder) == ["1.txt"]
    assert names(files.find_files("~/a/**/*.txt"), folder)[:2] == ["1.txt", "link/5.txt"]
    assert files.find_files("~/a/1.txt") == [folder / "1.txt"]
    assert files.find_files(folder / "pipe.txt") == files.find_files("~/none") == []
    with pytest.raises(UserError, match="whose home"):
        files.local_path("~nobody-of-that-name/x")


def test_variables_and_addresses(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert (
        files.local_path("$PLACE/a b") == files.path_or_address("${PLACE}/a b") == tmp_path / "a b"
    )
    assert files.local_path("$NOWHERE/a") == Path("$NOWHERE/a")
    # what is there under that very name
    (tmp_path / "$PLACE").mkdir()
    assert files.local_path("$PLACE") == Path("$PLACE")
    assert files.path_or_address("gs://bucket/~/$PLACE") == "gs://bucket/~/$PLACE"


def test_a_name_that_looks_like_a_glob_is_a_name_first(tmp_path):
    path = tmp_path / "My notes [2024].txt"
    path.write_text("mine")
    (tmp_path / "My notes 2.txt").write_text("another")
    assert files.find_files(path) == [path]
    path.unlink()
    assert names(files.find_files(path), tmp_path) == ["My notes 2.txt"]


def test_commands_are_printed_for_a_shell():
    words = ["python", "03_worker.py", "--store", "My Drive/it's"]
    assert shlex.split(files.quoted(*words)) == words
    assert files.quoted("a", 1, 2.5) == "a 1 2.5"


def test_an_object_on_disk_is_begun_and_added_to(tmp_path):
    path = tmp_path / "results.json"
    assert update_json(path, a=1, b=[2]) == {"a": 1, "b": [2]}
    assert update_json(path, b=3) == {"a": 1, "b": 3} == read_json(path)
