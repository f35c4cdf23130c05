"""Errors, paired tests and estimators, against simulation and known values."""

import itertools
import math

import numpy as np
import pytest

from lib.evals import stats


def test_binomial_error_covers_the_spread_of_repeated_tests():
    rng = np.random.default_rng(0)
    runs = rng.random((2000, 300)) < 0.3
    assert stats.proportion(runs[0])[1] == pytest.approx(runs.mean(1).std(), rel=0.15)
    assert stats.proportion([0.5, 1.0, 0.0, 1.0]) == pytest.approx(
        (0.625, np.std([0.5, 1, 0, 1]) / 2)
    )


def test_a_perfect_score_of_few_items_is_not_certain():
    assert stats.proportion([1] * 4)[0] == 1 and 0.1 < stats.proportion([1] * 4)[1] < 0.3
    assert stats.proportion([1] * 400)[1] < 0.01
    assert all(map(math.isnan, stats.proportion([])))


@pytest.mark.parametrize(
    "n, correct, k", [(5, 0, 2), (5, 2, 1), (5, 2, 3), (5, 4, 2), (6, 6, 6), (4, 1, 4)]
)
def test_pass_at_k_is_the_share_of_all_samples_with_a_right_one(n, correct, k):
    picks = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
    assert stats.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, picks)) / len(picks))


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="pass@k needs"):
        stats.pass_at_k(2, 1, 3)


def test_centred_and_majority():
    assert (
        stats.centered(0.25, 0.25) == 0
        and stats.centered(1, 0.25) == 1
        and stats.centered(0, 0.5) == -1
    )
    assert stats.majority([0, 1, 1, 1]) == 0.75 and math.isnan(stats.majority([]))


def test_bootstrap_agrees_with_the_formula():
    values = np.random.default_rng(1).gamma(2, 1, 200)
    assert stats.bootstrap(values, draws=3000) == pytest.approx(
        values.std() / math.sqrt(200), rel=0.1
    )
    assert stats.bootstrap(values, np.median, draws=300) > 0


@pytest.mark.parametrize("wins, losses", [(0, 0), (5, 0), (3, 3), (9, 2), (40, 61)])
def test_sign_test_is_the_exact_binomial(wins, losses):
    row = [1]  # of Pascal's triangle: what is no likelier than this outcome
    for _ in range(wins + losses):
        row = [a + b for a, b in zip([0, *row], [*row, 0])]
    assert stats.sign_test(wins, losses) == pytest.approx(
        sum(ways for ways in row if ways <= row[wins]) / sum(row)
    )


def test_sign_test_of_very_many_pairs_neither_overflows_nor_differs():
    # on both sides of where the sum goes over to logarithms
    near = stats.sign_test(499, 490), stats.sign_test(510, 500)
    assert near[0] == pytest.approx(near[1], abs=0.05)
    z = (5200 - 4800 - 1) / math.sqrt(10_000)
    assert stats.sign_test(4800, 5200) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_sign_flips_are_calibrated_and_see_a_shift():
    rng = np.random.default_rng(2)
    p = [stats.sign_flips(rng.normal(size=40), draws=500, seed=i) for i in range(300)]
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.06)
    assert stats.sign_flips(rng.normal(1, 1, 40)) < 0.001
    assert stats.sign_flips(np.zeros(10)) == 1
    # no draw is so extreme: the one that was made counts all the same
    assert stats.sign_flips(np.ones(60), draws=100) == pytest.approx(1 / 101)


def task(correct, **more):
    items = [{"id": str(i), "correct": int(c)} for i, c in enumerate(correct)]
    score, stderr = stats.proportion(correct)
    base = more.get("baseline", 0.25)
    return (
        dict(
            kind="choice",
            score=score,
            stderr=stderr,
            baseline=base,
            centered=stats.centered(score, base),
            items=items,
        )
        | more
    )


def test_error_of_a_mean_of_tasks_covers_the_spread_and_sees_tasks_that_share_questions():
    rng = np.random.default_rng(3)
    apart = [
        np.mean([stats.centered((rng.random(80) < q).mean(), 0.25) for q in (0.5, 0.7)])
        for _ in range(2000)
    ]
    one, two = rng.random(80) < 0.5, rng.random(80) < 0.7
    score, stderr = stats.mean_centered({"a": task(one), "b": task(two)})
    assert score == pytest.approx(((one.mean() - 0.25) + (two.mean() - 0.25)) / 1.5)
    assert stderr == pytest.approx(np.std(apart), rel=0.2)
    alike = stats.mean_centered({"a": task(one, source="x"), "b": task(one, source="x")})[1]
    # the second adds nothing
    assert alike == pytest.approx(stats.proportion(one)[1] / 0.75, rel=0.1)
    assert stats.mean_centered({"a": task([1] * 10)})[1] > 0
    assert all(
        map(math.isnan, stats.mean_centered({"p": {"kind": "perplexity", "centered": None}}))
    )


def test_chatcore_is_the_mean_of_generated_and_chosen_answers():
    tasks = {
        "a": task([1, 1, 0, 0], kind="generate", baseline=0.0),
        "b": task([1, 0, 0, 0]),
        "p": {"kind": "perplexity", "score": 9.0},
        "core/x": task([1, 1, 1, 1], kind="core"),
    }
    found = stats.chatcore(tasks)
    assert (
        found["score"] == pytest.approx(0.25)
        and found["tasks"] == ["a", "b"]
        and found["stderr"] > 0
    )
    assert stats.chatcore({"p": {"kind": "perplexity"}}) is None


def test_a_real_difference_is_called_real_and_noise_is_not():
    rng = np.random.default_rng(4)
    a = rng.random(400) < 0.5
    better = a | (rng.random(400) < 0.3)
    noise = np.where(rng.random(400) < 0.2, rng.random(400) < 0.5, a)
    found = stats.compare(
        {"tasks": {"x": task(a), "y": task(a)}},
        {"tasks": {"x": task(better), "y": task(noise)}},
        ("base", "sft"),
    )
    assert found["x"].delta == pytest.approx(better.mean() - a.mean()) and found["x"].p < 1e-6
    assert (
        found["x"].sentence.endswith("the difference is real.")
        and "sft is better" in found["x"].sentence
    )
    assert found["y"].p > 0.05 and "not distinguishable" in found["y"].sentence
    assert all(entry.sentence.count("\n") == 0 for entry in found.values())


def test_paired_test_sees_what_unpaired_errors_hide():
    a = np.arange(1000) % 2
    b = a.copy()
    b[:40:2] = 1  # twenty more right, none less
    one, two = task(a), task(b)
    assert abs(two["score"] - one["score"]) < 2 * math.hypot(one["stderr"], two["stderr"])
    assert stats.compare({"tasks": {"x": one}}, {"tasks": {"x": two}})["x"].p < 1e-4


def test_among_many_comparisons_one_lucky_task_is_not_real():
    same = {f"t{i}": task([1, 0] * 20) for i in range(20)}
    lucky = same | {"t0": task([1, 1] * 6 + [1, 0] * 14)}
    entry = stats.compare({"tasks": same}, {"tasks": lucky})["t0"]
    assert entry.p < 0.05 < entry.p_adjusted and "perhaps real" in entry.sentence


def test_items_are_matched_by_id_and_the_rest_left_out():
    a, b = task([1, 1, 0, 0]), task([1, 1, 0, 0])
    b["items"] = b["items"][::-1] + [{"id": "new", "correct": 1}]
    found = stats.compare({"tasks": {"x": a, "only": a}}, {"tasks": {"x": b}})
    assert (
        found["x"].delta == 0
        and found["x"].n == 4
        and "no difference" in found["x"].sentence
        and "only" not in found
    )
    # by their places half of the items would have changed
    assert found["x"].wins == found["x"].losses == 0 and found["x"].p == 1
    flipped = task([0, 0, 1, 1])
    flipped["items"] = flipped["items"][::-1]
    moved = stats.compare({"tasks": {"x": a}}, {"tasks": {"x": flipped}})["x"]
    assert (moved.wins, moved.losses) == (2, 2)
    b["items"] = [{"id": "new", "correct": 1}]
    assert stats.compare({"tasks": {"x": a}}, {"tasks": {"x": b}}) == {}


def test_a_difference_that_all_items_have_is_not_certain():
    entry = stats.compare({"tasks": {"x": task([0] * 25)}}, {"tasks": {"x": task([1] * 25)}})["x"]
    assert entry.delta == 1 and entry.stderr == pytest.approx(1 / 25) and entry.wins == 25


def test_texts_are_matched_by_id_too():
    a, b = perplexity([10.0, 20.0, 30.0], [5, 10, 15]), perplexity([11.0, 21.0, 31.0], [5, 10, 15])
    b["items"] = b["items"][1:] + b["items"][:1]
    entry = stats.compare({"tasks": {"t": a}}, {"tasks": {"t": b}})["t"]
    assert entry.delta == pytest.approx(3 / 30 / math.log(2)) and entry.n == 3


def test_ratio_of_means_by_hand():
    # 6 of 12; residuals 1 - 0.5 * 4 = -1, 2 - 0.5 * 4 = 0, 3 - 0.5 * 4 = 1
    mean, error = stats.ratio([1, 2, 3], [4, 4, 4])
    assert mean == 0.5 and error == pytest.approx(math.sqrt(2 * 3 / 2) / 12)


def test_one_text_tells_no_error_and_no_difference():
    """Whatever two models differ by on a single text, nobody says that it is sure."""
    a, b = (
        {"bpb": {"book": dict(bpb=bits, stderr=None, items=texts([bits], bytes=[1]))}}
        for bits in (2.0, 1.0)
    )
    entry = stats.compare(a, b, ("base", "sft"))["bpb/book"]
    assert (entry.stderr, entry.interval, entry.real) == (None, None, False)
    assert entry.sentence == (
        "bpb/book: sft is better by 1.4427 bits per byte: "
        "too few texts to tell whether that is more than chance."
    )


@pytest.mark.parametrize(
    "right, n, chance", [(9, 12, 0.5), (0, 5, 0.3), (5, 5, 0.2), (3, 20, 0.25)]
)
def test_binomial_test_is_the_exact_tail(right, n, chance):
    tail = sum(math.comb(n, i) * chance**i * (1 - chance) ** (n - i) for i in range(right, n + 1))
    assert stats.binomial_test(right, n, chance) == pytest.approx(min(1, tail))


def test_adjusted_values_are_holms():
    found = stats.adjusted({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert list(found) == ["a", "b", "c"] and stats.adjusted({}) == {}
    assert stats.adjusted({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def guesses(rng, baselines, n=100):
    """The entries of someone who guesses on tasks with these baselines."""
    right = {f"t{i}": rng.binomial(n, chance) for i, chance in enumerate(baselines)}
    return {
        name: dict(score=int(k) / n, n=n, baseline=chance)
        for (name, k), chance in zip(right.items(), baselines)
    }


def test_a_guesser_is_seldom_called_better_than_guessing():
    rng = np.random.default_rng(7)
    baselines = [0.25] * 9 + [0.5] * 6 + [0.2] * 3
    called = 0
    for _ in range(400):
        chances = stats.above_guessing(guesses(rng, baselines))
        called += any(p < stats.CONFIDENT for p in chances.values())
    # a twentieth of 400, and three standard errors
    assert called <= 20 + 3 * math.sqrt(19)


def test_who_knows_is_called_better_than_guessing():
    entries = guesses(np.random.default_rng(8), [0.25] * 18)
    known = entries | {"known": dict(score=0.5, n=100, baseline=0.25)}
    known |= {"words": dict(score=0.0, n=100, baseline=0.0), "p": dict(score=9.0, baseline=None)}
    chances = stats.above_guessing(known)
    assert chances["known"] < 1e-4 and chances["words"] == 1 and "p" not in chances
    # the error bar alone would do here, for one of a hundred tasks
    assert stats.above_guessing({"one": dict(score=0.35, n=100, baseline=0.25)})["one"] < 0.05
    assert (
        stats.above_guessing(known | {"one": dict(score=0.35, n=100, baseline=0.25)})["one"] > 0.05
    )
    # 2.5 of 4 by shares of ties are 2, and 0.57 * 100 is 57, though not in floats
    for score, n, right in ((0.625, 4, 2), (0.57, 100, 57)):
        told = stats.above_guessing({"one": dict(score=score, n=n, baseline=0.25)})["one"]
        assert told == stats.binomial_test(right, n, 0.25)
    # one lucky answer in one's own words is no skill, ten are
    lucky = {k: dict(score=k / 100, n=100, baseline=0.0) for k in (1, 10)}
    assert stats.above_guessing(lucky)[1] > 0.05 > stats.above_guessing(lucky)[10]


def test_what_matters_is_told_and_drawn_first():
    a = {"gain": task([0] * 40), "loss": task([1] * 40), "same": task([1, 0] * 20)}
    b = {"gain": task([1] * 30 + [0] * 10), "loss": task([0] * 20 + [1] * 20)}
    b["same"] = task([1, 0] * 19 + [0, 1])
    found = stats.compare({"tasks": a}, {"tasks": b}, ("base", "sft"))
    told = stats.told(found)
    assert [sentence.split(":")[0] for sentence in told[:2]] == ["gain", "loss"]
    assert told[2] == "1 difference is no more than chance: same." and len(told) == 3
    assert [c.label for c in stats.differences(found)] == ["gain", "loss", "same"]
    assert found["gain"].real and found["gain"].improved and not found["loss"].improved
    low, high = found["gain"].interval
    assert high - low == pytest.approx(2 * 1.96 * found["gain"].stderr)
    assert (low + high) / 2 == pytest.approx(0.75)


def test_core_of_other_limits_is_not_compared():
    a, b = task([1, 0] * 20, kind="core", limit=None), task([1, 1] * 20, kind="core", limit=40)
    assert stats.compare({"tasks": {"core/x": a}}, {"tasks": {"core/x": b}}) == {}


def perplexity(nats, size):
    return dict(
        kind="perplexity",
        items=[
            {"id": str(i), "nats": n, "bytes": s, "tokens": 1}
            for i, (n, s) in enumerate(zip(nats, size))
        ],
    )


def test_perplexities_and_bits_are_compared_by_document():
    rng = np.random.default_rng(5)
    size, nats = rng.integers(50, 500, 60), rng.gamma(50, 2, 60)
    a, b = perplexity(nats, size), perplexity(nats * 0.97, size)
    entry = stats.compare({"tasks": {"wiki": a}}, {"tasks": {"wiki": b}})["wiki"]
    assert (
        entry.delta == pytest.approx(-0.03 * nats.sum() / size.sum() / math.log(2))
        and entry.p < 0.001
    )
    assert "is better" in entry.sentence and "bits per byte" in entry.sentence
    bits = dict(bpb=1.0, stderr=0.01, bytes=1)
    far = stats.compare({"bpb": {"s": bits}}, {"bpb": {"s": bits | {"bpb": 1.2}}})["bpb/s"]
    near = stats.compare({"bpb": {"s": bits}}, {"bpb": {"s": bits | {"bpb": 1.01}}})["bpb/s"]
    assert far.p < 1e-6 and "worse" in far.sentence and near.p > 0.3 and "unpaired" in near.test


def test_core_as_a_whole_is_compared_over_all_items():
    rng = np.random.default_rng(6)
    before = {f"core/{i}": task(rng.random(60) < 0.5, kind="core") for i in range(8)}
    after = {
        k: task([i["correct"] or rng.random() < 0.2 for i in t["items"]], kind="core")
        for k, t in before.items()
    }

    def record(tasks):
        return {"tasks": tasks, "core": {"score": stats.mean_centered(tasks)[0]}}

    entry = stats.compare(record(before), record(after))["core"]
    assert entry.delta == pytest.approx(
        record(after)["core"]["score"] - record(before)["core"]["score"]
    )
    assert entry.p < 0.001 and entry.tasks == 8 and entry.stderr > 0


# ---- by hand: each branch, and each bound on both its sides


def items(*values, key="correct"):
    return [{"id": str(i), key: value} for i, value in enumerate(values)]


def test_pass_at_k_refuses_numbers_that_cannot_be():
    for n, correct, k in ((2, 3, 1), (2, -1, 1), (2, 1, 0), (2, 1, 3)):
        with pytest.raises(ValueError, match="pass@k needs"):
            stats.pass_at_k(n, correct, k)
    assert stats.pass_at_k(1, 1, 1) == 1 and stats.pass_at_k(2, 0, 2) == 0


def test_a_bootstrap_draws_as_often_as_it_is_told():
    shapes = []

    def statistic(values, axis):
        shapes.append(values.shape)
        return values.mean(axis)

    values = [1.0, 2.0, 5.0]
    once, again, other = (stats.bootstrap(values, statistic, 501, seed) for seed in (3, 3, 4))
    assert once == again != other
    assert shapes == [(500, 3), (1, 3)] * 3


def test_tasks_that_ask_the_same_are_pooled_by_source_and_ids():
    both = items(1, 0)
    a = dict(source="s", baseline=0.5, items=both)
    b = dict(source="s", baseline=0.0, items=both[::-1])
    c = dict(source="s", baseline=0.0, items=both[:1])
    d = dict(baseline=0.75, items=both)
    pools = stats._questions(dict(a=a, b=b, c=c, d=d))
    assert [{label: values.tolist() for label, values in pool.items()} for pool in pools] == [
        {"a": [2, 0], "b": [1, 0]},
        {"c": [1]},
        {"d": [4, 0]},
    ]


def test_the_error_of_a_mean_by_hand():
    one = dict(centered=0.5, baseline=0.5, stderr=9.0, items=items(1, 0))
    # outcomes of 2 and 0 have a variance of 1, and there are two of them
    assert stats.mean_centered({"a": one}) == (0.5, pytest.approx(math.sqrt(1 / 2)))
    bare = dict(centered=0.1, baseline=0.5, stderr=0.1)
    perfect = dict(centered=1.0, baseline=0.75, stderr=0.05, items=items(1, 1))
    score, error = stats.mean_centered(dict(a=one, b=bare, c=perfect, d=dict(centered=None)))
    assert score == pytest.approx(1.6 / 3)
    assert error == pytest.approx(math.sqrt(0.5 + 0.04 + 0.04) / 3)


def test_guesses_that_are_certain():
    assert stats.binomial_test(3, 5, 1.0) == stats.binomial_test(0, 5, 0.0) == 1.0
    assert stats.binomial_test(1, 5, 0.0) == 0.0
    assert stats.binomial_test(5, 5, 0.5) == pytest.approx(1 / 32)
    nothing = {"a": dict(score=0.5, n=0, baseline=0.5), "b": dict(score=0.5, baseline=0.5)}
    assert stats.above_guessing(nothing) == {}


def test_flipped_signs_by_hand():
    # of eight ways two make a sum as large, however it is rounded
    assert stats.sign_flips([0.1] * 3, draws=4001) == pytest.approx(0.25, abs=0.04)
    # pairs that do not differ count for nothing, and neither side is the better one
    assert stats.sign_flips([0.1, 0.0, 0.1, 0.1]) == stats.sign_flips([0.1] * 3)
    assert stats.sign_flips([-0.1] * 3) == stats.sign_flips([0.1] * 3)
    assert stats.sign_flips([1.0], draws=501) == 1.0
    assert stats.sign_flips([0.1] * 3, seed=1) != stats.sign_flips([0.1] * 3)


def test_only_what_both_have_is_compared():
    bits = dict(bpb=1.0, stderr=0.1)
    tasks = {"core/x": task([1, 0], kind="core")}
    a = dict(tasks=tasks, core={"score": 1}, bpb=dict(s=bits, t=bits))
    b = dict(tasks=tasks, bpb=dict(t=bits, u=bits))
    assert list(stats.compare(a, b)) == list(stats.compare(b, a)) == ["core/x", "bpb/t"]
    assert list(stats.compare(a, b | dict(core={"score": 1}))) == ["core/x", "core", "bpb/t"]
    assert stats.compare({}, {}) == {}
    # limits of other tasks than CORE's leave the same items, with the same examples
    few, all_ = task([1, 0], limit=2), task([1, 1], limit=None)
    assert "x" in stats.compare({"tasks": {"x": few}}, {"tasks": {"x": all_}})


def test_items_without_a_figure_in_common_are_not_compared():
    outcome, nats, bare = (
        {"id": "0", "correct": 1},
        {"id": "0", "nats": 1.0, "bytes": 2},
        {"id": "0"},
    )
    for one, two in ((bare, bare), (outcome, nats), (nats, outcome), (outcome, bare), (bare, nats)):
        assert stats._compare_task("x", dict(items=[one]), dict(items=[two])) is None
    assert stats._compare_task("x", {}, dict(items=[outcome])) is None


def test_shares_of_right_answers_have_no_winner():
    shares = stats._compare_outcomes("x", items(0.5, 1.0), items(1.0, 1.0))
    assert (shares.wins, shares.losses, shares.test) == (None, None, "sign-flip permutation")
    assert (shares.delta, shares.n) == (0.25, 2)
    assert shares.stderr == pytest.approx(0.25 / math.sqrt(2))
    whole = stats._compare_outcomes("x", items(0, 1, 0), items(1, 1, 1))
    assert (whole.wins, whole.losses, whole.n, whole.p) == (2, 0, 3, 0.5)
    assert (whole.unit, whole.better, whole.delta) == ("points", "higher", pytest.approx(2 / 3))


def texts(nats, **sizes):
    """Items of texts with these nats, and their sizes by unit."""
    items = [dict(id=str(i), nats=n) for i, n in enumerate(nats)]
    for unit, numbers in sizes.items():
        for item, number in zip(items, numbers):
            item[unit] = number
    return items


def test_nats_are_counted_per_byte_or_per_token():
    first = texts([2.0, 4.0], bytes=[1, 3], tokens=[1, 1])
    other_tokens = texts([3.0, 5.0], bytes=[1, 3], tokens=[9, 9])
    by_bytes = stats._compare_nats("x", first, other_tokens)
    delta, error = stats.ratio(np.ones(2) / math.log(2), [1, 3])
    assert (by_bytes.delta, by_bytes.stderr) == (pytest.approx(delta), pytest.approx(error))
    assert (by_bytes.unit, by_bytes.n, by_bytes.better) == ("bits per byte", 2, "lower")
    other_bytes = texts([3.0, 5.0], bytes=[2, 3], tokens=[1, 1])
    by_tokens = stats._compare_nats("x", first, other_bytes)
    assert (by_tokens.unit, by_tokens.delta) == ("nats per token", 1.0)
    for second in (texts([3.0, 5.0]), texts([3.0, 5.0], bytes=[2, 3], tokens=[9, 9])):
        assert stats._compare_nats("x", first, second) is None
    empty = texts([3.0], bytes=[0])
    assert stats._compare_nats("x", empty, empty) is None


def test_a_difference_of_means_by_hand():
    def entry(*correct, baseline=0.0, **more):
        return dict(baseline=baseline, items=items(*correct), **more)

    a = dict(
        x=entry(0, 1, baseline=0.5, source="s"), y=entry(0, 1, source="s"), z=entry(1, 1, 0, 0)
    )
    b = dict(
        x=entry(1, 1, baseline=0.5, source="s"), y=entry(1, 0, source="s"), z=entry(1, 1, 1, 0)
    )
    found = stats._compare_means("core", a, b)
    # x and y ask the same: 1/3 + 1/6 of the first question and -1/6 of the second; z 1/12 of one
    assert found.delta == pytest.approx(5 / 12) and (found.n, found.tasks) == (6, 3)
    assert found.stderr == pytest.approx(math.sqrt(2 / 9 + 1 / 192))
    assert (found.label, found.better) == ("core", "higher")
    # what only one has, what has other limits and what is no outcome counts for nothing
    a |= dict(only=entry(0), limits=entry(1, limit=1))
    b |= dict(limits=entry(0, limit=2))
    nats = dict(baseline=0.0, items=items(1.0, key="nats"))
    a, b = a | dict(m=nats, n=entry(1)), b | dict(m=entry(1), n=nats)
    assert stats._compare_means("core", a, b) == found
    assert stats._compare_means("core", dict(x=entry(0)), {}) is None


def test_gains_come_before_losses_in_every_unit():
    def entry(label, delta, better, unit, p=0.001):
        return stats.Comparison(label, delta, 0.1, p, 1, "t", unit, better, p_adjusted=p)

    given = [
        entry("chance", 3.0, "higher", "a", 0.5),
        entry("worse bits", 1.0, "lower", "b"),
        entry("better bits", -1.0, "lower", "b"),
        entry("worse", -1.0, "higher", "a"),
        entry("more chance", 4.0, "higher", "a", 0.05),
        entry("better", 2.0, "higher", "a", 0.0001),
    ]
    compared = {one.label: one for one in given}
    order = ["better", "worse", "better bits", "worse bits", "more chance", "chance"]
    assert [one.label for one in stats.differences(compared)] == order
    told = stats.told(compared)
    assert told[-1] == "2 differences are no more than chance: more chance, chance."
    assert len(told) == 5 and stats.told({}) == []


def test_sentences_by_hand():
    say = lambda c: stats._sentence(c, ("base", "sft"), 2)
    c = stats.Comparison(
        "x", -0.25, 0.125, 0.02, 8, "t", "points", "higher", wins=1, losses=3, p_adjusted=0.04
    )
    head = "x: sft is worse by 25.0 points (standard error 12.5 points, p = {}, "
    head += "sft alone right on 1 and base on 3 of 8)"
    assert say(c) == head.format("0.02") + ": the difference is real."
    assert say(stats.replace(c, p_adjusted=0.3)) == head.format("0.02") + (
        ": perhaps real, but of 2 comparisons one looks like this by chance (p = 0.3 for all of "
        "them)."
    )
    assert say(stats.replace(c, p=0.05, p_adjusted=0.05)) == head.format("0.05") + (
        ": not distinguishable from chance; with these items only a difference above 24.5 points "
        "would show."
    )
    bits = stats.Comparison(
        "t", -0.5, 0.25, 1e-5, 3, "t", "bits per byte", "lower", p_adjusted=1e-5
    )
    assert say(bits) == (
        "t: sft is better by 0.5000 bits per byte (standard error 0.2500 bits per byte, "
        "p < 0.0001 over 3 texts): the difference is real."
    )
    assert say(stats.replace(bits, n=0, p=1e-4)).endswith("p = 0.0001): the difference is real.")
    same = stats.replace(bits, delta=0.0, unit="nats per token")
    assert say(same) == "t: no difference over 3 items."
