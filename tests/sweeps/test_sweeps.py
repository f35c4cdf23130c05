"""Sweeps: what is drawn and refused, workers killed at random, trials equal to plain training, the wandb protocol, known laws."""

import csv
import json
import math
import random
import resource
import subprocess
import threading
import time

import jax
import numpy as np
import pytest

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.sweeps import drivers, journal, pictures, presets, scaling, space, trials
from lib.sweeps.journal import Journal, Trial
from lib.train import step as train
from tests.helpers import programs
from tests.helpers.wandb_server import StandIn

LR = {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0}


def sweep(method="grid", parameters=None, **more):
    return space.check(
        dict(
            method=method,
            parameters=parameters or {"depth": {"values": [1, 2, 3]}, "seed": {"values": [1, 2]}},
            **more,
        )
    )


# ---- the schema ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, said",
    [
        ([], "mapping"),
        ({"parameters": {}}, "needs parameters"),
        ({"method": "annealing", "parameters": {"depth": {"value": 1}}}, "bayes, grid, random"),
        ({"parameters": {"depth": {"value": 1}}, "run_cap": 0}, "run_cap"),
        ({"parameters": {"depth": {"value": 1}}, "metric": {"name": "accuracy"}}, "val_bpb"),
        ({"parameters": {"dept": {"value": 1}}}, "dept"),
        ({"parameters": {"depth": 4}}, r"write \{value: 4\}"),
        ({"parameters": {"depth": {"value": "four"}}}, "not of type int"),
        ({"parameters": {"depth": {"values": []}}}, "at least one"),
        ({"parameters": {"depth": {"values": [1, 1]}}}, "twice"),
        (
            {"parameters": {"depth": {"values": [1, 2], "probabilities": [0.5, 0.6]}}},
            "adding up to 1",
        ),
        (
            {"parameters": {"depth": {"min": 1, "max": 4, "distribution": "uniform"}}},
            "whole numbers",
        ),
        ({"parameters": {"matrix_lr": {"min": 1.0, "max": 0.1}}}, "min below max"),
        (
            {
                "parameters": {
                    "matrix_lr": {"min": 0.0, "max": 0.1, "distribution": "log_uniform_values"}
                }
            },
            "above 0",
        ),
        (
            {"parameters": {"matrix_lr": {"min": 0.1, "max": 1.0, "distribution": "beta"}}},
            "distribution 'beta'",
        ),
        ({"parameters": {"mlp": {"min": 1, "max": 2}}}, "of type str"),
        (
            {"method": "grid", "parameters": {"matrix_lr": {"min": 0.1, "max": 1.0}}},
            "grid cannot walk",
        ),
        (
            {"parameters": {"depth": {"value": 1}}, "early_terminate": {"type": "envelope"}},
            "hyperband",
        ),
        (
            {"parameters": {"depth": {"value": 1}}, "early_terminate": {"type": "hyperband"}},
            "min_iter",
        ),
        (
            {
                "parameters": {"depth": {"value": 1}},
                "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 1},
            },
            "eta",
        ),
    ],
)
def test_a_wrong_sweep_is_refused_in_one_sentence(spec, said):
    with pytest.raises(UserError, match=said):
        space.check(spec)


def test_draws_stay_within_what_was_asked():
    parameters = {
        "matrix_lr": LR,
        "weight_decay": {"min": -2.0, "max": 0.0, "distribution": "log_uniform"},
        "depth": {"min": 2, "max": 5},
        "warmup_steps": {"min": 3, "max": 40, "q": 5, "distribution": "q_uniform"},
        "scalar_lr": {"mu": 0.5, "sigma": 0.1, "distribution": "normal"},
        "num_steps": {"min": 16, "max": 300, "q": 16, "distribution": "q_log_uniform_values"},
        "mlp": {"values": ["relu2", "gelu"], "probabilities": [1, 0]},
    }
    for method in ("random", "bayes"):
        spec, found = sweep(method, parameters), []
        for n in range(30):
            a = suggest.ask(spec, found, seed=3)
            found.append(Trial(str(n), n, a, "done", value=float(n % 7), reports={1: 2.0, 2: 1.0}))
            assert (
                0.01 <= a["matrix_lr"] <= 1
                and math.exp(-2) <= a["weight_decay"] <= 1
                and a["depth"] in (2, 3, 4, 5)
            )
            assert (
                a["warmup_steps"] in range(5, 41, 5)
                and a["num_steps"] in range(16, 301, 16)
                and a["mlp"] == "relu2"
            )
            assert isinstance(a["num_steps"], int) and isinstance(a["warmup_steps"], int)
        assert len({space.key(t.assignment) for t in found}) == 30
        # logarithmic: a plain uniform has 0.5
        assert np.median([t.assignment["matrix_lr"] for t in found]) < 0.4
        # a draw is a function of what is known
        assert suggest.ask(spec, found[:9], seed=3) == found[9].assignment


def test_grid_walks_every_combination_once_and_bayes_ends_when_nothing_is_left():
    spec = sweep()
    assert space.size(spec) == space.limit(spec) == 6
    assert space.grid(spec)[:3] == [
        {"depth": 1, "seed": 1},
        {"depth": 1, "seed": 2},
        {"depth": 2, "seed": 1},
    ]
    for method in ("grid", "random", "bayes"):
        spec, found = sweep(method), []
        while (a := suggest.ask(spec, found, seed=0)) is not None:
            found.append(Trial(str(len(found)), len(found), a, "done", value=1.0 * a["depth"]))
        assert sorted((t.assignment["depth"], t.assignment["seed"]) for t in found) == [
            (d, s) for d in (1, 2, 3) for s in (1, 2)
        ]


def test_bayes_finds_what_random_search_finds_later():
    loss = lambda a: (math.log(a["matrix_lr"]) + 3.2) ** 2 + 0.3 * (a["depth"] - 2) ** 2

    def search(method, seed):
        spec, found = (
            sweep(method, {"matrix_lr": LR | {"min": 1e-4}, "depth": {"min": 1, "max": 6}}),
            [],
        )
        for n in range(40):
            a = suggest.ask(spec, found, seed)
            found.append(Trial(str(n), n, a, "done", value=loss(a)))
        return np.mean([t.value for t in found[20:]])

    assert np.mean([search("bayes", s) for s in range(3)]) < 0.5 * np.mean(
        [search("random", s) for s in range(3)]
    )


def test_a_whole_assignment_makes_the_config_that_from_depth_makes():
    config = space.config_of(
        dict(depth=2.0, without="muon", matrix_lr=1, num_steps=5, vocab_size=100, source="stdlib")
    )
    assert config == Config.from_depth(
        2, optimizer="adamw", matrix_lr=1.0, num_steps=5, vocab_size=100
    )
    for part, off in space.PARTS.items():
        assert all(
            getattr(space.config_of(dict(depth=2, without=part)), k) == v for k, v in off.items()
        )
    with pytest.raises(UserError, match="use n_kv_head"):
        space.config_of(dict(depth=4, n_kv_head=3))


def test_hyperband_keeps_the_best_share_at_each_rung():
    spec = sweep(early_terminate=dict(type="hyperband", min_iter=1, eta=3))
    assert hyperband.rungs(spec)[:4] == [1, 3, 9, 27]
    assert hyperband.rungs(sweep(early_terminate=dict(type="hyperband", max_iter=27, s=2))) == [3, 9]
    at = lambda n, values: Trial(str(n), n, {}, reports=dict(enumerate(values, 1)))
    others = [at(i, [float(i)]) for i in range(9)]
    stopped = [hyperband.should_stop(spec, others, t) for t in others]
    assert stopped == [False] * 3 + [True] * 6
    first = at(99, [50.0])
    assert not hyperband.should_stop(spec, [first], first)  # nobody to compare with
    late = at(7, [7.0, 0.0, 0.0])  # only its best counts, and only against those who came as far
    assert not hyperband.should_stop(spec, [*others, late, at(3, [1.0, 1.0, 1.0])], late)
    up = sweep(
        metric=dict(name="loss", goal="maximize"),
        early_terminate=dict(type="hyperband", min_iter=1, eta=3),
    )
    assert hyperband.should_stop(up, others, others[0]) and not hyperband.should_stop(up, others, others[8])


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("budget", presets.BUDGETS)
def test_presets_are_valid_wandb_sweeps_of_trainable_models(name, budget, tmp_path):
    spec = presets.preset(name, budget, vocab_size=1024)
    for a in space.grid(spec) if spec["method"] == "grid" else [suggest.ask(spec, [], 0)]:
        config = space.config_of(space.constants(spec) | a)
        assert config.vocab_size == 1024 and config.num_steps >= 1
        if "target_flops" in a | space.constants(spec):
            wanted = (a | space.constants(spec))["target_flops"]
            assert (
                config.flops_per_token * config.total_batch_size * config.num_steps
                == pytest.approx(wanted, rel=0.3)
            )
    (tmp_path / "s.json").write_text(json.dumps(spec))
    assert presets.from_file(tmp_path / "s.json", budget)["parameters"] == spec["parameters"]
    with pytest.raises(UserError, match="varies"):
        presets.preset(
            name,
            budget,
            **{next(n for n in space.varied(spec) if n != "without"): 1}
            if name != "ablate"
            else {"seed": 1},
        )


# ---- the journal: several processes, killed at random ------------------------------------------------------------------


def test_workers_killed_at_random_lose_and_double_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "TRIES", 1000)
    spec = sweep(parameters={"depth": {"values": list(range(1, 13))}, "seed": {"values": [1, 2]}})
    journal.create(tmp_path, spec)
    start = lambda n: programs.start("sweep_worker", tmp_path, n, stdout=subprocess.PIPE)
    rng, workers, killed = random.Random(0), [start(n) for n in range(3)], 0
    while killed < 4:
        victim = rng.randrange(3)
        if not workers[victim].stdout.readline():  # nothing was left for it
            break
        time.sleep(0.4 * rng.random())
        workers[victim].kill()  # SIGKILL: no clean-up of any kind
        workers[victim].wait()
        killed += 1
        workers[victim] = start(100 + killed)
    said = [w.communicate(timeout=100)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0, 0], said
    assert killed >= 2, "on a machine so slow that all was done before, this tells nothing"
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


def test_without_locks_the_earlier_claim_holds(book, monkeypatch):
    monkeypatch.setattr(journal, "_flock", lambda file, wait: None)
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


def test_what_was_given_back_does_not_count_as_a_death_and_torn_lines_do_not_count(book):
    boss = drivers.Local(book, sweep())
    for _ in range(journal.TRIES + 2):
        trial = boss.take()[0]
        assert trial.assignment == {"depth": 1, "seed": 1}
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


# ---- training --------------------------------------------------------------------------------------------------------

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
    for n in range(2):
        assert trials.guarded(lambda: 1 / 0, bench, said.append).reason.startswith(
            "ZeroDivisionError"
        )
    with pytest.raises(ZeroDivisionError):
        trials.guarded(lambda: 1 / 0, bench, said.append)
    bench.unexpected = 0
    assert len(said) == 2 and "Traceback" in said[0]


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


# ---- wandb: the real client against a stand-in for the server ------------------------------------------------------------


@pytest.fixture
def standin():
    server = StandIn()
    yield server
    server.shutdown()


def quiet_run(started):
    """start_run without wandb: keeps what it was told in `started`."""

    def start_run(id, assignment, stop):
        started.setdefault(id, []).append(
            kept := dict(assignment=assignment, rows=[], code=None, stop=stop)
        )
        return lambda step, values: kept["rows"].append((step, values)), lambda code: kept.update(
            code=code
        )

    return start_run


def test_the_sweep_protocol(standin, tmp_path):
    """Created, joined by id, trials given out, one stopped, one given back and resumed, none trained twice, exit."""
    spec, started = sweep(), {}
    server = server_module.Server(standin.url, "key", pause=0.01)
    path = server_module.create_sweep(server, spec, None, "proj")
    assert path == ("team", "proj", "swp1") and server_module.read_sweep(server, path) == spec
    journal.create(tmp_path, spec)
    worker = lambda book: drivers.Wandb(
        book, spec, server, path, quiet_run(started), say=lambda text: None, poll=0.01
    )
    with Journal(tmp_path) as book:
        boss = worker(book)
        [one] = boss.take()
        standin.failures = 2  # a hiccup of the server costs nothing
        assert (
            one.assignment == {"depth": 1, "seed": 1}
            and boss.report(one, 1, {"val_bpb": 2.0}) == ""
        )
        standin.stop.add(one.id)
        assert boss.report(one, 2, {"val_bpb": 3.0}) == "pruned"
        boss.end(one, "pruned", 3.0)
        [two] = boss.take()
        boss.end(two, "failed", reason="n_kv_head=3 does not divide n_head=4")
        [three] = boss.take()
        boss.end(three, "done", 1.25, steps=7)
        [four] = boss.take()  # and now this runtime vanishes
    with Journal(tmp_path) as book:
        boss = worker(book)
        [again] = boss.take()
        assert (again.id, again.assignment, again.tries) == (four.id, four.assignment, 2), (
            "the same run, at once, without asking"
        )
        boss.end(again, "done", 1.0)
        standin.requeued += [one.id, two.id, three.id]  # the server missed that they ended
        standin.given = 5
        [six] = boss.take()
        assert six.id == "run6" and started[three.id][-1]["code"] == 0, (
            "reported again, not trained again"
        )
        assert started[one.id][-1]["rows"] == [
            (1, {"val_bpb": 2.0}),
            (2, {"val_bpb": 3.0}),
            (None, {"pruned": True}),
        ]
        assert [started[t.id][-1]["code"] for t in (one, two)] == [0, 1] and len(
            started[one.id]
        ) == len(started[two.id]) == 2
        boss.free(six)
        standin.requeued.append(six.id)
        [resumed] = boss.take()
        assert resumed.id == six.id and started[six.id][0]["code"] == 255
        boss.end(resumed, "done", 2.0)
        assert boss.take() == []
    assert (
        started[two.id][0]["rows"][-1] == (None, {"failed": "n_kv_head=3 does not divide n_head=4"})
        and started[two.id][0]["code"] == 1
    )
    assert [t.state for t in journal.trials(tmp_path)] == [
        "pruned",
        "failed",
        "done",
        "done",
        "done",
    ]


def test_a_server_that_says_no_is_quoted(standin):
    with pytest.raises(UserError, match="cannot be reached"):
        server_module.Server("http://127.0.0.1:9", "key", tries=2, pause=0.01)("query")
    standin.failures = 9
    with pytest.raises(UserError, match="503"):
        server_module.Server(standin.url, "key", tries=2, pause=0.01)("query")
    with pytest.raises(UserError, match="ENTITY/PROJECT/ID"):
        server_module.parse_path("swp1")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_with_wandbs_own_client(standin, tmp_path, mode):
    """Runs belong to the sweep, carry their numbers, end with the right code; offline they are kept on disk."""
    pytest.importorskip("wandb")
    env = {
        "WANDB_BASE_URL": standin.url,
        "WANDB_API_KEY": "a" * 40,
        "WANDB_MODE": mode,
        "HOME": str(tmp_path),
        "WANDB_DIR": str(tmp_path),
    }
    done = programs.run("wandb_worker", tmp_path / "sweep", env=env, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [t.state for t in journal.trials(tmp_path / "sweep")] == ["done", "failed"]
    if mode == "online":
        one, two = standin.runs["run1"], standin.runs["run2"]
        assert (
            one["sweep"] == "swp1"
            and one["preempting"]
            and (one["state"], one["exit"]) == ("finished", 0)
            and two["exit"] == 1
        )
        assert (
            one["history"][0]["val_bpb"] == 1.0
            and one["history"][0]["step"] == 3
            and two["summary"]["failed"].startswith("out of memory")
        )
        assert (
            "run1 done {'depth': 1} 1.0 {3: 1.0}" in done.stdout
            and "run2 failed {'depth': 2} None" in done.stdout
        )
    else:
        assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2


# ---- laws ------------------------------------------------------------------------------------------------------------

CHINCHILLA = dict(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)


def synthetic(noise=0.001, seed=0):
    rng = np.random.default_rng(seed)
    return [
        dict(
            N=float(N),
            D=C / 6 / N,
            C=C,
            target_flops=C,
            L=float(scaling.predict(CHINCHILLA, N, C / 6 / N) * np.exp(rng.normal(0, noise))),
        )
        for C in (1e19, 3e19, 1e20, 3e20)
        for N in np.geomspace(0.25, 4, 7) * 7e8 * (C / 1e20) ** 0.45
    ]


def test_fits_recover_the_constants_that_made_the_data():
    runs = synthetic()
    fit = scaling.parametric(runs, draws=12)
    for name, true in CHINCHILLA.items():
        low, high = fit["intervals"][name]
        assert low < high and abs(math.log(fit[name] / true)) < (0.3 if name in "AB" else 0.05), (
            name
        )
    assert fit["a"] == pytest.approx(0.28 / 0.62, abs=0.02) and fit["error"] < 0.002
    exact = scaling.parametric(synthetic(noise=0), draws=2)
    assert all(exact[k] == pytest.approx(v, rel=1e-3) for k, v in CHINCHILLA.items())
    law = scaling.isoflop(runs)
    assert law["used"] == 4 and all(
        b["inside"] and b["N_interval"][0] < b["N"] < b["N_interval"][1] for b in law["budgets"]
    )
    low, high = law["N_opt"]["p_interval"]
    assert low < law["N_opt"]["p"] < high and law["N_opt"]["p"] == pytest.approx(0.4516, abs=0.03)
    assert law["N_opt"]["p"] + law["D_opt"]["p"] == pytest.approx(1, abs=0.01)  # C = 6 N D
    N, D, L = scaling.frontier(fit, 1e20)
    assert N == pytest.approx(law["budgets"][2]["N"], rel=0.1) and 6 * N * D == pytest.approx(1e20)


def test_huber_fit_shrugs_off_an_outlier_and_intervals_cover():
    runs = synthetic()
    runs[5] = runs[5] | {"L": runs[5]["L"] * 1.3}
    assert scaling.parametric(runs, draws=2)["alpha"] == pytest.approx(0.34, abs=0.02)
    inside = [
        low < 0.4516 < high
        for low, high in (
            scaling.isoflop(synthetic(0.002, s), draws=40)["N_opt"]["p_interval"] for s in range(20)
        )
    ]
    assert sum(inside) >= 14, "of twenty 95 % intervals (a parabola is only nearly right)"


def test_the_largest_budget_is_predicted_from_the_smaller_and_too_little_is_said_so():
    rows = scaling.held_out(synthetic(), draws=6)
    assert len(rows) == 7 and {r["C"] for r in rows} == {3e20}
    assert all(abs(r["error"]) < 0.01 and r["low"] < r["predicted"] < r["high"] for r in rows)
    growing = [
        dict(N=n, D=12 * n, C=72 * n * n, L=0.8 + 5 * (72 * n * n) ** -0.15)
        for n in np.geomspace(1e5, 1e7, 6)
    ]
    fit = scaling.series(growing)
    assert fit["E"] == pytest.approx(0.8, abs=0.02) and fit["p"] == pytest.approx(0.15, abs=0.01)
    [last] = scaling.held_out(growing)
    assert abs(last["error"]) < 0.005
    for fit in (scaling.isoflop, scaling.parametric, scaling.series):
        with pytest.raises(UserError):
            fit(growing[:3])
    for losses in ([1, 2, 2, 1], [4, 3, 2, 1 + 1e-9]):  # no minimum at all, or none within reach
        flat = scaling.parabola([1, 2, 4, 8], losses)
        assert flat["inside"] is False and math.isnan(flat["N"])
    hopeless = [r | {"L": 3 - 0.1 * math.log(r["N"])} for r in synthetic()]
    assert scaling.isoflop(hopeless, draws=20)["used"] == 0


def ablation_trials():
    effects = {"": 0.0, "smear": 0.05, "backout": 0.0001, "muon": 0.2}
    return [
        Trial(
            f"{part}{seed}",
            i,
            dict(without=part, seed=seed),
            "done",
            value=1 + 0.3 * seed + effect + 0.002 * math.sin(i * i),
            facts=dict(steps=9, seconds=1.0),
            reports={"3": 2.0, "9": 1.5},
            curve=[[1, 3.0], [9, 1.5]],
            ended=float(i),
        )
        for i, ((part, effect), seed) in enumerate(
            (item, seed) for item in effects.items() for seed in (1, 2, 3)
        )
    ]


def test_paired_differences_see_through_the_spread_of_seeds():
    rows = {r["part"]: r for r in scaling.paired(ablation_trials())}
    assert (
        rows["muon"]["delta"] == pytest.approx(0.2, abs=0.003)
        and rows["muon"]["low"] > 0.19
        and rows["muon"]["pairs"] == 3
    )
    assert rows["backout"]["low"] < 0 < rows["backout"]["high"] and rows[""]["delta"] == 0
    assert math.isnan(
        scaling.paired([t for t in ablation_trials() if t.assignment["seed"] == 1])[1]["low"]
    )


# ---- pictures ----------------------------------------------------------------------------------------------------------


def search_trials(n=24):
    spec, rng = (
        sweep(
            "random",
            {
                "matrix_lr": LR,
                "mlp": {"values": ["relu2", "gelu"]},
                "warmup_steps": {"min": 1, "max": 9},
            },
        ),
        np.random.default_rng(0),
    )
    found = []
    for i in range(n):
        a = suggest.ask(spec, found, 0)
        value = (math.log(a["matrix_lr"]) + 2) ** 2 + 0.01 * rng.normal()
        state = "failed" if i == 3 else "pruned" if i % 4 == 1 else "done"
        found.append(
            Trial(
                f"t{i}",
                i,
                a,
                state,
                value=value if state == "done" else None,
                ended=float(i),
                facts=dict(seconds=1.0),
                reason="diverged" * (i == 3),
                reports={s: value + 5 / s for s in ((2, 4) if state == "pruned" else (2, 4, 6))},
                curve=[[s, value + 6 / s] for s in range(1, 7)],
            )
        )
    return spec, found


def test_every_picture_is_drawn_and_every_number_is_in_a_csv(tmp_path):
    spec, found = search_trials()
    shares = suggest.importance(spec, found)
    assert max(shares, key=shares.get) == "matrix_lr" and sum(shares.values()) == pytest.approx(1)
    runs = synthetic()
    law, whole = scaling.isoflop(runs, draws=20), scaling.parametric(runs, draws=4)
    rows = scaling.held_out(runs, draws=4)
    growing = [
        dict(N=n, D=12 * n, C=72 * n * n, L=0.8 + 5 * (72 * n * n) ** -0.15)
        for n in np.geomspace(1e5, 1e7, 6)
    ]
    table = scaling.paired(ablation_trials())
    figures = [
        pictures.best_so_far(found, spec),
        pictures.curves(found, spec),
        pictures.parallel(found, spec),
        pictures.importance(shares),
        pictures.isoflop(law, "val_bpb"),
        pictures.frontier(law, whole),
        pictures.frontier(law),
        pictures.predicted(rows, "val_bpb"),
        pictures.series(growing, scaling.series(growing), "val_bpb"),
        pictures.ablation(table, "val_bpb"),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
    tables.write_csv(tmp_path / "trials.csv", tables.trial_rows(found))
    back = list(csv.DictReader(open(tmp_path / "trials.csv")))
    assert (
        len(back) == 24
        and float(back[0]["value"]) == found[0].value
        and back[3]["reason"] == "diverged"
    )
    assert len(tables.curve_rows(found)) == sum(len(t.reports) + len(t.curve) for t in found)
    assert "without muon" in tables.ablation_table(table) and "+0.2" in tables.ablation_table(
        table
    )
    assert tables.leaders(found).splitlines()[1].split()[0] == str(tables.best_of(found).number)
