"""What a training run decides, by hand: what is due after which step, and what becomes of saves.
Nothing is computed.
"""

import contextlib
import math
import types

import pytest

from lib.files import UserError
from lib.train import run as runs
from lib.train.run import Measurement, Past, Saving, TrainingRun, _Agenda, _measured, _Saver


@pytest.fixture
def clock(monkeypatch):
    """The time that the run sees, to be set."""
    time = types.SimpleNamespace(now=1000.0, monotonic=lambda: time.now, strftime=lambda _: "then")
    monkeypatch.setattr(runs, "time", time)
    return time


# ---- what is due ---------------------------------------------------------------------------------


def measuring(name="bpb", **when) -> Measurement:
    return Measurement(lambda params: {name: 1.0}, **when)


def agenda(*measurements, trace=(1, 0), stop=(), overdue=(), watch=False, **saving):
    """{step: (what is measured, whether it is saved, whether the loop is left, whether the state
    is looked at)} of the twelve steps of a run.
    """
    run = types.SimpleNamespace(config=types.SimpleNamespace(num_steps=12), watch_state=watch)
    late = []
    saver = types.SimpleNamespace(
        saving=Saving(**{"every": 5, "seconds": 0} | saving), overdue=lambda: late.pop()
    )
    told = []
    plan = _Agenda(run, measurements, saver, trace, lambda: told.pop())
    due = {}
    for step in range(1, 13):
        late[:], told[:] = [step in overdue], [step in stop]
        paused = plan.pause(step)
        todo = plan.take(step)
        due[step] = [measurements.index(one) for one in todo.measure], todo.save, todo.leave, paused
    assert not plan.todo
    return due


def steps(due, which):
    return [step for step, what in due.items() if what[which]]


MEASURED, SAVED, LEFT, PAUSED = range(4)


def test_what_is_due_after_each_step():
    due = agenda(measuring(every=4), measuring(every=0, at=(3, 5)))
    assert {step: what[MEASURED] for step, what in due.items() if what[MEASURED]} == {
        3: [1],
        4: [0],
        5: [1],
        8: [0],
        12: [0, 1],
    }
    assert steps(due, SAVED) == [5, 10, 12] and steps(due, LEFT) == [12]
    assert steps(due, PAUSED) == [3, 4, 5, 8, 10, 12]
    # the last one is saved only where that is wanted, even if it were due
    assert steps(agenda(at_end=False, every=6), SAVED) == [6]
    assert steps(agenda(every=0), SAVED) == [12]
    assert steps(agenda(watch=True), PAUSED) == list(range(1, 13))


def test_a_save_is_rated_by_its_own_step():
    due = agenda(measuring(every=4, gives="val_bpb"), measuring(every=12, gives="other"))
    measured = {step: what[MEASURED] for step, what in due.items() if what[MEASURED]}
    assert measured == {4: [0], 5: [0], 8: [0], 10: [0], 12: [0, 1]}
    due = agenda(measuring(every=0, gives="val_bpb"), metric="other")
    assert steps(due, MEASURED) == [12]


def test_who_is_stopped_saves_and_measures_nothing_more():
    due = agenda(measuring(every=0, gives="val_bpb"), stop=(7,))
    assert steps(due, SAVED) == [5, 7, 10, 12] and steps(due, LEFT) == [7, 12]
    assert due[7] == ([], True, True, True)


def test_a_save_that_failed_is_tried_again():
    assert steps(agenda(overdue=(7, 8)), SAVED) == [5, 7, 8, 10, 12]


def test_whole_steps_are_profiled():
    """From behind the step before the first to behind the last."""
    assert steps(agenda(trace=(3, 6), every=0), PAUSED) == [2, 6, 12]
    assert steps(agenda(trace=(1, 0), every=0), PAUSED) == [12]


def test_the_clock_counts_only_where_that_is_said(monkeypatch):
    assert measuring(every=4).due(9).seconds == 0
    due = measuring(every=4, by_clock=True, at=(7,)).due(9)
    assert (due.seconds, due.every, due.last, due.steps) == (600.0, 4, 9, (7,))
    assert Saving(every=3).seconds == 600.0 and Saving(every=3).keep == 2
    assert Saving(every=3).at_end and Saving(every=3).metric == "val_bpb"
    assert Saving(every=3).sent_at() == math.inf
    assert [runs._clock(wanted) for wanted in (True, False, 0, 7, 1)] == [600.0, 0, 0, 7, 1]
    monkeypatch.setattr(runs.jax, "process_count", lambda: 2)
    assert runs._clock(True) == runs._clock(7.0) == 0


# ---- saves ---------------------------------------------------------------------------------------


class Paper:
    """A Saver that writes nothing: it fails with `error` if there is one."""

    def __init__(self):
        self.saved, self.error, self.done = [], None, None

    def save(self, step, state, meta, metric):
        self.saved.append((step, state, meta, metric))

    def wait(self):
        error, self.error = self.error, None
        if error:
            raise error

    def failure(self):
        error, self.error = self.error, None
        return error

    def written(self):
        done, self.done = self.done, None
        return done


def saver_of(tmp_path, then=lambda step, path: None):
    """A _Saver with a Paper one in it, and its run."""
    run = types.SimpleNamespace(
        folder=tmp_path, store=tmp_path / "checkpoints", past=None, saved_at=0.0
    )
    run.meta = lambda metrics: {"loss": metrics["loss"]}
    saver = object.__new__(_Saver)
    saver.run, saver.saving, saver.pending = run, Saving(every=5, then=then), None
    saver.begun_at, saver.again_at, saver.saver = 0.0, math.inf, Paper()
    return saver, run


def step(number, **metrics):
    return types.SimpleNamespace(step=number, state="state", metrics={"loss": 2.0} | metrics)


def test_a_save_counts_from_when_it_was_begun_once_it_is_written(tmp_path, clock):
    told = []
    saver, run = saver_of(tmp_path, lambda step, path: told.append((step, path)))
    saver.save(step(5, val_bpb=1.5), leaving=False)
    assert saver.saver.saved == [(5, "state", {"loss": 2.0}, 1.5)]
    saver.look()
    assert run.past is None and told == [], "it is under way"
    clock.now = 1030.0
    saver.saver.done = "path"
    saver.look()
    path = run.store / "step_00000005"
    assert run.past == Past(path, {"loss": 2.0}, [], False) and run.saved_at == 1000.0
    assert told == [(5, path)] and saver.pending is None
    saver.look()
    assert len(told) == 1
    # what was changed in its life stays with it
    run.past = run.past._replace(changes=["one"])
    saver.save(step(10), leaving=True)
    assert run.past.changes == ["one"] and run.past.path == run.store / "step_00000010"
    assert saver.saver.saved[1][3] is None and run.saved_at == 1030.0
    # waiting where nothing is left to tell
    saver.wait()
    assert len(told) == 2


def test_a_save_that_failed_is_told_and_tried_again_after_a_minute(tmp_path, clock):
    saver, run = saver_of(tmp_path)
    assert not saver.overdue()
    saver.save(step(5), leaving=False)
    saver.saver.error = OSError(5, "no disk")
    with pytest.warns(UserWarning, match=r"no disk\); training goes on, .* again in 60 s"):
        saver.look()
    assert saver.pending is None and run.past is None
    for now, overdue in ((1059.9, False), (1060.0, True), (1099.0, True)):
        clock.now = now
        assert saver.overdue() == overdue
    # tried again, it is due no more; and what is told by the next one costs it nothing
    saver.save(step(6), leaving=False)
    assert not saver.overdue()
    saver.saver.error = UserError("away")
    with pytest.warns(UserWarning, match="away"):
        saver.save(step(7), leaving=False)
    assert [number for number, *_ in saver.saver.saved] == [5, 6, 7]
    assert saver.pending[0] == 7
    # what is a fault of ours is no warning
    saver.saver.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        saver.look()


def test_hosts_that_must_go_on_together_stop_together(tmp_path, clock, monkeypatch):
    saver, _ = saver_of(tmp_path)
    monkeypatch.setattr(runs.jax, "process_count", lambda: 2)
    with pytest.raises(OSError, match="no disk"):
        saver._failed(OSError("no disk"), leaving=False)


def test_where_nothing_can_be_saved_the_place_on_this_machine_is_named(
    tmp_path, clock, monkeypatch
):
    saver, run = saver_of(tmp_path)
    kept = []

    def save(folder, number, state, meta, metric):
        kept.append((folder, number, state, metric))
        if len(kept) == 1:
            raise OSError("full")
        return folder / "step"

    monkeypatch.setattr(runs.checkpoint, "save", save)
    saver.saver.save = lambda *_: (_ for _ in ()).throw(UserError("away"))
    with pytest.raises(UserError, match="cannot be written .away.: .* step 9 is in .*/step; move"):
        saver.save(step(9, val_bpb=0.5), leaving=True)
    # beside the run, and where that is full too among the temporary files
    assert kept[0] == (tmp_path / "kept-then", 9, "state", 0.5)
    assert kept[1][0].name.endswith("-kept-then") and kept[1][0].parent != tmp_path
    kept.clear()
    monkeypatch.setattr(runs.checkpoint, "save", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    with pytest.raises(UserError, match="step 9 could not be saved anywhere: away"):
        saver.save(step(9), leaving=True)


def test_what_was_written_when_the_loop_was_left_counts(tmp_path, clock, monkeypatch):
    for sound in (True, False):
        saver, run = saver_of(tmp_path)
        saver.save(step(5), leaving=False)

        def read_meta(path, sound=sound):
            if not sound:
                raise UserError("half")

        monkeypatch.setattr(runs.checkpoint, "read_meta", read_meta)
        saver._settle()
        assert (run.past is not None) == sound
    saver.pending = None
    monkeypatch.setattr(runs.checkpoint, "read_meta", None)
    saver._settle()


def test_a_step_that_could_not_be_measured_is_saved_if_its_state_is_there(tmp_path, clock):
    saver, run = saver_of(tmp_path)
    gone = step(4)
    gone.state = None
    saver.rescue(gone)
    assert saver.saver.saved == []
    saver.rescue(step(5))
    assert [number for number, *_ in saver.saver.saved] == [5] and run.past is not None
    # whatever goes wrong with that is not what is told
    saver.saver.save = None
    saver.rescue(step(6))


def test_a_run_without_a_store_saves_nothing():
    saver = _Saver(None, types.SimpleNamespace(store=None), Saving(every=1))
    saver.save(None, leaving=True)
    saver.look()
    saver.wait()
    assert saver.pending is None and not saver.overdue()


# ---- how it ends ---------------------------------------------------------------------------------


def ended(told=False, finished=True, past=None, store=None):
    """What `finish` makes of a run that ended so."""
    run = types.SimpleNamespace(done=7, _told=told, finished=finished, past=past, store=store)
    run.template = run.state = None
    result = TrainingRun.finish(run)
    assert run._told is False, "told once"
    return result


def test_what_is_said_of_a_run_that_was_stopped(monkeypatch):
    with pytest.raises(UserError, match="stopped at step 7, and nothing is saved: run again$"):
        ended(finished=False)
    for told in (False, True):
        with pytest.raises(UserError, match="stopped at step 7 and saved: run again with the same"):
            ended(told, finished=False, past=Past("path", {}, [], False))
    with pytest.raises(UserError, match="stopped after step 7, the last one"):
        ended(told=True)
    # without a store there is nothing to read back
    assert ended() is True and ended(store="somewhere") is False
    monkeypatch.setattr(runs.checkpoint, "restore", lambda path, template: (path, None))
    monkeypatch.setattr(runs, "equal", lambda back, state: back == "same")
    for path in ("same", "other"):
        assert ended(past=Past(path, {}, [], False), store="s") == (path == "same")


def test_a_run_that_has_ended_is_told_of_no_signal_of_before():
    run = types.SimpleNamespace(finished=True, _told=True)
    assert list(TrainingRun.steps(run, [], Saving(every=1))) == [] and run._told is False


def test_what_a_checkpoint_keeps_of_a_steps_numbers():
    metrics = dict.fromkeys(("loss", "grad_norm", "lr", "step_time", "tokens_per_s", "mfu"), 1.0)
    assert _measured(metrics | {"val_bpb": 2.0, "word": "x"}) == {"val_bpb": 2.0, "word": "x"}


def test_a_steps_numbers_and_what_is_measured_of_its_state():
    run = types.SimpleNamespace(seconds=5.0, peak_flops=200.0, measured={"old": 1}, cursor="before")
    run.config = types.SimpleNamespace(flops_per_token=4)
    passed = types.SimpleNamespace(
        metrics=dict(loss=2.0, step_time=0.25, tokens_per_s=10.0), state=None, cursor="after"
    )
    TrainingRun._note(run, passed, [])
    assert run.seconds == 5.25 and passed.metrics["mfu"] == 0.2
    assert run.cursor == "before" and run.measured == {"old": 1}, "its state was not looked at"
    passed.state = types.SimpleNamespace(params=3)
    run.peak_flops = None
    del passed.metrics["mfu"]
    double = Measurement(lambda params: {"double": 2 * params}, every=1)
    TrainingRun._note(run, passed, [double])
    assert passed.metrics["double"] == 6 and "mfu" not in passed.metrics
    assert run.cursor == "after" and run._state is passed.state
    assert run.measured == {"old": 1, "double": 6} and run.seconds == 5.5


# ---- beginning -----------------------------------------------------------------------------------


def test_what_a_checkpoint_must_tell_to_be_gone_on_with():
    config = runs.Config(num_steps=9).to_dict()
    for meta in ({}, {"config": config}, {"settings": {}}, {"config": "x", "settings": {}}):
        with pytest.raises(UserError, match="tells no config and settings"):
            runs._described(meta)
    described = runs._described({"config": config, "settings": {"source": "x"}})
    assert described == config | {"source": "x", "tokenizer": ""}
    told = {"config": config, "settings": {}, "tokenizer": "print"}
    assert runs._described(told)["tokenizer"] == "print"


@pytest.fixture
def past(monkeypatch):
    """What `find_past` finds and asks, to be set."""
    past = types.SimpleNamespace(newest=(True, "path"), changes=[], begun=False, asked=[])
    past.meta = dict(step=5, config={}, settings={}, changes=[[2, "before"]])
    monkeypatch.setattr(runs, "check_free", past.asked.append)
    monkeypatch.setattr(runs, "from_first", lambda name, function: function())
    monkeypatch.setattr(runs, "_newest", lambda store, if_exists: past.newest)
    monkeypatch.setattr(runs, "_begun_here", lambda *_: past.begun)
    monkeypatch.setattr(runs, "_described", lambda meta: dict(described=meta["step"]))
    monkeypatch.setattr(runs.checkpoint, "read_meta", lambda path: past.meta)
    monkeypatch.setattr(runs, "BEGUN_AFRESH", set())

    def allowed_changes(before, now, where, step):
        past.asked.append((before, now["mine"], where, step))
        return types.SimpleNamespace(rates=past.changes)

    monkeypatch.setattr(runs, "allowed_changes", allowed_changes)
    return past


def find(if_exists, begun=None):
    started = [] if begun is None else begun
    config, identity = runs.Config(num_steps=9), dict(mine=1)
    return runs.find_past(
        "store", if_exists, config, identity, "folder", lambda: started.append("afresh")
    )


def test_a_run_goes_on_with_what_has_changed(past, capsys):
    found = find("continue")
    assert found == Past("path", past.meta, [[2, "before"]], False)
    assert past.asked == ["folder", (dict(described=5), 1, "folder", 5)]
    past.changes = ["lr was 1 and is 2"]
    found = find("continue")
    assert found.changes == [[2, "before"], [5, "lr was 1 and is 2"]] and found.new_rates
    assert past.meta["changes"] == [[2, "before"]], "what was read is left as it was"
    assert capsys.readouterr().out == "from step 5 on, lr was 1 and is 2\n"
    past.newest = False, None
    assert find("continue") is find("stop") is find("fresh") is None


def test_a_run_begins_afresh_once(past):
    with pytest.raises(UserError, match="folder was trained before: pass if_exists"):
        find("stop")
    begun = []
    assert find("fresh", begun) is None and begun == ["afresh"]
    assert runs.BEGUN_AFRESH == {"store"}
    past.begun = True
    assert find("fresh", begun).path == "path" and begun == ["afresh"]
    with pytest.raises(UserError, match="unknown if_exists 'maybe'"):
        find("maybe")


def test_whether_this_process_has_begun_it(past, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(runs, "BEGUN_AFRESH", {"store"})
    monkeypatch.setattr(runs.checkpoint, "read_meta", lambda path: dict(step=5))
    monkeypatch.setattr(runs, "_described", lambda meta: {})
    monkeypatch.setattr(runs, "allowed_changes", lambda *given: None)
    config = runs.Config(num_steps=9)
    assert runs._begun_here("store", "path", config, {}) is True
    assert runs._begun_here("store", None, config, {}) is False
    assert runs._begun_here("other", "path", config, {}) is False

    def refuse(*given):
        raise UserError("other settings")

    monkeypatch.setattr(runs, "allowed_changes", refuse)
    assert runs._begun_here("store", "path", config, {}) is False


def test_damaged_checkpoints_stop_no_fresh_start(monkeypatch):
    def latest(store):
        raise UserError("damaged")

    monkeypatch.setattr(runs.checkpoint, "latest", latest)
    assert runs._newest("store", "fresh") == (True, None)
    for if_exists in ("continue", "stop"):
        with pytest.raises(UserError, match="damaged"):
            runs._newest("store", if_exists)
    for path, newest in ((None, (False, None)), ("path", (True, "path"))):
        monkeypatch.setattr(runs.checkpoint, "latest", lambda store, path=path: path)
        assert runs._newest("store", "continue") == newest


# ---- a run's own parts ---------------------------------------------------------------------------


def test_where_a_run_writes_nobody_else_does(tmp_path, monkeypatch):
    locked = []
    monkeypatch.setattr(
        runs, "working_in", lambda place: locked.append(place) or contextlib.nullcontext()
    )
    monkeypatch.setattr(runs, "_names", lambda store: {"step_00000001"})
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for store, writers, places in (
        (folder / "checkpoints", ["console"], [folder]),
        (folder / "checkpoints", None, []),
        (folder / "checkpoints", (), [folder]),
        (elsewhere, ["console"], [folder, elsewhere]),
        (elsewhere, None, [elsewhere]),
        (None, ["console"], [folder]),
        ("memory://bucket", ["console"], [folder]),
    ):
        run = types.SimpleNamespace(folder=folder, store=store, _there={"step_00000001"})
        with contextlib.ExitStack() as stack:
            TrainingRun._lock(run, stack, writers)
        assert locked == places
        locked.clear()
    # another has written there meanwhile; and afterwards it knows what it wrote itself
    run = types.SimpleNamespace(folder=folder, store=elsewhere, _there=set())
    with contextlib.ExitStack() as stack:
        with pytest.raises(UserError, match="was written by another training since"):
            TrainingRun._lock(run, stack, None)
    run._there = {"step_00000001"}
    with contextlib.ExitStack() as stack:
        TrainingRun._lock(run, stack, None)
        monkeypatch.setattr(runs, "_names", lambda store: {"step_00000002"})
    assert run._there == {"step_00000002"}
    # of several processes the first one
    monkeypatch.setattr(runs.jax, "process_index", lambda: 1)
    TrainingRun._lock(run, None, ["console"])


def test_minutes_at_risk_are_those_since_the_last_save(tmp_path, clock, monkeypatch):
    given = {}

    class Metrics:
        def __init__(self, *folder, **more):
            given.update(more, folder=folder)
            self.log = "log"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

    monkeypatch.setattr(runs, "Metrics", Metrics)
    run = types.SimpleNamespace(folder=tmp_path, saved_at=880.0, done=0)
    run.config = runs.Config(num_steps=9)
    with contextlib.ExitStack() as stack:
        assert TrainingRun._log(run, stack, ["console"], Saving(every=1)) == "log"
        assert given["folder"] == (tmp_path, 9, ["console"]) and given["resumed"] is None
        assert given["config"] == run.config.to_dict() and given["at_risk"]() == 2.0
        run.done = 4
        TrainingRun._log(run, stack, [], Saving(every=1, sent_at=lambda: 700.0))
        assert given["resumed"] == 4 and given["at_risk"]() == 5.0
        nothing = TrainingRun._log(run, stack, None, None)
        assert nothing(1, {}) is None


def test_a_training_that_went_bad_says_from_where_to_go_on():
    def stepping():
        yield "step"
        raise UserError("it diverged")

    waited = []
    saver = types.SimpleNamespace(wait=lambda: waited.append(1))
    for past, match in (
        (Past("there", {}, [], False), r"^it diverged \(the last good one is there\)$"),
        (None, r"^it diverged \(none was saved yet, so start again\)$"),
    ):
        watched = TrainingRun._watched(types.SimpleNamespace(past=past), stepping(), saver)
        assert next(watched) == "step"
        with pytest.raises(UserError, match=match):
            next(watched)
    assert waited == [1, 1]


def test_what_a_checkpoint_says_of_its_run():
    run = types.SimpleNamespace(config=runs.Config(num_steps=9, microbatch=4), cursor={"at": 1})
    run.identity = dict(tokenizer="print", source="x")
    run.seconds, run.measured, run.notes, run.past = 2.5, {"val_bpb": 1.0}, {"seen": [1]}, None
    run.layout = types.SimpleNamespace(size=lambda *axes: 2)
    meta = TrainingRun.meta(run, dict(loss=3.0))
    assert meta.pop("config") == run.config.replace(microbatch=2).to_dict()
    told = dict(ways=2, cursor={"at": 1}, settings=dict(source="x"), tokenizer="print", loss=3.0)
    told |= dict(seconds=2.5, measured={"val_bpb": 1.0}, notes={"seen": [1]}, changes=[])
    assert meta == told
    # copies, for the run goes on
    run.notes["seen"].append(2)
    run.measured["val_bpb"] = 0.5
    assert meta["notes"] == {"seen": [1]} and meta["measured"] == {"val_bpb": 1.0}
    run.layout, run.past, run.identity = None, Past("path", {}, ["one"], False), {}
    meta = TrainingRun.meta(run, dict(loss=3.0))
    assert (meta["ways"], meta["changes"], meta["tokenizer"]) == (1, ["one"], "")


def test_checkpoints_of_a_store_by_name(tmp_path, monkeypatch):
    store = tmp_path / "checkpoints"
    assert runs._names(None) == runs._names(store) == set()
    for name in ("step_00000001", "step_00000002", ".step_00000003.tmp", "best", "step_1x"):
        (store / name).mkdir(parents=True)
    assert runs._names(store) == {"step_00000001", "step_00000002"}
    monkeypatch.setattr(runs.jax, "process_index", lambda: 1)
    assert runs._names(store) == set()


def test_a_state_is_gone_where_one_of_its_arrays_is():
    leaf = lambda gone: types.SimpleNamespace(is_deleted=lambda: gone)
    states = [leaf(False), leaf(True)], [leaf(False)] * 2, [leaf(True)] * 2
    assert [runs._is_gone(state) for state in states] == [True, False, True]


def test_a_step_is_compiled_for_whole_batches(monkeypatch):
    clock = types.SimpleNamespace(perf_counter=iter([10.0, 12.5]).__next__)
    monkeypatch.setattr(runs, "time", clock)
    lowered = []

    class Jitted:
        def lower(self, *given):
            lowered.append(given)
            return types.SimpleNamespace(compile=lambda: "program")

    config = runs.Config(sequence_len=128, total_batch_size=512, microbatch=1)
    run = types.SimpleNamespace(config=config, layout="layout", template="template")
    run.make_step = lambda *given: Jitted() if given == (config, "layout") else None
    assert TrainingRun.compile(run) == run.step_fn == "program" and run.compile_seconds == 2.5
    [(template, inputs, targets)] = lowered
    assert template == "template" and inputs.shape == targets.shape == (4, 128)
    assert inputs.dtype == targets.dtype == "int32"


@pytest.mark.parametrize(
    "times, measured_every, last, wanted",
    [
        (4, 80, 800, 160),  # with every other measurement
        (3, 74, 733, 222),
        (4, 1, 800, 200),
        (4, 1, 3, 1),
        # measured too seldom for that: saved apart
        (4, 10**6, 800, 200),
        (4, 300, 800, 200),
    ],
)
def test_saves_come_where_a_measurement_is_due(times, measured_every, last, wanted):
    every = runs.saved_every(times, measured_every, last)
    assert every == wanted
    if measured_every * times <= last:
        assert every % measured_every == 0
