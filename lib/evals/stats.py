"""How sure: standard errors, baselines, pass@k, and whether a difference is more than chance."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

# the chance of calling a difference real that is not, over all comparisons made at once (Holm 1979)
CONFIDENT = 0.05
# standard errors on either side that hold 95 % of a normal distribution
SURE = 1.96
# draws of a bootstrap or permutation test, and how many are held at a time
DRAWS = 10_000
BATCH = 500
# pairs up to which a sign test sums whole numbers
EXACT = 1000
# kinds of task that ChatCORE is made of
GRADED = ("generate", "choice")


# ---- one score


def proportion(correct: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error) of outcomes between 0 and 1; binomial for 0 and 1.

    Never 0 on a perfect score of few items: with k of n right it is sqrt(p (1 - p) / n) at
    p = (k + 1/2) / (n + 1) where k is 0 or n, since p = k/n would claim certainty.
    """
    values = np.asarray(correct, np.float64)
    if not values.size:
        return math.nan, math.nan
    n = values.size
    mean = float(values.mean())
    # all right or all wrong: no spread is seen, and yet it is not certain
    if mean in (0.0, 1.0):
        p = (mean * n + 0.5) / (n + 1)
        return mean, math.sqrt(p * (1 - p) / n)
    return mean, float(values.std() / math.sqrt(n))


def ratio(totals, sizes) -> tuple[float, float | None]:
    """(sum of totals / sum of sizes, its standard error), items being independent draws.

    The delta method for a ratio of means: a long item weighs more than a short one. The error is
    None where fewer than two items have a size, for one draw shows no spread.
    """
    totals = np.asarray(totals, np.float64)
    sizes = np.asarray(sizes, np.float64)
    n = np.count_nonzero(sizes)
    size = sizes.sum()
    if n < 2:
        return float(totals.sum() / size), None
    # what an item has more than its size makes one expect
    mean = totals.sum() / size
    residual = totals - mean * sizes
    squares = (residual**2).sum()
    variance = squares * n / (n - 1)
    error = math.sqrt(variance) / size
    return float(mean), float(error)


def centered(score: float, baseline: float) -> float:
    """0 for random answers, 1 for perfect ones."""
    return (score - baseline) / (1 - baseline)


def majority(answers: Sequence) -> float:
    """Accuracy of always giving the most frequent right answer."""
    if not answers:
        return math.nan
    most = max(Counter(answers).values())
    return most / len(answers)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right when `correct` of n were.

    Chen et al. 2021, equation 1.
    """
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@k needs 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}"
        )
    # the chance that k samples drawn without replacement are all wrong
    wrong = n - correct
    all_wrong = math.prod((wrong - i) / (n - i) for i in range(k))
    return 1.0 - all_wrong


def bootstrap(values, statistic: Callable = np.mean, draws: int = DRAWS, seed: int = 0) -> float:
    """Standard error of statistic(values), by resampling items with replacement.

    statistic takes axis=-1.
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    # a batch of resampled sets at a time
    results = []
    for i in range(0, draws, BATCH):
        shape = (min(BATCH, draws - i), len(values))
        picks = rng.integers(0, len(values), shape)
        results.append(statistic(values[picks], axis=-1))
    return float(np.concatenate(results).std())


# ---- the mean of several scores


def _questions(tasks: dict[str, dict]) -> list[dict[str, np.ndarray]]:
    """Outcomes of tasks, {label: centred outcome per item}, those on the same questions together.

    Such tasks are right and wrong together. They have one "source" and the same ids.
    """
    pools: dict[tuple, dict[str, np.ndarray]] = {}
    for label, task in tasks.items():
        # in one order, so that outcomes of two tasks can be added
        outcome = {item["id"]: item["correct"] for item in task["items"]}
        ids = tuple(sorted(outcome))
        outcomes = np.array([outcome[i] for i in ids], np.float64)

        # tasks of one source and the same ids share a pool
        scale = 1 - task["baseline"]
        pool = pools.setdefault((task.get("source", label), ids), {})
        pool[label] = outcomes / scale
    return list(pools.values())


def _own_variance(task: dict) -> float:
    """The variance of a task's centred score by its own standard error."""
    stderr = task["stderr"] / (1 - task["baseline"])
    return stderr**2


def _with_centered(tasks: dict[str, dict]) -> dict[str, dict]:
    """The tasks that have a centred score."""
    return {label: t for label, t in tasks.items() if t.get("centered") is not None}


def mean_centered(tasks: dict[str, dict], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(mean of the centred scores of tasks, its standard error) for CORE and ChatCORE.

    Tasks are entries of a record. The error comes from a bootstrap over items; tasks that ask the
    same questions are resampled together. Tasks without items enter with their own standard error.
    """
    known = _with_centered(tasks)
    if not known:
        return math.nan, math.nan
    score = float(np.mean([t["centered"] for t in known.values()]))

    # variances of independent sets of questions add up
    with_items = {label: t for label, t in known.items() if t.get("items")}
    rng = np.random.default_rng(seed)
    variance = 0.0
    for outcomes in _questions(with_items):
        total = np.sum(list(outcomes.values()), axis=0)
        if total.std() == 0:
            # nothing to resample: all right or all wrong
            variance += sum(_own_variance(known[label]) for label in outcomes)
        elif len(outcomes) == 1:
            variance += total.var() / total.size
        else:
            own_seed = int(rng.integers(1 << 31))
            variance += bootstrap(total, draws=draws, seed=own_seed) ** 2

    # of tasks without items nothing but the standard error is known
    without = [task for label, task in known.items() if label not in with_items]
    variance += sum(map(_own_variance, without))
    return score, math.sqrt(variance) / len(known)


def chatcore(tasks: dict[str, dict]) -> dict | None:
    """The "chatcore" part of a record: mean of the centred scores of its chat tasks.

    None where there are none.
    """
    known = _with_centered(tasks)
    graded = {label: t for label, t in known.items() if t.get("kind") in GRADED}
    if not graded:
        return None
    score, stderr = mean_centered(graded)
    return dict(score=score, stderr=stderr, tasks=sorted(graded))


# ---- tests


def log_choose(n: int, k: int) -> float:
    """The logarithm of the number of ways to choose k of n."""
    # log n! is lgamma(n + 1)
    both = math.lgamma(k + 1) + math.lgamma(n - k + 1)
    return math.lgamma(n + 1) - both


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of so many wins and losses if both were equally likely.

    McNemar's test on outcomes 0 and 1.
    """
    n = wins + losses
    k = min(wins, losses)
    if n == 0:
        return 1.0
    if n < EXACT:
        # whole numbers, no rounding
        ways = sum(math.comb(n, i) for i in range(k + 1))
        return min(1.0, 2 * ways / 2**n)
    # beyond, logarithms: the whole numbers would have thousands of digits
    each = n * math.log(2)
    logs = [log_choose(n, i) - each for i in range(k + 1)]
    return min(1.0, 2 * _sum_of_logs(logs))


def _sum_of_logs(logs: list[float]) -> float:
    """The sum of numbers that are given by their logarithms."""
    top = max(logs)
    relative = math.fsum(math.exp(x - top) for x in logs)
    return math.exp(top + math.log(relative))


def binomial_test(right: int, n: int, chance: float) -> float:
    """Exact one-sided p-value of so many right answers of n, or more, by one who guesses."""
    if right <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    yes = math.log(chance)
    no = math.log1p(-chance)
    logs = []
    for i in range(right, n + 1):
        # so many ways to have i right, each as likely as this
        logs.append(log_choose(n, i) + i * yes + (n - i) * no)
    return min(1.0, _sum_of_logs(logs))


def sign_flips(differences, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference of pairs, by flipping signs of pairs at random."""
    d = np.asarray(differences, np.float64)
    # pairs without a difference have no sign
    d = d[d != 0]
    if not d.size:
        return 1.0

    # how often chance alone makes so large a sum, a little less for rounding
    rng = np.random.default_rng(seed)
    limit = abs(d.sum()) * (1 - 1e-9)
    as_large = 0
    for i in range(0, draws, BATCH):
        shape = (min(BATCH, draws - i), d.size)
        flips = rng.integers(0, 2, shape, np.int8) * 2.0 - 1
        sums = np.abs(flips @ d)
        as_large += int((sums >= limit).sum())
    # the draw that was made counts as one
    return (1 + as_large) / (1 + draws)


def normal_test(z: float) -> float:
    """Two-sided p-value of a number of standard errors."""
    return math.erfc(abs(z) / math.sqrt(2))


def adjusted(p: Mapping[str, float]) -> dict[str, float]:
    """p-values that count how many are looked at together (Holm 1979)."""
    # the smallest is multiplied by their number, the next by one less, and none falls behind
    running = 0.0
    result = {}
    smallest_first = sorted(p, key=lambda label: p[label])
    for rank, label in enumerate(smallest_first):
        corrected = (len(p) - rank) * p[label]
        running = max(running, min(1.0, corrected))
        result[label] = running
    # in the order in which they were given
    return {label: result[label] for label in p}


def above_guessing(tasks: dict[str, dict]) -> dict[str, float]:
    """How likely one who guesses would score so well somewhere: {task: adjusted p-value}.

    tasks: entries of a record, of which those with a baseline are looked at. Exact binomial tests,
    adjusted for their number, so that a guesser is called better than that on any task in a
    twentieth of the reports at most. Shares of ties are rounded down. Where guessing is never right
    (an answer in one's own words) one lucky answer of all is allowed for.
    """
    p = {}
    for label, task in tasks.items():
        if task.get("baseline") is None or not task.get("n"):
            continue
        # rounding of a mean must not take a point away
        right = math.floor(task["score"] * task["n"] + 1e-6)
        chance = max(task["baseline"], 1 / task["n"])
        p[label] = binomial_test(right, task["n"], chance)
    return adjusted(p)


# ---- two checkpoints on the same items


@dataclass(frozen=True)
class Comparison:
    """A difference between two records, b - a, and how sure it is.

    stderr: None where one item says nothing of it. n: pairs of items. better: whether a "higher" or
    "lower" score is. wins, losses: of items that are right or wrong, how many b and a alone have
    right. p_adjusted: counts all comparisons made at once. tasks: how many a mean is made of.
    """

    label: str
    delta: float
    stderr: float | None
    p: float
    n: int
    test: str
    unit: str
    better: str
    wins: int | None = None
    losses: int | None = None
    tasks: int | None = None
    p_adjusted: float = 1.0
    sentence: str = ""

    @property
    def real(self) -> bool:
        """Whether the difference is more than chance, all comparisons considered."""
        return self.p_adjusted < CONFIDENT

    @property
    def improved(self) -> bool:
        """Whether b is better than a, by however little."""
        return self.delta != 0 and (self.delta > 0) == (self.better == "higher")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The range that holds the true difference 19 times in 20, where its error is known."""
        if self.stderr is None:
            return None
        margin = SURE * self.stderr
        return self.delta - margin, self.delta + margin


def compare(
    a: dict, b: dict, names: tuple[str, str] = ("the first", "the second")
) -> dict[str, Comparison]:
    """Is the difference between two evaluation records real? A `Comparison` per task.

    delta is b - a on the items that both have (by id): points of accuracy as a fraction, bits per
    byte, or nats per token. p is that of a two-sided paired test; p_adjusted counts how many tasks
    are compared at once (Holm), and decides what the sentence says. Besides tasks there are "core",
    "chatcore" and "bpb/SOURCE" where both records have them. Tasks without common items, and CORE
    tasks measured with other limits, are left out.
    """
    # each task
    candidates = []
    for label, task in a.get("tasks", {}).items():
        if label in b.get("tasks", {}):
            candidates.append(_compare_task(label, task, b["tasks"][label]))

    # the two means
    for name in ("core", "chatcore"):
        if a.get(name) and b.get(name):
            tasks_a = _members(a, name)
            tasks_b = _members(b, name)
            candidates.append(_compare_means(name, tasks_a, tasks_b))

    # bits per byte of each text
    for source, bits in a.get("bpb", {}).items():
        if source in b.get("bpb", {}):
            candidates.append(_compare_bits(f"bpb/{source}", bits, b["bpb"][source]))
    compared = {c.label: c for c in candidates if c}

    # only now is it known how many were compared
    sure = adjusted({label: c.p for label, c in compared.items()})
    for label, p in sure.items():
        entry = replace(compared[label], p_adjusted=p)
        sentence = _sentence(entry, names, len(compared))
        compared[label] = replace(entry, sentence=sentence)
    return compared


def differences(compared: Mapping[str, Comparison]) -> list[Comparison]:
    """Comparisons for a picture and a table: the surest first, gains before losses.

    Draw `delta` with its `interval` in its `unit`, and mark those that are `real`.
    """

    def order(c):
        loss = -c.delta if c.better == "higher" else c.delta
        return not c.real, c.unit, loss

    return sorted(compared.values(), key=order)


def _members(record: dict, name: str) -> dict[str, dict]:
    """The tasks that a mean is made of."""
    tasks = record.get("tasks", {})
    if name == "core":
        return {label: t for label, t in tasks.items() if t.get("kind") == "core"}
    return {label: tasks[label] for label in record[name]["tasks"] if label in tasks}


def _paired(a: dict, b: dict) -> tuple[list[str], list[dict], list[dict]]:
    """Ids that both entries have, and the items of each in that order."""
    first = {item["id"]: item for item in a.get("items", ())}
    second = {item["id"]: item for item in b.get("items", ())}
    ids = [i for i in first if i in second]
    first_items = [first[i] for i in ids]
    second_items = [second[i] for i in ids]
    return ids, first_items, second_items


def _compare_task(label: str, a: dict, b: dict) -> Comparison | None:
    """One task of two records, from the items that both have; None where nothing is comparable."""
    # other items were shown as examples
    if a.get("kind") == "core" and a.get("limit") != b.get("limit"):
        return None
    ids, first, second = _paired(a, b)
    if not ids:
        return None
    both = first + second
    if all("correct" in item for item in both):
        return _compare_outcomes(label, first, second)
    if all("nats" in item for item in both):
        return _compare_nats(label, first, second)
    return None


def _compare_outcomes(label: str, first: list[dict], second: list[dict]) -> Comparison:
    """Items that are right or wrong, or a share of right."""
    d = _differences(first, second, "correct")
    comparison = Comparison(
        label=label,
        delta=float(d.mean()),
        stderr=_spread(d),
        p=1.0,
        n=len(d),
        test="sign-flip permutation",
        unit="points",
        better="higher",
    )
    if not set(np.unique(d)) <= {-1.0, 0.0, 1.0}:
        return replace(comparison, p=sign_flips(d))
    # right or wrong: the exact test of who alone has it right
    wins = int((d > 0).sum())
    losses = int((d < 0).sum())
    return replace(
        comparison,
        p=sign_test(wins, losses),
        wins=wins,
        losses=losses,
        test="exact sign test (McNemar)",
    )


def _compare_nats(label: str, first: list[dict], second: list[dict]) -> Comparison | None:
    """Texts by the nats they cost, per byte, or per token where both read the same ones.

    Bytes come first, where they are known: they do not depend on the tokenizer.
    """
    units = {"bytes": ("bits per byte", 1 / math.log(2)), "tokens": ("nats per token", 1.0)}
    for key, (unit, scale) in units.items():
        known = all(key in item for item in first + second)
        sizes = [item[key] for item in first] if known else []
        if sum(sizes) and sizes == [item[key] for item in second]:
            d = _differences(first, second, "nats") * scale
            delta, stderr = ratio(d, sizes)
            return Comparison(
                label=label,
                delta=delta,
                stderr=stderr,
                p=sign_flips(d),
                n=len(d),
                test="sign-flip permutation",
                unit=unit,
                better="lower",
            )
    return None


def _differences(first: list[dict], second: list[dict], key: str) -> np.ndarray:
    """What each pair of items differs by."""
    return np.array([y[key] - x[key] for x, y in zip(first, second)], np.float64)


def _spread(d: np.ndarray) -> float:
    """Standard error of a mean of differences; the least that n items allow where all are equal."""
    spread = d.std() or 1 / math.sqrt(len(d))
    return float(spread / math.sqrt(len(d)))


def _compare_means(name: str, a: dict[str, dict], b: dict[str, dict]) -> Comparison | None:
    """CORE or ChatCORE of two records: the mean over tasks of paired centred differences.

    One question counts once, however many tasks ask it; its sign is flipped as a whole.
    """
    both = {}
    for label in a:
        if label in b and a[label].get("limit") == b[label].get("limit"):
            _, first, second = _paired(a[label], b[label])
            if first and "correct" in first[0] and "correct" in second[0]:
                both[label] = first, second
    if not both:
        return None
    # by source and question: what it adds to the difference of the means
    sources: dict[str, dict[str, float]] = {}
    for label, (first, second) in both.items():
        span = 1 - a[label]["baseline"]
        scale = 1 / (len(first) * len(both) * span)
        weights = sources.setdefault(a[label].get("source", label), {})
        for x, y in zip(first, second):
            change = scale * (y["correct"] - x["correct"])
            weights[x["id"]] = weights.get(x["id"], 0.0) + change
    # sources are independent of each other: their variances add up
    by_source = [np.array(list(weights.values())) for weights in sources.values()]
    variance = sum(len(v) * v.var() for v in by_source)
    d = np.concatenate(by_source)
    return Comparison(
        label=name,
        delta=float(d.sum()),
        stderr=math.sqrt(variance),
        p=sign_flips(d),
        n=len(d),
        tasks=len(both),
        test="sign-flip permutation",
        unit="of the mean of centred scores",
        better="higher",
    )


def _compare_bits(label: str, a: dict, b: dict) -> Comparison | None:
    """Bits per byte of two records, by documents where both kept them.

    Else by their standard errors, as if texts were others.
    """
    paired = _compare_task(label, a, b)
    if paired:
        return paired
    delta = b["bpb"] - a["bpb"]
    # an error of 0 was written where one text had none
    known = bool(a["stderr"] and b["stderr"])
    stderr = math.hypot(a["stderr"], b["stderr"]) if known else None
    p = normal_test(delta / stderr) if stderr else 1.0
    return Comparison(
        label=label,
        delta=delta,
        stderr=stderr,
        p=p,
        n=0,
        test="unpaired z-test, which overestimates the error",
        unit="bits per byte",
        better="lower",
    )


# ---- in words


def told(compared: Mapping[str, Comparison]) -> list[str]:
    """The sentences that matter: what is real, the surest first, and one line for all the rest."""
    surest = sorted(compared.values(), key=lambda c: c.p_adjusted)
    sentences = [c.sentence for c in surest if c.real]
    rest = [c.label for c in surest if not c.real]
    if rest:
        differences = "difference is" if len(rest) == 1 else "differences are"
        names = ", ".join(rest)
        sentences.append(f"{len(rest)} {differences} no more than chance: {names}.")
    return sentences


def _amount(x: float, unit: str) -> str:
    if unit == "points":
        return f"{100 * x:.1f} points"
    return f"{x:.4f} {unit}"


def _chance(p: float) -> str:
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def _basis(c: Comparison, names: tuple[str, str]) -> str:
    """What a comparison rests on."""
    if c.wins is not None:
        return f", {names[1]} alone right on {c.wins} and {names[0]} on {c.losses} of {c.n}"
    if not c.n:
        return ""
    things = "texts" if c.unit == "bits per byte" else "items"
    return f" over {c.n} {things}"


def _sentence(c: Comparison, names: tuple[str, str], compared: int) -> str:
    """The answer in words."""
    basis = _basis(c, names)
    if c.delta == 0:
        return f"{c.label}: no difference{basis}."
    word = "better" if c.improved else "worse"
    change = f"{c.label}: {names[1]} is {word} by {_amount(abs(c.delta), c.unit)}"
    if c.stderr is None:
        return f"{change}: too few texts to tell whether that is more than chance."
    head = f"{change} (standard error {_amount(c.stderr, c.unit)}, {_chance(c.p)}{basis})"
    if c.real:
        return f"{head}: the difference is real."
    if c.p < CONFIDENT:
        return (
            f"{head}: perhaps real, but of {compared} comparisons one looks like this by chance "
            f"({_chance(c.p_adjusted)} for all of them)."
        )
    return (
        f"{head}: not distinguishable from chance; with these items only a difference above "
        f"{_amount(SURE * c.stderr, c.unit)} would show."
    )
