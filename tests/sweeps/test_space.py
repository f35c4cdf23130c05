"""The schema of a sweep, what is drawn from it, hyperband, presets."""

import json
import math

import numpy as np
import pytest

from lib.config import Config
from lib.files import UserError
from lib.sweeps import hyperband, presets, space, suggest
from lib.sweeps.journal import Trial
from tests.helpers.sweeps import LR, sweep


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


@pytest.mark.parametrize("goal, target, over", [("minimize", 0.5, 3), ("maximize", 0.3, 1)])
def test_no_trial_begins_behind_one_that_reached_the_target(goal, target, over):
    metric = dict(name="val_bpb", goal=goal, target=target)
    parameters = dict(depth=dict(values=[1, 2, 3, 4, 5]))
    spec = space.check(dict(method="grid", metric=metric, parameters=parameters))
    found = []
    while (assignment := suggest.ask(spec, found, seed=0)) is not None:
        value = 0.9 - 0.2 * len(found)
        found.append(Trial(str(len(found)), len(found), assignment, "done", value=value))
    assert len(found) == over
    with pytest.raises(UserError, match="target 'low' is no number"):
        space.check(spec | dict(metric=dict(name="val_bpb", target="low")))


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


def test_steps_and_whole_numbers_reach_both_bounds_and_nothing_beyond():
    entry = {"min": 2, "max": 13, "q": 5, "distribution": "q_uniform"}
    assert [space.quantised(x, entry) for x in (2.1, 7.6, 13)] == [5, 10, 10]
    rng = np.random.default_rng(0)
    entry = {"min": 2, "max": 4, "distribution": "int_uniform"}
    assert {space.draw(entry, rng) for _ in range(60)} == {2, 3, 4}


def test_what_ended_without_a_number_tells_the_estimator_nothing():
    spec = sweep("bayes", {"depth": {"min": 1, "max": 6}})
    hopeless = Trial("0", 0, {"depth": 1}, "done", value=math.nan)
    _, parameters = suggest._study(spec, [hopeless])
    assert suggest._as_optuna(hopeless, parameters).state.name == "FAIL"


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
def test_the_estimator_is_told_the_goal(goal):
    spec = sweep("bayes", {"depth": {"min": 1, "max": 6}}, metric=dict(name="loss", goal=goal))
    study, _ = suggest._study(spec, [])
    assert study.direction.name == goal.upper()


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
    # wandb's own word, which changes nothing here
    strict = sweep(early_terminate=spec["early_terminate"] | dict(strict=True))
    assert hyperband.rungs(strict) == hyperband.rungs(spec)
    assert hyperband.rungs(sweep(early_terminate=dict(type="hyperband", max_iter=27, s=2))) == [
        3,
        9,
    ]
    at = lambda n, values: Trial(str(n), n, {}, reports=dict(enumerate(values, 1)))
    others = [at(i, [float(i)]) for i in range(9)]
    stopped = [hyperband.should_stop(spec, others, t) for t in others]
    assert stopped == [False] * 3 + [True] * 6
    # a trial's best counts, not its latest, and nothing that it has done beyond the rung
    steady = [at(i, [v, v, v]) for i, v in enumerate((3.0, 4.0, 5.0))]
    early = at(8, [1.0, 6.0, 9.0])
    assert not hyperband.should_stop(spec, [*steady, early], early)
    lucky = at(9, [9.0, 9.0, 9.0, 0.1])
    assert hyperband.should_stop(spec, [*steady, lucky], lucky)
    first = at(99, [50.0])
    assert not hyperband.should_stop(spec, [first], first)  # nobody to compare with
    late = at(7, [7.0, 0.0, 0.0])  # only its best counts, and only against those who came as far
    assert not hyperband.should_stop(spec, [*others, late, at(3, [1.0, 1.0, 1.0])], late)
    # those that have not come so far say nothing about it
    behind = [at(i, [9.0]) for i in range(20, 26)]
    assert hyperband.should_stop(spec, [*steady, *behind], steady[1])
    up = sweep(
        metric=dict(name="loss", goal="maximize"),
        early_terminate=dict(type="hyperband", min_iter=1, eta=3),
    )
    assert hyperband.should_stop(up, others, others[0]) and not hyperband.should_stop(
        up, others, others[8]
    )


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


def test_a_sweep_made_for_wandbs_agent_is_taken_and_flags_that_would_be_lost_are_refused():
    spec = dict(method="grid", parameters={"depth": {"values": [1, 2]}})
    command = ["${env}", "python3", "-u", "${program}", "${args}"]
    assert space.check(spec | dict(program="train.py", command=command)) == space.check(spec)
    command += ["--matrix_lr=0.3", "--seed", "7"]
    with pytest.raises(UserError, match=r"command sets --matrix_lr=0.3 --seed, .* a parameter"):
        space.check(spec | dict(program="train.py", command=command))


def test_ranges_without_end_cost_no_memory():
    wide = {"depth": {"min": 1, "max": 10**15}}
    spec = sweep("random", wide)
    assert space.size(spec) == 10**15
    assert 1 <= suggest.ask(spec, [], 0)["depth"] <= 10**15
    with pytest.raises(
        UserError, match="a grid of 1,000,000,000,000,000 combinations is too large"
    ):
        sweep("grid", wide)
