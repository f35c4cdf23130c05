"""Workers that share a folder, killed at random: nothing is lost, nothing is done twice."""

import json
import math
import os
import random
import resource
import subprocess
import threading
import time

import pytest

from lib.files import UserError
from lib.sweeps import drivers, journal, space
from lib.sweeps.journal import Journal
from tests.helpers import programs
from tests.helpers.sweeps import sweep


@pytest.mark.slow
def test_workers_killed_at_random_lose_and_double_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "TRIES", 1000)
    spec = sweep(parameters={"depth": {"values": list(range(1, 13))}, "seed": {"values": [1, 2]}})
    journal.create(tmp_path, spec)
    # nothing ends until four were killed at work, however slow the machine is
    (tmp_path / "hold").touch()
    rng = random.Random(0)

    def start(n):
        return programs.start("sweep_worker", tmp_path, n, stdout=subprocess.PIPE)

    workers = [start(n) for n in range(3)]
    for killed in range(4):
        victim = rng.randrange(3)
        assert workers[victim].stdout.readline(), "it has begun a trial"
        time.sleep(0.4 * rng.random())
        workers[victim].kill()  # SIGKILL: no clean-up of any kind
        workers[victim].wait()
        workers[victim] = start(100 + killed)
    (tmp_path / "hold").unlink()
    said = [w.communicate(timeout=200)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0, 0], said
    found = journal.trials(tmp_path)
    assert sorted((t.assignment["depth"], t.assignment["seed"]) for t in found) == [
        (d, s) for d in range(1, 13) for s in (1, 2)
    ]
    assert all(
        t.state == "done" and t.value == t.assignment["depth"] and list(t.reports) == [1, 2, 3]
        for t in found
    )
    events = [e for _, events in journal._events(tmp_path) for e in events]
    ends, claims = (
        [e["id"] for e in events if e["e"] == "end"],
        [(e["id"], e["tries"]) for e in events if e["e"] == "claim"],
    )
    assert len(ends) == len(set(ends)) == 24, "one end each"
    assert len(claims) == len(set(claims)), "nobody took what another had"
    assert len(claims) > 24, "some were killed at work, and what they had was taken again"


def test_what_a_worker_tells_is_on_the_disk_when_the_call_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    journal.create(tmp_path, sweep())
    with Journal(tmp_path) as book:
        book.claim({"depth": 1})
        assert synced[-1] == book.path.stat().st_size


def test_workers_that_all_want_the_next_trial_at_once_never_take_the_same(tmp_path):
    spec = sweep("bayes", {"depth": {"min": 1, "max": 40}})
    journal.create(tmp_path, spec)

    def work():
        with Journal(tmp_path) as book:
            boss = drivers.Local(book, spec, say=lambda text: None)
            for _ in range(6):
                [trial] = boss.take()
                boss.end(trial, "done", 1.0 * trial.assignment["depth"])

    threads = [threading.Thread(target=work) for _ in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    claims = [
        e["id"] for _, events in journal._events(tmp_path) for e in events if e["e"] == "claim"
    ]
    assert len(claims) == len(set(claims)) == 30


@pytest.fixture
def book(tmp_path):
    journal.create(tmp_path, sweep())
    with Journal(tmp_path, "one") as book:
        yield book


def events_of(folder, worker, *rows, host="elsewhere", t=None):
    t = time.time() if t is None else t
    rows = [dict(e="worker", host=host), *rows]
    text = "".join(json.dumps(dict(t=t, n=n) | row) + "\n" for n, row in enumerate(rows, 1))
    (folder / "journal" / f"{worker}.jsonl").write_text(text)


def test_a_silent_worker_elsewhere_loses_its_trial_when_its_lease_ends(book):
    a = {"depth": 1, "seed": 1}
    claim = dict(e="claim", id=space.key(a), a=a, tries=1)
    events_of(book.folder, "far", claim, t=time.time() - book.lease / 2)
    boss = drivers.Local(book, sweep())
    assert boss.take()[0].assignment == {"depth": 1, "seed": 2}, "it may be alive"
    events_of(book.folder, "far", claim, t=time.time() - 2 * book.lease)
    again = boss.take()[0]
    assert again.assignment == a and again.tries == 2
    events_of(
        book.folder,
        "far",
        claim,
        dict(e="report", id=claim["id"], step=1, value=0.0),
        dict(e="end", id=claim["id"], state="done", value=9.0, reason="", curve=[], facts={}),
        t=time.time() - 1,
    )
    assert boss.report(again, 1, {"val_bpb": 1.0}) == "lost", (
        "it was alive, and has finished: that result counts, once"
    )
    assert [t.value for t in book.trials() if t.id == again.id] == [9.0]


def test_a_worker_elsewhere_lives_as_long_as_it_gives_signs_of_life(book):
    a = {"depth": 1, "seed": 1}
    claim = dict(e="claim", id=space.key(a), a=a, tries=1)
    now = time.time()
    for heard, state in ((now - book.lease / 2, "running"), (now - 2 * book.lease, "lost")):
        events_of(book.folder, "far", claim, dict(e="beat", t=heard), t=now - 9 * book.lease)
        assert [trial.state for trial in book.trials()] == [state]


def test_a_clock_that_is_set_back_reorders_nothing(book):
    a = {"depth": 1, "seed": 1}
    id, now = space.key(a), time.time()
    report = dict(e="report", id=id, step=1, value=0.5, t=now - 500)
    events_of(book.folder, "far", dict(e="claim", id=id, a=a, tries=1), report, t=now)
    (trial,) = book.trials()
    assert trial.reports == {1: 0.5} and trial.begun == now


def test_without_locks_the_earlier_claim_holds(book, monkeypatch):
    monkeypatch.setattr(journal.locks, "take", lambda file, wait: None)
    boss, a = drivers.Local(book, sweep()), {"depth": 1, "seed": 1}
    mine = boss.take()[0]
    assert mine.assignment == a
    # synchronised only now
    events_of(book.folder, "far", dict(e="claim", id=mine.id, a=a, tries=1), t=mine.begun - 5)
    assert boss.report(mine, 1, {"val_bpb": 1.0}) == "lost"
    assert [t.worker for t in book.trials()] == ["far"]


def test_a_trial_that_kills_its_workers_fails_in_the_end(book):
    a = {"depth": 1, "seed": 1}
    for n in range(journal.TRIES):
        events_of(
            book.folder,
            f"far{n}",
            dict(e="claim", id=space.key(a), a=a, tries=n + 1),
            t=time.time() - 1000 + n,
        )
    assert drivers.Local(book, sweep()).take()[0].assignment == {"depth": 1, "seed": 2}
    assert [(t.state, "died 3 times" in t.reason) for t in book.trials()][0] == ("failed", True)


def claims(*steps):
    """Events of workers that each claim one trial, come to a step (0: to none) and fall silent."""
    a = {"depth": 1, "seed": 1}
    for n, step in enumerate(steps):
        events = [dict(e="claim", id=space.key(a), a=a, tries=n + 1)]
        if step:
            events.append(dict(e="saved", id=space.key(a), step=step))
        yield f"far{n}", events, time.time() - 1000 + n


@pytest.mark.parametrize(
    "steps, deaths",
    [
        ((0, 0), 2),
        ((10, 20, 30, 40, 50, 60), 0),  # preempted again and again, and yet it gets on
        ((10, 10, 10), 2),
        ((10, 0, 0, 0), 3),
        ((0, 0, 10, 0), 1),
    ],
)
def test_only_deaths_without_progress_count_against_a_trial(book, steps, deaths):
    for worker, events, t in claims(*steps):
        events_of(book.folder, worker, *events, t=t)
    [trial] = book.trials()
    assert (trial.state, trial.deaths, trial.hopeless) == ("lost", deaths, deaths >= 3)
    taken = drivers.Local(book, sweep()).take()[0]
    assert (taken.id == trial.id) == (deaths < 3) and taken.tries == (
        len(steps) + 1 if deaths < 3 else 1
    )


HOSTILE = ["[]", "7", "null", '{"e": "claim"}', '{"e": "beat", "t": "now", "n": 1}', "[" * 100_000]
HOSTILE += [
    '{"e": "end", "t": 1, "n": 2, "id": "x", "state": "won", "value": 1, '
    '"reason": "", "curve": [], "facts": {}}'
]
HOSTILE += [
    '{"e": "end", "t": 1, "n": 2, "id": "x", "state": "done", "value": 1, '
    '"reason": "", "curve": [7], "facts": {}}'
]


@pytest.mark.parametrize("line", HOSTILE)
def test_a_line_that_is_no_event_is_named(book, line):
    (book.folder / "journal" / "far.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"far.jsonl line 1 is not an event: remove that line"):
        book.trials()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, '{"format": 9}', '{"format": 1}', '{"format": 1, "sweep": []}'],
)
def test_a_damaged_sweep_is_told_in_one_sentence(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep.json.*restore it, or start") as error:
        journal.read(tmp_path)
    assert "\n" not in str(error.value)


def test_pipes_hang_nobody_and_nothing_is_written_through_a_link(tmp_path):
    journal.create(tmp_path / "sweep", sweep())
    os.mkfifo(tmp_path / "sweep" / "journal" / "pipe.jsonl")
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / "sweep" / "lock").symlink_to(precious)
    with Journal(tmp_path / "sweep") as book:
        assert book.trials() == []
        with pytest.raises(UserError, match="lock is not a plain file"):
            drivers.Local(book, sweep()).take()
    assert precious.read_text() == "kept"
    os.mkfifo(tmp_path / "sweep.json")
    with pytest.raises(UserError, match="no ordinary file"):
        journal.read(tmp_path)


def test_numbers_that_json_has_not_come_back_as_none(book):
    id = book.claim({"depth": 1, "seed": 1})
    book.report(id, 1, math.inf)
    book.end(id, "done", math.nan, curve=[[1, math.inf]])
    for line in book.path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
    [trial] = book.trials()
    assert trial.value is None and not trial.scored
    assert math.isnan(trial.reports[1]) and math.isnan(trial.curve[0][1])


def test_the_first_end_is_the_end(book):
    id = book.claim({"depth": 1, "seed": 1})
    book.end(id, "done", 1.0)
    book.report(id, 9, 0.5)
    book.end(id, "failed", 2.0)
    book.free(id)
    [trial] = book.trials()
    assert (trial.state, trial.value, trial.reports) == ("done", 1.0, {})


def test_what_was_given_back_does_not_count_as_a_death_and_torn_lines_do_not_count(book):
    boss = drivers.Local(book, sweep())
    for _ in range(journal.TRIES + 2):
        trial = boss.take()[0]
        assert trial.assignment == {"depth": 1, "seed": 1}
        # what an earlier try reported is not this one's
        assert book.trials()[0].reports == {}
        boss.report(trial, 1, {"val_bpb": 1.0})
        boss.free(trial)
    with open(book.path, "a") as f:
        f.write('{"e": "end", "id": "' + trial.id)
    assert book.trials()[0].state == "lost"
    with open(book.path, "a") as f:
        f.write('"\n{"e": \n')
    with pytest.raises(UserError, match="line .* is not an event"):
        book.trials()


def test_a_disk_that_fills_up_in_the_middle_of_a_line_spoils_nothing(book):
    boss = drivers.Local(book, sweep())
    trial = boss.take()[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (book.path.stat().st_size + 20, hard))
    try:
        with pytest.raises((UserError, OSError)):
            boss.report(trial, 1, {"val_bpb": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert boss.report(trial, 1, {"val_bpb": 2.0}) == "" and book.trials()[0].reports == {1: 2.0}


def test_a_folder_holds_one_sweep(book):
    with pytest.raises(UserError, match="another sweep"):
        journal.create(book.folder, sweep("random", run_cap=3))
    with pytest.raises(UserError, match="no sweep in"):
        journal.read(book.folder / "nowhere")
