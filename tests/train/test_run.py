"""lib/train/run.py: left at any step and by any way, a training goes on as if nothing had been."""

import contextlib
import dataclasses
import json
import os
import signal
import types

import jax
import numpy as np
import pytest

from lib import locks, parallel, train
from lib.config import Config
from lib.files import UserError
from lib.train import checkpoint, saving
from lib.train import run as runs
from lib.train.metrics import read_jsonl

TINY = Config(
    vocab_size=50,
    sequence_len=16,
    n_layer=1,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=32,
    microbatch=2,
    total_batch_size=32,
    num_steps=12,
    warmup_steps=2,
    loss_chunk=16,
)
IDENTITY = dict(tokenizer="t", source="text", packing="bestfit")


def feed(cursor):
    """Endless rows, each known by its number; the cursor counts them."""
    n = (cursor or {"n": 0})["n"]
    while True:
        rng = np.random.default_rng(n)
        x = rng.integers(0, 50, (2, 17)).astype(np.int32)
        n += 1
        yield x[:, :-1], x[:, 1:], {"n": n}


def aside(folder):
    """What moves an old training away, in these tests."""
    return lambda: (folder / "checkpoints").rename(folder / "old")


def open_run(folder, if_exists="continue", config=TINY, **identity):
    """A run in `folder`, begun or gone on with, as the notebooks open one."""
    identity = IDENTITY | identity
    store = folder / "checkpoints"
    past = train.find_past(store, if_exists, config, identity, folder, aside(folder))
    return train.TrainingRun(config, feed, folder, store, identity, past)


def measure(run):
    """A stand-in for a validation: a number that only these parameters have."""
    return train.Measurement(
        lambda params: {"val_bpb": float(np.abs(params["head"]).sum())}, every=4
    )


def go_on(run, upto=None, **options):
    """The losses of the steps up to `upto`, where the caller leaves."""
    losses = []
    steps = run.steps([measure(run)], train.Saving(every=5, seconds=0), writers=[], **options)
    with contextlib.closing(steps):
        for step in steps:
            losses.append(step.metrics["loss"])
            if step.step == upto:
                break
    return losses


def digest(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(losses, state, rows of metrics) of a training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run = open_run(folder)
    losses = go_on(run)
    assert run.finish() and run.finished and run.cursor == {"n": 12}
    return losses, digest(run.state), read_jsonl(folder / "metrics.jsonl")


def check(run, whole, folder):
    """The run ended as the undisturbed one did: state, curve and what a finished run reports."""
    losses, state, rows = whole
    assert digest(run.state) == state and run.cursor == {"n": 12}
    now = read_jsonl(folder / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in now] == [(r["step"], r["loss"]) for r in rows]
    assert [row.get("val_bpb") for row in now] == [row.get("val_bpb") for row in rows]
    assert run.measured["val_bpb"] == rows[-1]["val_bpb"]


def test_measures_at_every_fourth_step_and_saves_at_every_fifth(whole):
    _, _, rows = whole
    assert [row["step"] for row in rows if "val_bpb" in row] == [4, 8, 12]


@pytest.mark.parametrize("left_at", [3, 7, 10])
def test_left_in_the_middle_the_same_cell_goes_on(tmp_path, whole, left_at):
    """As in a notebook: the loop's cell is left, by whatever exception, and run again."""
    run = open_run(tmp_path)
    go_on(run, upto=left_at)
    go_on(run)
    check(run, whole, tmp_path)


def test_another_process_goes_on(tmp_path, whole):
    go_on(open_run(tmp_path), upto=8)
    run = open_run(tmp_path)
    assert run.done == 5 and run.cursor == {"n": 5}
    go_on(run)
    check(run, whole, tmp_path)


def test_a_signal_saves_and_the_next_one_goes_on(tmp_path, whole):
    run = open_run(tmp_path)
    steps = run.steps([measure(run)], train.Saving(every=0, seconds=0), writers=[])
    for step in steps:
        if step.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
    assert 6 < run.done < 12
    with pytest.raises(UserError, match=rf"stopped at step {run.done} and saved"):
        run.finish()
    after = open_run(tmp_path)
    assert after.done == run.done
    go_on(after)
    check(after, whole, tmp_path)


def test_a_signal_in_the_last_step_stops_what_comes_after_it(tmp_path, whole):
    run = open_run(tmp_path)
    steps = run.steps([measure(run)], train.Saving(every=0, seconds=0), writers=[])
    for step in steps:
        if step.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
    check(run, whole, tmp_path)
    with pytest.raises(UserError, match="stopped after step 12, the last one: run again"):
        run.finish()

    # said once: the cell may be run again, and so may the program
    assert run.finish() and open_run(tmp_path).finish()


def test_a_finished_run_reports_what_it_measured(tmp_path, whole):
    first = open_run(tmp_path)
    first.notes["word"] = "kept"
    go_on(first)
    again = open_run(tmp_path)
    assert go_on(again) == [] and again.finished
    assert again.measured == first.measured and again.seconds == pytest.approx(first.seconds)
    assert again.notes == {"word": "kept"}


def test_fresh_sets_the_old_one_aside_once_for_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "BEGUN_AFRESH", set())
    old = open_run(tmp_path)
    go_on(old, upto=6)
    go_on(open_run(tmp_path), upto=8)  # going on with it makes it no fresh start
    fresh = open_run(tmp_path, "fresh")
    assert (tmp_path / "old" / "step_00000005").exists() and fresh.done == 0
    go_on(fresh, upto=6)
    # its cell is run again: it goes on with the fresh one
    assert open_run(tmp_path, "fresh").done == 5


def test_fresh_gets_past_damaged_checkpoints(tmp_path, monkeypatch):
    go_on(open_run(tmp_path), upto=6)
    (tmp_path / "checkpoints" / "step_00000005" / "meta.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged"):
        assert open_run(tmp_path, "fresh").done == 0
    assert (tmp_path / "old").exists()


def test_stop_refuses(tmp_path):
    go_on(open_run(tmp_path), upto=6)
    with pytest.raises(UserError, match="was trained before: pass if_exists"):
        open_run(tmp_path, "stop")


def test_rates_and_horizon_change_with_a_line_in_the_record(tmp_path, capsys):
    go_on(open_run(tmp_path), upto=6)
    run = open_run(tmp_path, config=TINY.replace(num_steps=14, matrix_lr=0.001))
    assert "from step 5 on, num_steps was 12 and is 14" in capsys.readouterr().out
    hyper = run.state.opt_state.hyper
    assert float(hyper["num_steps"]) == 14
    assert float(hyper["lr"]["matrix"]) == pytest.approx(0.001 * TINY.batch_lr_scale)
    go_on(run, upto=11)
    # what was changed before stays in the record
    go_on(open_run(tmp_path, config=TINY.replace(num_steps=13, matrix_lr=0.001)))
    meta = checkpoint.read_meta(tmp_path / "checkpoints")
    assert meta["step"] == 13 and [step for step, _ in meta["changes"]] == [5, 5, 10]


def test_what_mixes_experiments_is_refused(tmp_path):
    go_on(open_run(tmp_path), upto=6)
    with pytest.raises(UserError, match="other settings .packing was 'bestfit' and is 'stream'"):
        open_run(tmp_path, packing="stream")


def test_two_in_one_folder_the_second_is_told_who_is_there(tmp_path):
    run = open_run(tmp_path)
    steps = run.steps([], train.Saving(every=5, seconds=0), writers=[])
    next(steps)
    # a lock is of an open file: another one in this process stands for another process
    with pytest.raises(UserError, match=rf"being written by process {os.getpid()} on .* since"):
        open_run(tmp_path)
    steps.close()
    assert open_run(tmp_path).done == 0


def test_several_may_look_at_once_whether_a_folder_is_free(tmp_path):
    with locks.open_lock(tmp_path / locks.NAME) as another:
        assert locks.take(another, wait=False, shared=True)
        locks.check_free(tmp_path)


def test_who_only_looks_leaves_no_lock_behind(tmp_path):
    locks.check_free(tmp_path)
    locks.check_free(tmp_path / "none")
    locks.check_free("memory://nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_no_way_out_of_the_folder(tmp_path):
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / locks.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not a plain file"):
        locks.check_free(tmp_path / "run")
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_place_that_fails_is_told_of_and_tried_again(tmp_path, whole, monkeypatch):
    """The first two saves fail: the next step says so, and the third has everything."""
    real, failures = saving._write, iter([OSError(5, "Input/output error")] * 2)

    def write(*args):
        for error in failures:
            raise error
        return real(*args)

    monkeypatch.setattr(saving, "_write", write)
    monkeypatch.setattr(runs, "TRY_AGAIN", 0.0)
    run = open_run(tmp_path)
    with pytest.warns(UserWarning, match="no checkpoint was written .*Input/output error"):
        go_on(run)
    assert run.finish()
    check(run, whole, tmp_path)


def test_a_place_that_stays_away_costs_nothing_that_was_trained(tmp_path, whole, monkeypatch):
    real = saving._write

    def write(folder, *args):
        if folder == tmp_path / "checkpoints":
            raise OSError(107, "Transport endpoint is not connected")
        return real(folder, *args)

    monkeypatch.setattr(saving, "_write", write)
    run = open_run(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(UserError) as told:
        go_on(run)
    [kept] = tmp_path.glob("kept-*/step_00000012")
    assert f"the checkpoint of step 12 is in {kept}; move it to" in str(told.value)
    state, _ = checkpoint.restore(kept, run.template)
    assert digest(state) == whole[1]
    assert checkpoint.read_meta(kept)["metric"] is not None, "it may be the best"

    # what the sentence says to do works
    monkeypatch.setattr(saving, "_write", real)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    kept.rename(tmp_path / "checkpoints" / kept.name)
    assert open_run(tmp_path).finished


def test_divergence_names_the_last_good_checkpoint(tmp_path):
    run = open_run(tmp_path)
    real = run.step_fn

    def breaks(state, *batch):
        state, metrics = real(state, *batch)
        if int(state.step) == 9:
            metrics = metrics | {"loss": np.float32("nan")}
        return state, metrics

    run.step_fn = breaks
    with pytest.raises(
        UserError, match=r"lower learning rates.*the last good one is .*step_00000005"
    ):
        go_on(run)
    # the sentence's advice is taken
    assert open_run(tmp_path, config=TINY.replace(matrix_lr=0.001, warmup_steps=3)).done == 5


def test_a_measurement_that_comes_at_single_steps(tmp_path):
    seen = []
    run = open_run(tmp_path)
    once = train.Measurement(lambda params: seen.append(1) or {"x": len(seen)}, every=0, at=(1, 3))
    steps = run.steps([once], train.Saving(every=0, seconds=0), writers=[])
    assert [step.step for step in steps if "x" in step.metrics] == [1, 3, 12]


def test_a_feed_may_look_at_the_state_of_every_step(tmp_path):
    run = open_run(tmp_path)
    looked = []

    def rollouts(cursor):
        for batch in feed(cursor):
            looked.append(int(run.state.step))
            yield batch

    run = dataclasses.replace(run, feed=rollouts, watch_state=True)
    for _ in run.steps([], train.Saving(every=0, seconds=0), writers=[]):
        pass
    assert looked == list(range(12))


def test_no_store_no_metrics_no_files(tmp_path):
    run = train.TrainingRun(TINY, feed, tmp_path, None, IDENTITY)
    assert len(list(run.steps([], train.Saving(every=1), writers=None))) == 12
    assert list(tmp_path.iterdir()) == []


def test_whole_steps_are_profiled_and_a_steps_numbers_are_its_own(tmp_path, monkeypatch):
    profile = lambda folder, *trace: contextlib.nullcontext(lambda step, state: None)
    monkeypatch.setattr(runs, "trace_window", profile)
    run = train.TrainingRun(TINY, feed, tmp_path, None, IDENTITY, peak_flops=1e9)
    steps = list(run.steps([], train.Saving(every=0), writers=None, trace=(3, 5)))
    # the state is waited for before the first of them and after the last
    assert [step.step for step in steps if step.state is not None] == [2, 5, 12]
    assert run.seconds == pytest.approx(sum(step.metrics["step_time"] for step in steps))
    for metrics in (step.metrics for step in steps):
        flops_per_s = TINY.flops_per_token * metrics["tokens_per_s"]
        assert metrics["mfu"] == pytest.approx(flops_per_s / 1e9)


def test_a_checkpoint_remembers_the_rows_of_one_device():
    layout = types.SimpleNamespace(size=lambda *axes: 4)
    config = TINY.replace(microbatch=8, total_batch_size=128)
    assert runs.portable(config, layout) == config.replace(microbatch=2)
    assert runs.portable(config, None) == config


def test_metadata_is_json_and_names_the_training(tmp_path):
    go_on(open_run(tmp_path), upto=6)
    meta = checkpoint.read_meta(tmp_path / "checkpoints")
    json.dumps(meta)
    assert meta["settings"] == dict(source="text", packing="bestfit") and meta["tokenizer"] == "t"


def test_each_save_is_told_once_it_is_written_the_last_one_too(tmp_path):
    """Also when the loop is left: what sends checkpoints home must not miss the last."""
    told = []

    def then(step, path):
        assert checkpoint.read_meta(path)["step"] == step
        told.append(step)

    run = open_run(tmp_path)
    steps = run.steps([], train.Saving(every=3, seconds=0, then=then), writers=[])
    with contextlib.closing(steps):
        for step in steps:
            if step.step == 10:
                break
    assert told == [3, 6, 9]
    go = open_run(tmp_path)
    list(go.steps([], train.Saving(every=0, seconds=0, then=then), writers=[]))
    assert told == [3, 6, 9, 12]


def test_a_checkpoint_is_rated_by_its_own_step(tmp_path):
    run = open_run(tmp_path)
    rates = dataclasses.replace(measure(run), gives="val_bpb")
    list(run.steps([rates], train.Saving(every=5, seconds=0, keep=9), writers=[]))
    metrics = [
        checkpoint.read_meta(path)["metric"] for path in (tmp_path / "checkpoints").iterdir()
    ]
    assert len(metrics) == 3 and None not in metrics


def test_a_measurement_that_fails_costs_no_step(tmp_path):
    def fails(params):
        raise RuntimeError("out of memory")

    run = open_run(tmp_path)
    bad = train.Measurement(fails, every=0, at=(7,))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(run.steps([bad], train.Saving(every=0, seconds=0), writers=[]))
    assert open_run(tmp_path).done == 7


def test_a_run_that_was_overtaken_is_told(tmp_path):
    """Opened, then trained by somebody else who is gone again: nothing is overwritten."""
    early = open_run(tmp_path)
    go_on(open_run(tmp_path), upto=6)
    with pytest.raises(UserError, match="written by another training since this run was opened"):
        go_on(early)
    assert open_run(tmp_path).done == 5


def test_a_save_that_failed_costs_the_next_one_nothing(tmp_path, monkeypatch):
    """The save of step 5 fails in flight and is met by the last one, which is written all the
    same.
    """
    real = saving._write

    def write(folder, record, *rest):
        if record["step"] == 5:
            raise OSError(5, "Input/output error")
        return real(folder, record, *rest)

    monkeypatch.setattr(saving, "_write", write)
    run = open_run(tmp_path)
    with pytest.warns(UserWarning, match="no checkpoint was written"):
        go_on(run)
    assert run.finish()


def test_what_was_noted_by_one_who_holds_it_is_kept(tmp_path):
    """Notes stay the object that a caller has taken, in a run that goes on too."""
    run = open_run(tmp_path)
    run.notes["seen"] = []
    go_on(run, upto=6)
    again = open_run(tmp_path)
    held = again.notes
    assert again.done == 5
    held["seen"].append("here")
    go_on(again)
    assert open_run(tmp_path).notes == {"seen": ["here"]}


def test_what_was_noted_of_steps_that_are_lost_is_lost_with_them(tmp_path):
    run = open_run(tmp_path)
    run.notes["seen"] = []
    for step in run.steps([], train.Saving(every=5, seconds=0), writers=[]):
        run.notes["seen"].append(step.step)
        if step.step == 7:
            run.notes["late"] = "of a step that is lost"
            break
    assert run.done == 5 and run.notes == {"seen": [1, 2, 3, 4, 5]}


def test_a_run_begins_on_the_devices_of_its_layout(tmp_path):
    layout = parallel.make_layout("dp", TINY, jax.devices()[:1])
    run = train.TrainingRun(TINY, feed, tmp_path, None, IDENTITY, layout=layout)
    assert run.state.params["head"].sharding.mesh == layout.mesh


def test_a_lock_names_only_who_holds_it_now(tmp_path):
    (tmp_path / locks.NAME).write_text("process 1 on a machine with a long name " * 9)
    with locks.working_in(tmp_path):
        holder = (tmp_path / locks.NAME).read_text()
    assert holder.startswith(f"process {os.getpid()} on ") and "long name" not in holder
