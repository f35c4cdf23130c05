"""lib/home.py: tabs on machines of their own share one home; nothing is lost on the way."""

import json
import threading

import fsspec
import numpy as np
import pytest

from lib import data, runs, runtime
from lib import home as homes
from lib.data import tokens
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.home import Mirror, open_home, pull
from lib.runs import enter

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


# ---- asked once ----------------------------------------------------------------------------------


@pytest.fixture
def nobody_answered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(homes.VARIABLE, raising=False)


@pytest.mark.usefixtures("nobody_answered")
def test_what_one_notebook_was_told_the_next_ones_take(tmp_path, capsys):
    place = str(tmp_path / "drive")
    first, _ = enter(place, "mine")
    second, mirror = enter("", "mine")
    assert first == second == tmp_path / "drive" / "runs" / "mine"
    assert mirror.home.name == place
    assert f"home: {place}, as the last notebook here was given" in capsys.readouterr().out

    # and back to this machine, which is remembered too
    assert enter(".", "mine")[0] == homes.Path("runs/mine")
    assert enter("", "mine")[0] == homes.Path("runs/mine")


@pytest.mark.usefixtures("nobody_answered")
def test_a_home_that_cannot_be_used_is_not_remembered(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        enter(str(tmp_path / "file"), "mine")
    assert homes.settled("") == ""


@pytest.mark.usefixtures("nobody_answered")
def test_the_environment_answers_for_all_notebooks_and_a_form_is_heard_first(monkeypatch, capsys):
    homes.remember("gs://bucket/remembered")
    monkeypatch.setenv(homes.VARIABLE, " gs://bucket/set ")
    assert homes.settled("", runtime.environment(homes.VARIABLE)) == "gs://bucket/set"
    assert "by RAWCHAT_HOME of the environment" in capsys.readouterr().out
    assert homes.settled("gs://bucket/given", "gs://bucket/set") == "gs://bucket/given"
    assert homes.settled("") == "gs://bucket/remembered"


@pytest.mark.usefixtures("nobody_answered")
def test_a_secret_answers_on_each_runtime(tmp_path, monkeypatch, capsys):
    place = str(tmp_path / "drive")
    # a script has no secrets to ask for
    _, mirror = enter("", "mine", secret={"RAWCHAT_HOME": place}.get)
    assert mirror.home.name == capsys.readouterr().out == ""

    monkeypatch.setattr(runs, "host", lambda: "colab")
    enter("", "mine")
    assert "are lost with it: give a home" in capsys.readouterr().out
    _, mirror = enter("", "mine", secret={"RAWCHAT_HOME": place}.get)
    assert mirror.home.name == place
    assert "by the secret RAWCHAT_HOME" in capsys.readouterr().out


# ---- token shards --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words():
    return Tokenizer.train(["to be or not to be " * 20], 270)


@pytest.fixture
def text(tmp_path):
    lines = [json.dumps({"text": f"line {i} of the text"}) for i in range(400)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "text.jsonl")


def opened(text, words, cache, shelf):
    """A text's tokens on a machine of its own, all of its shards kept at home."""
    tokens = data.open_tokens(text, "train", words, cache_dir=cache, shelf=shelf)
    shards = [np.array(shard.ids) for shard in tokens]
    for thread in threading.enumerate():
        if thread.name.endswith("(_work)"):
            thread.join(20)
    return np.concatenate(shards)


@pytest.mark.parametrize("where", ["bucket", "folder"])
def test_a_machine_that_takes_over_does_not_tokenise_anew(
    where, tmp_path, text, words, monkeypatch, capsys
):
    home = open_home(ADDRESS if where == "bucket" else str(tmp_path / "drive"))
    first = opened(text, words, tmp_path / "one", Mirror(home, tmp_path / "run").shelf())

    monkeypatch.setattr(tokens, "_tokenise_apart", lambda *_: pytest.fail("tokenised anew"))
    again = opened(text, words, tmp_path / "two", Mirror(home, tmp_path / "run").shelf())
    assert first.tolist() == again.tolist()
    assert f"token shards come from {home.name}" in capsys.readouterr().out


def test_a_damaged_shard_is_made_anew_and_sent_again(tmp_path, text, words, bucket):
    shelf = lambda: Mirror(open_home(ADDRESS), tmp_path / "run").shelf()  # noqa: E731
    first = opened(text, words, tmp_path / "one", shelf())
    [name] = bucket.find("/bucket/home/tokens")
    whole = bucket.cat_file(name)
    bucket.pipe_file(name, whole[:-9])
    assert opened(text, words, tmp_path / "two", shelf()).tolist() == first.tolist()
    assert bucket.cat_file(name) == whole


def test_a_home_that_is_full_of_shards_or_gone_says_so_once(
    tmp_path, text, words, bucket, monkeypatch, capsys
):
    monkeypatch.setattr(homes, "KEPT_SHARDS", 0)
    shelf = Mirror(open_home(ADDRESS), tmp_path / "run").shelf()
    opened(text, words, tmp_path / "one", shelf)
    assert not bucket.find("/bucket/home/tokens")
    assert "keeps 0 token shards" in capsys.readouterr().out

    monkeypatch.setattr(homes.Bucket, "names", lambda self: raise_gone())
    shelf = Mirror(open_home(ADDRESS), tmp_path / "run").shelf()
    assert opened(text, words, tmp_path / "two", shelf).size
    assert capsys.readouterr().out.count("the bucket is gone") == 1


def raise_gone():
    raise UserError("the bucket is gone")


def test_this_machine_has_no_shelf_and_one_process_of_many_sends(tmp_path, text, words, bucket):
    assert Mirror(open_home(""), tmp_path / "run").shelf() is None
    shelf = Mirror(open_home(ADDRESS), tmp_path / "run").shelf(sends=False)
    opened(text, words, tmp_path / "one", shelf)
    assert not bucket.find("/bucket/home/tokens")
