"""How sure: standard errors, baselines, pass@k, and whether a difference between two checkpoints is real."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

# the chance of calling a difference real that is not, over all comparisons made at once (Holm 1979)
CONFIDENT = 0.05
DRAWS = 10_000  # of a bootstrap or permutation test
BATCH = 500  # of them held at a time


# ---- one score


def proportion(correct: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error) of outcomes between 0 and 1; binomial for 0 and 1, and never 0 on a perfect score of few items.

    With k of n right it is sqrt(p (1 - p) / n) at p = (k + 1/2) / (n + 1) where k is 0 or n, since p = k/n would claim certainty.
    """
    values = np.asarray(correct, np.float64)
    if not values.size:
        return math.nan, math.nan
    n, mean = values.size, float(values.mean())
    if mean in (0.0, 1.0):
        p = (mean * n + 0.5) / (n + 1)
        return mean, math.sqrt(p * (1 - p) / n)
    return mean, float(values.std() / math.sqrt(n))


def centered(score: float, baseline: float) -> float:
    """0 for random answers, 1 for perfect ones."""
    return (score - baseline) / (1 - baseline)


def majority(answers: Sequence) -> float:
    """Accuracy of always giving the most frequent right answer."""
    return max(Counter(answers).values()) / len(answers) if answers else math.nan


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased chance that at least one of k samples is right when `correct` of n were (Chen et al. 2021, equation 1)."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(
            f"pass@k needs 0 <= correct <= n and 1 <= k <= n, got n={n}, correct={correct}, k={k}"
        )
    return 1.0 - math.prod((n - correct - i) / (n - i) for i in range(k))


def bootstrap(values, statistic=np.mean, draws: int = DRAWS, seed: int = 0) -> float:
    """Standard error of statistic(values), by resampling items with replacement. statistic takes axis=-1."""
    values, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    found = [
        statistic(
            values[rng.integers(0, len(values), (min(BATCH, draws - i), len(values)))], axis=-1
        )
        for i in range(0, draws, BATCH)
    ]
    return float(np.concatenate(found).std())


def _pools(tasks: dict[str, dict]):
    """Items of several tasks on the same questions belong together: {pool: (item ids, {label: (outcomes by id, scale)})}."""
    pools = {}
    for label, task in tasks.items():
        outcome = {item["id"]: item["correct"] for item in task["items"]}
        key = (task.get("source", label), tuple(sorted(outcome)))
        pools.setdefault(key, {})[label] = np.array([outcome[i] for i in key[1]], np.float64) / (
            1 - task["baseline"]
        )
    return pools


def mean_centered(tasks: dict[str, dict], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """(mean of the centred scores of tasks, as in a record; its standard error) for CORE and ChatCORE.

    The error comes from a bootstrap over items. Tasks that ask the same questions (one "source" with the same ids) are resampled
    together, because they are right and wrong together. Tasks without items enter with their own standard error.
    """
    known = {label: t for label, t in tasks.items() if t.get("centered") is not None}
    if not known:
        return math.nan, math.nan
    score = float(np.mean([t["centered"] for t in known.values()]))
    rng, variance = np.random.default_rng(seed), 0.0
    for outcomes in _pools({label: t for label, t in known.items() if t.get("items")}).values():
        total = sum(outcomes.values())
        if total.std() == 0:  # nothing to resample: all right or all wrong
            variance += sum(
                (known[label]["stderr"] / (1 - known[label]["baseline"])) ** 2 for label in outcomes
            )
        elif len(outcomes) == 1:
            variance += total.var() / total.size
        else:
            variance += bootstrap(total, draws=draws, seed=int(rng.integers(1 << 31))) ** 2
    variance += sum(
        (t["stderr"] / (1 - t["baseline"])) ** 2 for t in known.values() if not t.get("items")
    )
    return score, math.sqrt(variance) / len(known)


def chatcore(tasks: dict[str, dict]) -> dict | None:
    """The "chatcore" part of a record: mean of the centred scores of its chat tasks, None where there are none."""
    chat = {
        label: t
        for label, t in tasks.items()
        if t.get("centered") is not None and t.get("kind") in ("generate", "choice")
    }
    if not chat:
        return None
    score, stderr = mean_centered(chat)
    return dict(score=score, stderr=stderr, tasks=sorted(chat))


# ---- two checkpoints on the same items


def sign_test(wins: int, losses: int) -> float:
    """Exact two-sided p-value of so many wins and losses if both were equally likely (McNemar's test on outcomes 0 and 1)."""
    n, k = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    if n < 1000:  # whole numbers, no rounding
        return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    top = max(logs)
    return min(
        1.0,
        2 * math.exp(top + math.log(math.fsum(math.exp(x - top) for x in logs)) - n * math.log(2)),
    )


def sign_flips(differences, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference of pairs, by flipping the sign of each pair at random."""
    d, rng = np.asarray(differences, np.float64), np.random.default_rng(seed)
    d = d[d != 0]
    if not d.size:
        return 1.0
    seen, limit = 0, abs(d.sum()) * (1 - 1e-9)
    for i in range(0, draws, BATCH):
        flips = rng.integers(0, 2, (min(BATCH, draws - i), d.size), np.int8) * 2.0 - 1
        seen += int((np.abs(flips @ d) >= limit).sum())
    return (1 + seen) / (1 + draws)


def _normal(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _paired(a: dict, b: dict):
    """Items of both by id: the ids, and the two lists of items; what only one side has is left out."""
    one, two = ({item["id"]: item for item in side.get("items", ())} for side in (a, b))
    ids = [i for i in one if i in two]
    return ids, [one[i] for i in ids], [two[i] for i in ids]


def _compare_task(a: dict, b: dict) -> dict | None:
    """delta (b - a), stderr, p, n of one task of two records, from the items that both have."""
    # other items were shown as examples
    if a.get("kind") == "core" and a.get("limit") != b.get("limit"):
        return None
    ids, one, two = _paired(a, b)
    if not ids:
        return None
    if all("correct" in item for item in one + two):
        d = np.array([y["correct"] - x["correct"] for x, y in zip(one, two)], np.float64)
        if set(np.unique(d)) <= {-1.0, 0.0, 1.0}:
            wins, losses = int((d > 0).sum()), int((d < 0).sum())
            return dict(
                delta=float(d.mean()),
                stderr=_spread(d),
                p=sign_test(wins, losses),
                n=len(d),
                wins=wins,
                losses=losses,
                test="exact sign test (McNemar)",
                unit="points",
                better="higher",
            )
        return dict(
            delta=float(d.mean()),
            stderr=_spread(d),
            p=sign_flips(d),
            n=len(d),
            test="sign-flip permutation",
            unit="points",
            better="higher",
        )
    if not all("nats" in item for item in one + two):
        return None
    # against bytes where they are known, which do not depend on the tokenizer; else tokens, if both read the same ones
    by = next(
        (
            by
            for by in ("bytes", "tokens")
            if all(x.get(by) == y.get(by) is not None for x, y in zip(one, two))
        ),
        None,
    )
    if by is None:
        return None
    size = sum(x[by] for x in one)
    if not size:
        return None
    unit, scale = ("bits per byte", 1 / math.log(2)) if by == "bytes" else ("nats per token", 1.0)
    d = np.array([y["nats"] - x["nats"] for x, y in zip(one, two)], np.float64) * scale
    delta = float(d.sum() / size)
    residual = d - delta * np.array([x[by] for x in one], np.float64)
    stderr = math.sqrt((residual**2).sum() * len(d) / max(len(d) - 1, 1)) / size
    return dict(
        delta=delta,
        stderr=stderr,
        p=sign_flips(d),
        n=len(d),
        test="sign-flip permutation",
        unit=unit,
        better="lower",
    )


def _spread(d) -> float:
    """Standard error of a mean of differences; the least that n items allow where all are equal."""
    return (
        float(max(d.std(), 1 / math.sqrt(len(d))) / math.sqrt(len(d)))
        if d.std() == 0
        else float(d.std() / math.sqrt(len(d)))
    )


def _compare_means(a: dict[str, dict], b: dict[str, dict]) -> dict | None:
    """CORE or ChatCORE of two records: the mean over tasks of paired centred differences, signs flipped per question."""
    both = {
        label: _paired(a[label], b[label])
        for label in a
        if label in b and a[label].get("limit") == b[label].get("limit")
    }
    both = {
        label: pairs
        for label, pairs in both.items()
        if pairs[0] and "correct" in pairs[1][0] and "correct" in pairs[2][0]
    }
    if not both:
        return None
    weights, delta = {}, 0.0
    for label, (ids, one, two) in both.items():
        scale = 1 / ((1 - a[label]["baseline"]) * len(ids) * len(both))
        for i, x, y in zip(ids, one, two):
            key = a[label].get("source", label), i  # one question, however many tasks ask it
            weights[key] = weights.get(key, 0.0) + scale * (y["correct"] - x["correct"])
            delta += scale * (y["correct"] - x["correct"])
    sources = {}
    for (source, _), value in weights.items():
        sources.setdefault(source, []).append(value)
    variance = sum(len(v) * np.var(v) for v in sources.values())
    d = np.array(list(weights.values()))
    return dict(
        delta=float(delta),
        stderr=math.sqrt(variance),
        p=sign_flips(d),
        n=len(d),
        tasks=len(both),
        test="sign-flip permutation",
        unit="of the mean of centred scores",
        better="higher",
    )


def compare(
    a: dict, b: dict, names: tuple[str, str] = ("the first", "the second")
) -> dict[str, dict]:
    """Is the difference between two evaluation records real? {task: {"delta", "stderr", "p", "p_adjusted", "n", "sentence", …}}.

    delta is b - a on the items that both have (by id): points of accuracy as a fraction, bits per byte, or nats per token. p is that
    of a two-sided paired test; p_adjusted counts how many tasks are compared at once (Holm), and decides what the sentence says.
    Besides tasks there are "core", "chatcore" and "bpb/SOURCE" where both records have them. Tasks without common items, and
    CORE tasks measured with other limits, are left out.
    """
    found = {}
    for label in a.get("tasks", {}):
        if label in b.get("tasks", {}):
            found[label] = _compare_task(a["tasks"][label], b["tasks"][label])
    for name in ("core", "chatcore"):
        if a.get(name) and b.get(name):
            found[name] = _compare_means(_members(a, name), _members(b, name))
    for source in a.get("bpb", {}):
        if source in b.get("bpb", {}):
            found[f"bpb/{source}"] = _compare_bits(a["bpb"][source], b["bpb"][source])
    found = {label: entry for label, entry in found.items() if entry}
    running = 0.0
    for rank, label in enumerate(sorted(found, key=lambda label: found[label]["p"])):
        running = max(running, min(1.0, (len(found) - rank) * found[label]["p"]))
        found[label]["p_adjusted"] = running
    for label, entry in found.items():
        entry["sentence"] = _sentence(label, entry, names, len(found))
    return found


def _members(record: dict, name: str) -> dict[str, dict]:
    """The tasks that a mean is made of."""
    tasks = record.get("tasks", {})
    if name == "core":
        return {label: t for label, t in tasks.items() if t.get("kind") == "core"}
    return {label: tasks[label] for label in record[name]["tasks"] if label in tasks}


def _compare_bits(a: dict, b: dict) -> dict:
    """Bits per byte of two records: by documents where both kept them, else by their standard errors, as if texts were others."""
    paired = _compare_task(a, b)
    if paired:
        return paired
    delta, stderr = b["bpb"] - a["bpb"], math.hypot(a["stderr"], b["stderr"])
    return dict(
        delta=delta,
        stderr=stderr,
        p=_normal(delta / stderr) if stderr else float(delta == 0),
        n=0,
        test="unpaired z-test, which overestimates the error",
        unit="bits per byte",
        better="lower",
    )


def _sentence(label: str, entry: dict, names, compared: int) -> str:
    """The answer in words."""
    delta, stderr, p, sure = entry["delta"], entry["stderr"], entry["p"], entry["p_adjusted"]
    amount = lambda x: (
        f"{100 * x:.1f} points" if entry["unit"] == "points" else f"{x:.4f} {entry['unit']}"
    )
    chance = lambda p: f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    votes = (
        f", {names[1]} alone right on {entry['wins']} and {names[0]} on {entry['losses']} of {entry['n']}"
        if "wins" in entry
        else f" over {entry['n']} {'items' if entry['unit'] != 'bits per byte' else 'texts'}"
        if entry["n"]
        else ""
    )
    if delta == 0:
        return f"{label}: no difference{votes}."
    word = "better" if (delta > 0) == (entry["better"] == "higher") else "worse"
    head = f"{label}: {names[1]} is {word} by {amount(abs(delta))} (standard error {amount(stderr)}, {chance(p)}{votes})"
    if sure < CONFIDENT:
        return f"{head}: the difference is real."
    if p < CONFIDENT:
        return f"{head}: perhaps real, but of {compared} comparisons one looks like this by chance ({chance(sure)} for all of them)."
    return f"{head}: not distinguishable from chance; with these items only a difference above {amount(1.96 * stderr)} would show."
