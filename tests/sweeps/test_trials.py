"""Trials equal plain training, alone, interrupted and several at once; what fails is told."""

import contextlib
import itertools
import math
import types

import jax
import numpy as np
import pytest

from lib import train
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.sweeps import drivers, journal, population, space, trials
from lib.sweeps.journal import Journal
from tests.helpers.sweeps import sweep

TINY = dict(
    depth=1,
    aspect_ratio=32,
    head_dim=16,
    sequence_len=32,
    total_batch_size=64,
    microbatch=2,
    num_steps=6,
    warmup_steps=2,
    scan_layers=False,
    loss_chunk=64,
    eval_bytes=600,
    evals=3,
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(60):
        (folder / f"{i}.txt").write_text(
            " ".join(rng.choice("tea sea bee tree free see the green".split(), 60)) + f" {i}.\n"
        )
    tokenizer = Tokenizer.train((p.read_text() for p in sorted(folder.glob("*.txt"))), 280)
    return trials.Bench(tokenizer, cache_dir=folder / "cache"), str(folder / "*.txt")


@pytest.fixture
def small(bench, tmp_path):
    """(driver, bench) of a local sweep: small(parameters, method=…) with TINY's constants."""
    bench, source = bench
    books = []

    def make(parameters, method="grid", book=None, **more):
        spec = space.check(
            space.with_constants(sweep(method, parameters, **more), dict(TINY, source=source))
        )
        journal.create(tmp_path, spec)
        books.append(Journal(tmp_path))
        return drivers.Local(books[-1], spec, say=lambda text: None), bench

    yield make
    for book in books:
        book.close()


def plain(config, settings, bench):
    """The losses of 02_train's loop: train.steps and nothing else."""
    return [
        s.metrics["loss"]
        for s in train.steps(
            train.make_train_step(config),
            train.init_state(config),
            bench.batches(config, settings),
            config,
        )
    ]


@pytest.mark.slow
def test_a_trial_is_the_run_that_the_training_loop_makes(bench):
    bench, source = bench
    config, settings = bench.prepare(dict(TINY, source=source, matrix_lr=0.1))
    seen = []
    outcome = trials.train_trial(
        config, settings, bench, report=lambda n, values: seen.append((n, values)) or ""
    )
    assert [loss for _, loss in outcome.curve] == plain(config, settings, bench)
    assert (
        [n for n, _ in seen] == [2, 4, 6]
        and outcome.state == "done"
        and seen[-1][1] == outcome.values
    )
    assert (
        outcome.facts["tokens"] == 6 * 64
        and outcome.facts["flops"] == 6 * 64 * config.flops_per_token
    )


def test_a_trials_seed_orders_its_text_too(bench):
    bench, source = bench
    first = []
    for seed in (0, 0, 1):
        config, settings = bench.prepare(dict(TINY, source=source, seed=seed))
        with contextlib.closing(bench.batches(config, settings)) as batches:
            first.append(np.asarray(next(batches)[0]).tolist())
    assert first[0] == first[1] != first[2]


def test_a_trials_time_counts_its_validations(bench, monkeypatch):
    """By a clock that goes on by a second whenever it is read: six steps and three validations."""
    bench, source = bench
    config, settings = bench.prepare(dict(TINY, source=source))
    clock = itertools.count()
    monkeypatch.setattr(trials, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    timing = trials.time_one(config, settings, bench)
    assert timing == (1, pytest.approx(trials.flops_of(config) / (6 + 3)))


def test_trials_that_differ_in_rates_compile_nothing_new(small):
    boss, bench = small(
        {
            "matrix_lr": {"values": [0.02, 0.05]},
            "seed": {"values": [1, 2]},
            "weight_decay": {"values": [0.1, 0.3]},
            "warmup_steps": {"values": [1, 3]},
            "final_lr_frac": {"values": [0.0, 0.1]},
        },
        run_cap=4,
    )
    trials.run(boss, boss.take(), bench)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
    )
    try:
        while taken := boss.take():
            trials.run(boss, taken, bench)
        assert compiled == [] and [t.state for t in boss.book.trials()] == ["done"] * 4
        jax.jit(lambda x: x * 3.25 + 1)(2.0)
        assert compiled, "the listener hears compilations"
    finally:
        jax.monitoring.clear_event_listeners()


def test_failures_are_recorded_with_their_reason_and_the_worker_goes_on(small, monkeypatch):
    boss, bench = small(
        {
            "microbatch": {"values": [3, 2]},
            "matrix_lr": {"values": [0.1, 1e38]},
            "seed": {"values": [1, 2]},
        }
    )
    real = bench.validate

    def validate(params, config, settings):
        if config.seed == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes")
        return real(params, config, settings)

    monkeypatch.setattr(bench, "validate", validate)
    monkeypatch.setattr(
        train,
        "make_train_step",
        lambda config, make=train.make_train_step: (
            pytest.fail("compiled") if config.microbatch == 3 else make(config)
        ),
    )
    while taken := boss.take():
        trials.run(boss, taken, bench)
    found = {
        (t.assignment["microbatch"], t.assignment["matrix_lr"], t.assignment["seed"]): t
        for t in boss.book.trials()
    }
    assert len(found) == 8
    assert all(
        t.state == "failed" and "not a multiple of microbatch" in t.reason
        for k, t in found.items()
        if k[0] == 3
    )
    assert found[2, 0.1, 1].state == "done" and found[2, 0.1, 1].value > 0
    assert "diverged" in found[2, 1e38, 1].reason and found[2, 1e38, 1].value is None
    assert "out of memory" in found[2, 0.1, 2].reason


def test_the_third_unforeseen_error_in_a_row_stops_the_worker(bench):
    bench, _ = bench
    said = []
    for _ in range(2):
        assert trials.guarded(lambda: 1 / 0, bench, said.append).reason.startswith(
            "ZeroDivisionError"
        )
    with pytest.raises(ZeroDivisionError):
        trials.guarded(lambda: 1 / 0, bench, said.append)
    bench.unexpected = 0
    assert len(said) == 2 and "Traceback" in said[0]


def test_a_trial_that_went_well_ends_the_row(bench, monkeypatch):
    bench, _ = bench
    for outcome, unexpected in (
        (trials.Outcome("done", dict(val_bpb=math.nan)), 3),
        (trials.Outcome("done", dict(val_bpb=1.0)), 0),
        (trials.Outcome("pruned", dict(val_bpb=1.0)), 0),
        # a bad combination is no sign that all is well again
        (trials.Outcome("failed", reason="depth=0"), 2),
    ):
        monkeypatch.setattr(bench, "unexpected", 2)
        trials._measured(outcome, "val_bpb", dict(source="text"), bench)
        assert bench.unexpected == unexpected


def test_a_failed_trial_has_no_value_to_compare(tmp_path, monkeypatch):
    ended = []
    driver = types.SimpleNamespace(
        spec=dict(metric=dict(name="val_bpb")),
        end=lambda trial, state, value, *more, **facts: ended.append((state, value)),
    )
    monkeypatch.setattr(trials, "_folder", lambda driver, trial: tmp_path / "trial" / "checkpoints")
    for state in ("done", "pruned", "failed"):
        trials._settle(driver, None, trials.Outcome(state, dict(val_bpb=2.0)), print)
    assert ended == [("done", 2.0), ("pruned", 2.0), ("failed", None)]


def test_results_that_are_no_numbers_end_the_sweep_and_not_the_budget(small, monkeypatch):
    boss, bench = small({"seed": {"values": list(range(9))}})
    monkeypatch.setattr(bench, "validate", lambda *args: dict(val_bpb=math.inf, val_loss=2.0))
    monkeypatch.setattr(bench, "unexpected", 0)
    with pytest.raises(UserError, match="3 trials in a row failed.* val_bpb is inf: is there"):
        while taken := boss.take():
            trials.run(boss, taken, bench)
    found = boss.book.trials()
    assert [t.state for t in found] == ["failed"] * 3 and "val_bpb is inf" in found[0].reason


def test_a_source_without_held_out_text_is_refused_before_anything_is_compiled(bench, monkeypatch):
    bench, source = bench
    alone = trials.Bench(bench.tokenizer, cache_dir=bench.cache_dir)
    config, settings = alone.prepare(dict(TINY, source=source))
    alone.check_held_out(settings)
    monkeypatch.setattr(trials.data, "documents", lambda *args, **kwargs: [])
    with pytest.raises(UserError, match="no text to measure on.*more documents"):
        alone.check_held_out(settings | dict(eval_bytes=601))


def test_only_what_surely_does_not_fit_is_refused_before_it_is_tried(bench, monkeypatch):
    """The estimate errs by less than a half."""
    bench, source = bench
    needed = sum(trials.estimate_memory(bench.prepare(dict(TINY, source=source))[0]).values())
    monkeypatch.setattr(bench, "memory", needed / 1.4)
    bench.prepare(dict(TINY, source=source))
    monkeypatch.setattr(bench, "memory", needed / 1.6)
    with pytest.raises(UserError, match="lower microbatch or depth"):
        bench.prepare(dict(TINY, source=source))


def test_a_checkpoint_is_progress(small):
    boss, bench = small({"seed": {"values": [6]}})
    bench.save_seconds, usual = 0.0, bench.save_seconds
    try:
        taken = boss.take()
        trials.run(boss, taken, bench)
    finally:
        bench.save_seconds = usual
    events = [e for _, events in journal._events(boss.book.folder) for e in events]
    assert [e["step"] for e in events if e["e"] == "saved"] == [1, 2, 3, 4, 5]
    assert boss.book.trials()[0].reached == 6


def test_facts_are_those_of_what_was_trained():
    config = space.config_of(TINY)
    facts = trials.facts_of(config, 4, 1.234)
    assert (facts["tokens"], facts["steps"], facts["num_steps"]) == (4 * 64, 4, 6)
    assert facts["flops"] == 4 * 64 * config.flops_per_token and facts["seconds"] == 1.23


def test_a_pruned_trial_stops_at_its_validation(small):
    boss, bench = small(
        {
            "matrix_lr": {"values": [0.1, 1e-9]},
            "embedding_lr": {"values": [1.0]},
            "unembedding_lr": {"value": 0.01},
        },
        early_terminate=dict(type="hyperband", min_iter=1, eta=2),
    )
    boss.spec["parameters"]["embedding_lr"] = {"values": [1.0]}
    while taken := boss.take():
        trials.run(boss, taken, bench)
    good, bad = boss.book.trials()
    assert (good.state, good.facts["steps"]) == ("done", 6) and (bad.state, bad.facts["steps"]) == (
        "pruned",
        2,
    )


def test_an_interrupted_trial_goes_on_from_its_checkpoint_as_if_nothing_had_been(small):
    boss, bench = small({"seed": {"values": [5]}})
    config, settings = bench.prepare(space.constants(boss.spec) | {"seed": 5})
    reported, real = [], boss.report
    boss.report = lambda *args: (real(*args), reported.append(args))[0]
    [(trial, outcome)] = trials.run(boss, boss.take(), bench, stop=lambda: len(reported) == 1)
    assert (
        outcome.state == "free"
        and 0 < outcome.facts["steps"] < 6
        and boss.book.trials()[0].state == "lost"
    )
    [(trial, outcome)] = trials.run(boss, boss.take(), bench)
    assert outcome.state == "done" and [loss for _, loss in outcome.curve] == plain(
        config, settings, bench
    )
    assert list(boss.book.trials()[0].reports) == [2, 4, 6]
    assert not (boss.book.folder / "trials" / trial.id).exists()


def test_a_trial_takes_the_seconds_of_all_its_workers():
    run = types.SimpleNamespace(config=None, notes=dict(seconds=1000.0))
    assert 1000 <= trials.Progress(run).seconds < 1010


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1, 1, 1), (1, 2)])
def test_a_population_is_its_members_trained_apart(bench, seeds):
    bench, source = bench
    rates = zip((0.02, 0.3, 0.1), (0.1, 0.3, 0.2), (1, 3, 2), seeds)
    assignments = [
        dict(TINY, source=source, matrix_lr=lr, weight_decay=wd, warmup_steps=w, seed=s)
        for lr, wd, w, s in rates
    ]
    configs, (settings, *_) = zip(*(bench.prepare(a) for a in assignments))
    outcomes = population.train_population(list(configs), settings, bench)
    for config, outcome in zip(configs, outcomes):
        alone = trials.train_trial(config, settings, bench)
        np.testing.assert_allclose(
            [loss for _, loss in outcome.curve], [loss for _, loss in alone.curve], rtol=2e-5
        )
        assert (
            outcome.values["val_bpb"] == pytest.approx(alone.values["val_bpb"], rel=2e-5)
            and outcome.state == "done"
        )


def test_one_member_that_diverges_or_is_stopped_does_not_touch_the_others(bench):
    bench, source = bench
    configs, (settings, *_) = zip(
        *(
            bench.prepare(dict(TINY, source=source, seed=1, matrix_lr=lr))
            for lr in (0.05, 1e38, 0.02)
        )
    )
    sick = population.train_population(
        list(configs), settings, bench, report=lambda i, n, values: "pruned" if i == 2 else ""
    )
    assert (
        [o.state for o in sick] == ["done", "failed", "pruned"]
        and "diverged" in sick[1].reason
        and sick[2].facts["steps"] == 2
    )
    well = trials.train_trial(configs[0], settings, bench)
    assert sick[0].values["val_bpb"] == pytest.approx(well.values["val_bpb"], rel=2e-5)


def test_a_worker_trains_several_trials_at_once_where_shapes_and_horizons_agree(small):
    boss, bench = small(
        {"num_steps": {"values": [6, 4]}, "matrix_lr": {"values": [0.02, 0.05, 0.1]}}, run_cap=4
    )
    trials.run(boss, boss.take(4), bench)
    assert [
        (t.state, t.facts["num_steps"], t.facts.get("population")) for t in boss.book.trials()
    ] == [("done", 6, 3)] * 3 + [("done", 4, None)]
    assert boss.take() == []
