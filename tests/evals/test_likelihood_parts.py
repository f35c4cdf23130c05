"""Batches of a measurement by likelihood, by hand: which shapes, what rows share, in what order."""

import types

import numpy as np
import pytest

from lib.evals import likelihood
from lib.evals.likelihood import Row, Score
from lib.files import UserError


def row(ids, first=0, targets=((0,),), owners=(None,)):
    return Row(np.array(ids, ">i4").tobytes(), first, [list(t) for t in targets], list(owners))


# ---- shapes --------------------------------------------------------------------------------------


def test_powers_and_how_many_fit():
    assert [likelihood._power(n) for n in (0, 1, 2, 3, 4, 5, 9)] == [1, 1, 2, 4, 4, 8, 16]
    assert [likelihood._power(n, 4) for n in (1, 2, 4, 5, 16, 17)] == [1, 4, 4, 16, 16, 64]
    tokens = (0, 7, 8, 15, 16, 31, 32, 48)
    assert [likelihood._fit(n, 8) for n in tokens] == [1, 1, 1, 1, 2, 2, 4, 4]
    passes = likelihood.ForwardPasses(None, None, 16)
    assert [passes.length(n, 64) for n in (3, 8, 9, 13, 65)] == [8, 8, 12, 16, 96]
    assert [passes.slots(n) for n in (3, 16, 17, 65)] == [16, 16, 24, 96]
    # where little is to be read, few lengths
    few = passes._replace(few=True)
    assert [few.slots(n) for n in (3, 64, 65, 129)] == [64, 64, 128, 256]
    assert [few.length(n, 512) for n in (3, 64, 65, 256, 257)] == [64, 64, 256, 256, 512]
    assert passes.most(32) == 4
    padded = likelihood._pad([[1, 2], [3]], 3, 3)
    assert padded.tolist() == [[1, 2, -1], [3, -1, -1], [-1, -1, -1]]


def test_what_fills_no_batch_joins_the_next_longer_one():
    width = lambda n: 8 if n <= 8 else 16
    batches = lambda things, *sizes: list(likelihood._batches(things, width, *sizes))
    given = [9, 1, 2, 3, 10, 4, 5]
    assert batches(given, 16) == [(2, [1, 2]), (2, [3, 4]), (1, [5]), (1, [9]), (1, [10])]
    assert batches(given, 16, 1) == [(1, [n]) for n in (1, 2, 3, 4, 5, 9, 10)]
    # the last are padded to a power of four, and to no more than a batch
    assert batches([1, 2, 3], 64) == [(4, [1, 2, 3])] and batches([1], 64) == [(1, [1])]
    assert batches([1, 2, 3], 16) == [(2, [1, 2]), (1, [3])]
    assert batches([1, 2, 3, 9], 32) == [(2, [1, 2]), (2, [3, 9])] and batches([], 8) == []


def test_what_is_asked_of_rows_that_lie_behind_one_another():
    one = row([], 2, [(5, 6), (7, 8)], "ab")
    places, targets = likelihood._asked([one, row([], 0, [(9,)])], [1, 0], 4)
    assert places.tolist() == [[0, 0, 1, 0], [1, 2, 0, 0]]
    assert targets.tolist() == [[5, 7], [6, 8], [9, -1], [-1, -1]]
    assert likelihood._asked([one, one, one], [0] * 3, 1)[1].shape == (8, 2)


def test_kernels_read_whole_tiles_and_no_row_is_longer_than_the_context(monkeypatch):
    def shapes(name, *lengths):
        config = types.SimpleNamespace(attention_name=name, sequence_len=300)
        passes = likelihood.ForwardPasses(None, config, 512)
        rows = [row(range(n)) for n in lengths]
        return [shape for _, shape in passes.read_whole(rows)]

    monkeypatch.setattr(likelihood, "_whole", lambda params, config, ids, *asked: ids.shape)
    assert shapes("xla", 20) == [(1, 24)] and shapes("xla", 5) == [(1, 16)]
    for name in ("splash", "pallas"):
        assert shapes(name, 20) == shapes(name, 128) == [(1, 128)]
        assert shapes(name, 140) == [(1, 256)] and shapes(name, 290) == [(1, 300)]
    assert shapes("xla", 290) == [(1, 300)]
    # 21 rows of 24 tokens would fit, 16 are taken, and of two widths the longer one counts
    assert shapes("xla", *[20] * 17) == [(16, 24), (1, 24)]
    assert shapes("xla", 20, 30) == [(4, 32)]


# ---- what is shared ------------------------------------------------------------------------------


def thing(ids, first=None):
    ids = list(ids)
    first = len(ids) - 1 if first is None else first
    key = np.array(ids, ">i4").tobytes()
    return types.SimpleNamespace(key=key, length=len(ids), first=first)


def shared(*things, near=0.85, enough=1):
    """(length of what is read once, how many share it), run by run."""
    return [(n, len(run)) for n, run in likelihood._share(things, near, enough)]


def test_a_beginning_is_shared_where_that_is_worth_it():
    def pair(common, length):
        return [thing([*range(common), *[n] * (length - common)]) for n in (500, 600)]

    apart = [(0, 1), (0, 1)]
    assert shared(*pair(8, 9)) == [(8, 2)] and shared(*pair(7, 9)) == apart
    assert shared(*pair(8, 9), enough=8) == [(8, 2)] and shared(*pair(8, 9), enough=9) == apart
    # a fifth of their tokens at least
    assert shared(*pair(8, 20)) == [(8, 2)] and shared(*pair(8, 21)) == apart
    # what is scored is not shared
    same = thing(range(20), 19), thing(range(20), 8)
    assert shared(*same) == [(8, 2)]
    assert shared(thing(range(20), 19), thing(range(20), 7)) == apart


def test_runs_end_where_neighbours_have_less_in_common():
    a, b = (thing([*range(20), n]) for n in (500, 600))
    c = thing([*range(10), *[700] * 11])
    assert shared(b, a, c) == [(20, 2), (0, 1)]
    assert shared(b, a, c, near=0.5) == [(10, 3)]
    assert shared(a) == [(0, 1)] and shared() == []
    key = lambda *ids: np.array(ids, ">i4").tobytes()
    assert likelihood._common(key(1, 2, 3), key(1, 2, 4, 5)) == 2
    assert likelihood._common(key(1, 2), key(1, 2, 4)) == 2 and likelihood._common(b"", key(1)) == 0


# ---- answers -------------------------------------------------------------------------------------


def test_answers_go_to_whom_they_belong():
    rows = [row([], 0, [(5, 6), (5, 7)], "ab"), row([], 0, [(1,)], "c")]
    logprob = np.array([[-1, -2], [-3, -4], [-5, 0], [9, 9]])
    best, calls = np.array([5, 7, 1, 0]), []
    told = likelihood._answers([(rows, (logprob, best))], 3, lambda *done: calls.append(done))
    assert [(owner, p.tolist(), greedy.tolist()) for owner, p, greedy in told] == [
        ("a", [-1, -3], [True, False]),
        ("b", [-2, -4], [True, True]),
        ("c", [-5], [True]),
    ]
    assert calls == [(3, 3)]


def test_the_device_has_two_batches_before_the_first_is_waited_for():
    drawn = []

    def batches():
        for n in range(4):
            drawn.append(n)
            yield [row([], 0, [(1,)], [n])], (np.zeros((1, 1)), np.ones(1))

    told = likelihood._answers(batches(), 4, None)
    assert next(told)[0] == 0 and drawn == [0, 1, 2]
    assert [owner for owner, _, _ in told] == [1, 2, 3]


def test_tokens_that_the_model_does_not_have():
    config = types.SimpleNamespace(vocab_size=10)
    likelihood._check_ids(config, np.array([0, 9]), 7)
    for bad in (-1, 10):
        with pytest.raises(UserError, match=f"request 7 holds token {bad}, outside"):
            likelihood._check_ids(config, np.array([3, bad]), 7)


def test_windows_and_their_pieces():
    windows = lambda *given: list(likelihood._windows(*given))
    assert windows([1, 2], [3, 4, 5], 3, 1) == [([2], [3, 4, 5], 1)]
    pieces = [([1, 2], [3], 0), ([2, 3], [4], 1), ([3, 4], [5], 2)]
    assert windows([1, 2], [3, 4, 5], 2, 1) == pieces
    assert windows([1, 2], [3, 4, 5], 4, 1) == [([1, 2], [3, 4, 5], 0)]
    assert windows([1, 2], [], 2, 1) == []
    logprobs, greedy = likelihood._joined(
        [(np.float32([-1.0]), [True]), (np.float32([-2]), [False])]
    )
    assert likelihood._score(logprobs, greedy, 3) == Score(-3.0, 2, False, 3)
    assert likelihood._score(*likelihood._joined([]), 0) == Score(0.0, 0, True, 0)


# ---- what is read, and behind what ---------------------------------------------------------------


def passes_of(batch_tokens=64, sequence_len=30):
    config = types.SimpleNamespace(sequence_len=sequence_len, attention_name="xla")
    return likelihood.ForwardPasses("weights", config, batch_tokens)


def test_sets_are_read_behind_their_beginning(monkeypatch):
    Passes, Group = likelihood.ForwardPasses, likelihood.Group
    one, two, three, long = (row(range(n)) for n in (9, 17, 20, 31))
    apart, pair, alone = Group([one]), Group([two, one], shared=8), Group([three])
    monkeypatch.setattr(Passes, "begin", lambda self, group, prefix, slots: (group, prefix, slots))
    monkeypatch.setattr(Passes, "read_behind", lambda self, *given: [("behind", *given)])
    monkeypatch.setattr(Passes, "read_whole", lambda self, rows: [("whole", rows)])
    monkeypatch.setattr(Passes, "read_groups", lambda self, *given: [("groups", *given)])
    plan = [(5, [apart, pair]), (0, [alone])]
    monkeypatch.setattr(likelihood, "_plan", lambda rows, batch_tokens: plan)
    passes = passes_of()
    start = apart, 5, 24
    nothing = ("groups", None, 0, [], 24)
    assert list(passes.read(None, True)) == [
        ("behind", start, 5, [one], 24),
        ("groups", start, 5, [pair], 24),
        ("whole", [three]),
        nothing,
    ]
    assert list(passes.read([one, three], False)) == [("whole", [one, three]), nothing]
    # what is longer than the context needs a cache
    behind = ("behind", None, 0, [long], 32)
    assert list(passes.read([long], False)) == [behind, ("groups", None, 0, [], 32)]
    assert list(passes_of(sequence_len=31).read([long], False))[0] == ("whole", [long])
    assert list(passes.read([], False)) == []


def test_ends_go_on_from_their_row_of_the_cache(monkeypatch):
    given = []
    monkeypatch.setattr(likelihood, "_ends", lambda *what: given.append(what) or "answers")
    monkeypatch.setattr(likelihood, "LEAST_ANSWERS", 2)
    one, two = row([1, 2, 3, 4], first=3), row([5, 6, 7], first=2)
    tails = [likelihood.Tail(2, one, 3), likelihood.Tail(1, two, 1)]
    passes = passes_of()
    assert passes.read_tails("cache", tails, 4, 3) == ([one, two], "answers")
    [(weights, config, cache, cached, ids, places, _)] = given
    assert (weights, config, cache) == ("weights", passes.config, "cache")
    assert cached.tolist() == [2, 1, 0, 0]
    assert ids.tolist() == [[4, -1, -1], [6, 7, -1], [-1] * 3, [-1] * 3]
    assert places.tolist() == [[0, 1], [0, 1]]


def test_rows_one_by_one_behind_a_beginning_or_in_an_empty_cache(monkeypatch):
    Passes = likelihood.ForwardPasses
    monkeypatch.setattr(Passes, "read_tails", lambda self, *given: given)
    monkeypatch.setattr(likelihood, "init_cache", lambda config, rows, slots: (rows, slots))
    rows = [row(range(20)), row(range(22))]
    tails = lambda prefix: [likelihood.Tail(0, one, prefix) for one in rows]
    passes = passes_of()
    # two widths, of which the first fills no batch
    assert list(passes.read_behind("start", 12, rows, 32)) == [("start", tails(12), 4, 12)]
    assert list(passes.read_behind(None, 0, rows, 32)) == [((1, 32), tails(0), 2, 24)]
    begun = []
    monkeypatch.setattr(likelihood, "_begin", lambda *given, **more: begun.append((given, more)))
    passes.begin(likelihood.Group([row(range(20))]), 9, 32)
    [((_, _, ids), more)] = begun
    assert ids.tolist() == [[*range(9), -1, -1, -1]] and more == dict(slots=32)


def test_groups_are_read_once_and_then_their_ends(monkeypatch):
    Passes, log = likelihood.ForwardPasses, []
    monkeypatch.setattr(Passes, "read_tails", lambda self, *given: given)

    def begin(params, config, ids, slots):
        log.append(("begin", ids.tolist(), slots))
        return "begun"

    def extend(params, config, start, copies, ids):
        log.append(("extend", start, copies.tolist(), ids.tolist()))
        return "extended"

    monkeypatch.setattr(likelihood, "_begin", begin)
    monkeypatch.setattr(likelihood, "_extend", extend)
    rows = [row([*range(10), n, *range(count)]) for n, count in ((50, 2), (60, 3))]
    group = likelihood.Group(rows, shared=10)
    tails = [likelihood.Tail(0, one, 10) for one in rows]
    passes = passes_of(batch_tokens=64)
    assert list(passes.read_groups("start", 0, [group], 32)) == [("begun", tails, 2, 8)]
    assert log.pop() == ("begin", [[*range(10), -1, -1]], 12 + 8)
    assert list(passes.read_groups("start", 4, [group], 32)) == [("extended", tails, 2, 8)]
    assert log.pop() == ("extend", "start", [0], [[*range(4, 10), -1, -1]])
    # where little is to be read all groups have caches of one length
    few = passes_of(batch_tokens=128)._replace(few=True)
    assert list(few.read_groups("start", 0, [group], 64)) == [("begun", tails, 2, 64)]
    assert log.pop() == ("begin", [[*range(10)] + [-1] * 54], 64)
    # as many ends at a time as there is room for
    narrow = passes_of(batch_tokens=8)
    ends = [("begun", [tail], 1, 8) for tail in tails]
    assert list(narrow.read_groups("start", 0, [group], 32)) == ends
