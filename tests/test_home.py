"""lib/home.py: tabs on machines of their own share one home; nothing is lost on the way."""

import json

import fsspec
import pytest

from lib import home as homes
from lib.files import UserError
from lib.home import Mirror, open_home, pull

ADDRESS = "memory://bucket/home"


@pytest.fixture(autouse=True)
def bucket():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def machine(path):
    """A home as a machine of its own sees it: its own disk, the same bucket."""
    return open_home(ADDRESS)._replace(runs_dir=path / "runs")


def write(home, **files):
    for name, text in files.items():
        path = home.runs_dir / "mine" / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return home.runs_dir / "mine"


def send(home):
    mirror = Mirror(home, home.runs_dir / "mine")
    mirror.send()
    mirror.wait()


def test_a_second_machine_finds_what_the_first_one_left(tmp_path):
    first, second = machine(tmp_path / "1"), machine(tmp_path / "2")
    write(first, tokenizer_json="{}", checkpoints__step_1__meta_json="[1]")
    send(first)

    assert pull(second) == "mine"
    assert (second.runs_dir / "mine/tokenizer.json").read_text() == "{}"
    assert (second.runs_dir / "mine/checkpoints/step_1/meta.json").read_text() == "[1]"

    # and the other way round
    write(second, results_json="2")
    send(second)
    assert pull(first, "mine") == "mine"
    assert (first.runs_dir / "mine/results.json").read_text() == "2"


def test_what_was_pruned_goes_and_nothing_else(tmp_path, bucket):
    home = machine(tmp_path)
    run = write(home, a_json="1", b_json="2")
    send(home)
    (run / "a.json").unlink()
    send(home)
    names = [path.rpartition("/home/")[2] for path in bucket.find("/bucket/home")]
    assert sorted(names) == ["runs/mine/b.json", "runs/mine/manifest.json"]


def test_two_machines_on_one_run_are_refused_and_lose_nothing(tmp_path):
    first, second = machine(tmp_path / "1"), machine(tmp_path / "2")
    write(first, results_json="0")
    send(first)
    pull(second)
    write(first, results_json="1")
    send(first)
    write(second, results_json="2")
    with pytest.raises(UserError, match="both changed .*results.json"):
        pull(second, "mine")
    assert (second.runs_dir / "mine/results.json").read_text() == "2"


def test_only_what_changed_is_sent(tmp_path, monkeypatch):
    home = machine(tmp_path)
    write(home, a_json="1", b_json="2")
    send(home)
    sent = []
    change = homes.Bucket.change
    monkeypatch.setattr(
        homes.Bucket,
        "change",
        lambda self, new, gone: sent.append(set(new)) or change(self, new, gone),
    )
    send(home)
    assert sent == []
    write(home, b_json="3")
    send(home)
    assert sent == [{"runs/mine/b.json", "runs/mine/manifest.json"}]


def test_a_run_that_moves_to_another_home_is_sent_whole(tmp_path, bucket):
    """What the old home has says nothing of the new one."""
    home = machine(tmp_path / "1")
    run = write(home, tokenizer_json="{}", results_json="1")
    send(home)
    moved = home._replace(name="memory://other/home", remote="memory://other/home")
    Mirror(moved, run).wait()

    third = moved._replace(runs_dir=tmp_path / "3" / "runs")
    assert pull(third) == "mine"
    assert (third.runs_dir / "mine/tokenizer.json").read_text() == "{}"


def test_a_failed_upload_is_told_and_tried_again(tmp_path, monkeypatch, capsys):
    home = machine(tmp_path)
    write(home, a_json="1")
    mirror = Mirror(home, home.runs_dir / "mine")
    change = homes.Bucket.change

    def fail(*_):
        raise UserError("the bucket is gone")

    monkeypatch.setattr(homes.Bucket, "change", fail)
    mirror.send()
    mirror._thread.join()
    assert "tries again: the bucket is gone" in capsys.readouterr().out
    with pytest.raises(UserError, match="the bucket is gone"):
        mirror.wait()
    monkeypatch.setattr(homes.Bucket, "change", change)
    mirror.wait()
    assert pull(machine(tmp_path / "2")) == "mine"


def test_temporary_files_locks_and_links_stay(tmp_path, bucket):
    home = machine(tmp_path)
    run = write(home, a_json="1")
    (run / ".b.json.1234.tmp").write_text("half")
    (run / "run.lock").write_text("me")
    (tmp_path / "secret").write_text("not of this run")
    (run / "link").symlink_to(tmp_path / "secret")
    send(home)
    manifest = json.loads(bucket.cat_file("/bucket/home/runs/mine/manifest.json"))
    assert list(manifest["files"]) == ["a.json"]


def test_a_file_outside_the_run_is_refused(tmp_path, bucket):
    manifest = {"time": 1, "files": {"../../evil": "0"}}
    bucket.pipe_file("/bucket/home/runs/mine/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(UserError, match="outside it"):
        pull(machine(tmp_path))


def test_an_empty_home_has_no_run(tmp_path):
    assert pull(machine(tmp_path)) == ""
    assert pull(machine(tmp_path), "new") == "new"


def test_a_folder_is_a_home_and_is_tried_first(tmp_path):
    home = open_home(str(tmp_path / "drive"))
    assert home.runs_dir == tmp_path / "drive" / "runs"
    assert list((tmp_path / "drive").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        open_home(str(tmp_path / "file"))


def test_this_machine_is_the_default():
    assert open_home("") == homes.Home("", homes.Path("runs"), "")
    Mirror(open_home(""), "runs/none").wait()


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("drive", "home=drive is for Colab"),
        ("hub:nobody", "write hub:USER/NAME"),
        ("hub:me/mine", "needs the secret HF_TOKEN"),
        ("nowhere://bucket", "cannot reach"),
    ],
)
def test_bad_homes_are_one_sentence(name, sentence):
    with pytest.raises(UserError, match=sentence):
        open_home(name)


def test_drive_that_is_refused_is_one_sentence(monkeypatch, tmp_path):
    import sys
    import types

    def mount(_):
        raise ValueError("mount failed")

    colab = types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=mount)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(homes, "DRIVE_FOLDER", tmp_path / "none" / "rawchat")
    with pytest.raises(UserError, match="not mounted .mount failed.: allow it"):
        open_home("drive")
