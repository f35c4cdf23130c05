"""An engine's bookkeeping by hand: its programs are replaced by ones that note what they are
given, so that nothing is compiled and every shape and number is known.
"""

import types

import numpy as np
import pytest

from lib.config import Config
from lib.files import UserError
from lib.generate import Engine, Engines, Sampling, decode, engine
from lib.generate.decode import Chunk
from lib.generate.engine import bucket, check_draft, sides_for

CONFIG = Config(
    vocab_size=50, sequence_len=64, n_layer=1, n_embd=24, n_head=1, n_kv_head=1, head_dim=8
)


class Paper(Engine):
    """An Engine without a model: `filled` are its prefills, `asked` its dispatches, and every row
    writes 1, 2, 3 and so on.
    """

    def __init__(self, slots=4, length=300, tool=None, **speculation):
        tokenizer = types.SimpleNamespace(
            special={"<|python_start|>": 48, "<|python_end|>": 49}, tokens=[b"x"] * 48
        )
        super().__init__({}, CONFIG, slots, length, tokenizer, tool, **speculation)
        self.filled = []
        self.asked = []
        self.prefill = self.note_prefill
        self.decode = self.note_decode
        self.logprob = -1.0

    def note_prefill(self, params, config, cache, slots, tokens, fresh):
        self.filled.append((slots.tolist(), tokens.tolist(), fresh))
        return cache

    def note_decode(self, params, config, cache, rows, forced, count, *, pause):
        self.asked.append((forced, count, pause))
        B, C = forced.shape
        id = np.full((B, C), -1)
        id[:, :count] = np.arange(1, count + 1)
        top = np.broadcast_to(np.arange(20), (B, C, 20))
        chunk = Chunk(id, np.full((B, C), self.logprob), top, -top / 2.0, 0, 0)
        return cache, rows, chunk


@pytest.fixture(autouse=True)
def without_a_model(monkeypatch):
    monkeypatch.setattr(engine.model, "decoding_params", lambda params, config: params)
    monkeypatch.setattr(engine, "empty_cache", lambda *shape: shape)
    monkeypatch.setattr(engine, "repeat_rows", lambda cache, source: ("copied", *source))
    monkeypatch.setattr(engine, "set_rows", set_rows)


def set_rows(rows, slots, new):
    """`decode.set_rows` with numpy."""
    rows = {name: np.array(value) for name, value in rows.items()}
    for name, value in new.items():
        for row, slot in enumerate(slots):
            if slot < len(rows[name]):
                rows[name][slot] = value[row]
    return rows


# ---- sizes ---------------------------------------------------------------------------------------


def test_buckets_by_hand():
    sizes = [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    assert [bucket(n) for n in range(1, 18)] == sizes
    assert (bucket(0), bucket(24), bucket(25), bucket(48), bucket(49)) == (1, 24, 32, 48, 64)
    assert [bucket(n, 16) for n in (0, 15, 16, 17, 25)] == [16, 16, 16, 24, 32]


def test_a_model_is_split_by_the_bytes_that_a_token_reads(monkeypatch):
    monkeypatch.setattr(engine.os, "cpu_count", lambda: 2)
    some = lambda count: types.SimpleNamespace(nbytes=count)
    small = engine.SMALL
    assert small == 32 * 2**20
    for blocks, head, embed, sides in (
        (small - 1, 1, 10 * small, 2),
        (small, 1, 0, 1),
        (small - 1, None, 1, 2),
        (small, None, 1, 1),
    ):
        params = {"blocks": some(blocks), "embed": some(embed)}
        if head is not None:
            params["head"] = some(head)
        assert sides_for(params, 4) == sides
    params = {"blocks": some(1), "embed": some(1)}
    assert [sides_for(params, slots) for slots in (1, 2, 3, 4, 5, 6)] == [1, 1, 1, 2, 1, 2]
    for count, sides in ((1, 1), (None, 1), (2, 2)):
        monkeypatch.setattr(engine.os, "cpu_count", lambda count=count: count)
        assert sides_for(params, 4) == sides


@pytest.mark.parametrize("slots, length, speculate", [(0, 9, 0), (1, 1, 0), (1, 9, -1)])
def test_sizes_that_make_no_engine(slots, length, speculate):
    with pytest.raises(UserError, match=f"got {slots}, {length}, {speculate}"):
        Paper(slots, length, speculate=speculate)


def test_what_an_engine_holds():
    draft = {}, CONFIG.replace(n_layer=2)
    plain, own, other = Paper(1, 2), Paper(2, 9, speculate=3), Paper(2, 9, speculate=3, draft=draft)
    assert plain.caches == [(CONFIG, 1, 2, 0)]
    # room for what is drafted in vain
    assert own.caches == [(CONFIG, 2, 12, 3)]
    assert other.caches == [(CONFIG, 2, 12, 3), (draft[1], 2, 12, 3)]
    assert own.rows["history"].shape == (2, 9)
    assert "history" not in plain.rows and "history" not in other.rows
    assert plain.pause == -1 and Paper(tool=str).pause == 49
    assert (plain.free, own.free, own.drafted, own.accepted) == (1, 2, 0, 0)
    assert not plain.fresh
    with pytest.raises(UserError, match="tools need the tokenizer"):
        Engine({}, CONFIG, 1, 9, tool=str)
    for speculate, vocab in ((0, 50), (1, 51)):
        with pytest.raises(UserError, match=f"speculate={speculate} and a vocabulary of {vocab}"):
            check_draft(CONFIG, CONFIG.replace(vocab_size=vocab), speculate)
    check_draft(CONFIG, CONFIG.replace(n_layer=3), 1)


# ---- rows join -----------------------------------------------------------------------------------


def test_prompts_are_read_in_few_shapes():
    paper = Paper(slots=5)
    paper.add([7], Sampling(1))
    paper.add_many([[1] * 21, [2, 3]], [Sampling(1)] * 2)
    paper.add([4] * 240, Sampling(1))
    none = [-1]
    assert paper.filled[0] == ([0], [none * 16], True), "of a single token nothing"
    rows = [[1] * 20 + none * 4, [2] + none * 23]
    assert paper.filled[1] == ([1, 2], rows, True)
    # in two passes, and only the first from empty
    assert paper.filled[2:] == [
        ([3], [[4] * 128], True),
        ([3], [[4] * 111 + none * 17], False),
    ]
    # one that has not compiled all shapes makes do with one
    paper.narrowest = 100
    paper.add([1] * 9, Sampling(1))
    assert len(paper.filled[-1][1][0]) == 100
    exact = Paper(slots=1, length=400)
    exact.add([1] * 129, Sampling(1))
    assert [len(tokens[0]) for _, tokens, _ in exact.filled] == [128]


def test_slots_are_filled_up_with_ones_that_are_not_there():
    paper = Paper(slots=7)
    paper.add_many([[n, n] for n in range(5)], [Sampling(1)] * 5)
    [(slots, tokens, _)] = paper.filled
    assert slots == [0, 1, 2, 3, 4, 7] and [row[0] for row in tokens] == [0, 1, 2, 3, 4, -1]


def test_rows_are_read_in_groups_of_one_size_where_that_is_asked():
    paper = Paper(slots=5)
    paper.together = 2
    prompts = [[n, n] for n in range(5)]
    assert paper.add_many(prompts, [Sampling(n + 1) for n in range(5)]) == [0, 1, 2, 3, 4]
    read = [(slots, [row[0] for row in tokens]) for slots, tokens, _ in paper.filled]
    # the last group is filled up with a slot that is not there
    assert read == [([0, 1], [0, 1]), ([2, 3], [2, 3]), ([4, 5], [4, -1])]
    assert paper.rows["left"].tolist() == [1, 2, 3, 4, 5]


def test_equal_prompts_are_read_once_and_copied():
    paper = Paper(slots=5)
    paper.add([9], Sampling(1))
    paper.add_many([[1, 2], [3, 4], [1, 2], [1, 2]], [Sampling(1)] * 4)
    assert paper.filled[1][0] == [1, 2]
    assert paper.caches == [("copied", 0, 1, 2, 1, 1)]
    other = Paper(slots=3)
    other.add_many([[1, 2], [3, 4]], [Sampling(1)] * 2)
    assert other.caches[0][0] is CONFIG, "nothing is copied where all differ"


def test_each_row_has_its_own_state():
    paper = Paper(slots=4, length=20, speculate=2)
    samplings = [Sampling(9, seed=1), Sampling(99, seed=2), Sampling(17, seed=3)]
    assert paper.add_many([[1, 2], [3, 4, 5], [6, 7, 8]], samplings) == [0, 1, 2]
    assert paper.rows["seed"].tolist() == [1, 2, 3, 0]
    assert paper.rows["token"].tolist() == [2, 5, 8, 0]
    # the slot is full when prompt and answer together are its length
    assert paper.rows["left"].tolist() == [9, 17, 17, 0]
    assert [writer.sampling.max_tokens for writer in paper.writers.values()] == [9, 17, 17]
    assert paper.rows["history"][:3, :4].tolist() == [[1, 2, 0, 0], [3, 4, 5, 0], [6, 7, 8, 0]]
    assert paper.rows["alive"].tolist() == [True] * 3 + [False]
    assert paper.free == 1 and paper.add_many([], []) == []


def test_what_could_never_be_added():
    paper = Paper(slots=2, length=9)
    assert paper.add([0, 49], Sampling(1)) == 0
    for prompt, match in (
        ([], "no tokens"),
        ([1, 50], "token 50 is outside .* of 50"),
        ([-1], "token -1 is outside"),
        ([1] * 9, "a prompt of 9 tokens leaves no room in a cache of 9"),
    ):
        with pytest.raises(UserError, match=match):
            paper.check(prompt, Sampling(1))
    paper.check([1] * 8, Sampling(1, stop_strings=("a",)))
    paper.tokenizer = None
    with pytest.raises(UserError, match="stop strings need the tokenizer"):
        paper.check([1], Sampling(1, stop_strings=("a",)))
    with pytest.raises(UserError, match="2 rows do not fit into 1 free slots"):
        paper.add_many([[1], [2]], [Sampling(1)] * 2)
    assert paper.free == 1 and len(paper.filled) == 1


# ---- rows are written ----------------------------------------------------------------------------


def test_a_new_rows_first_token_does_not_wait_for_a_chunk():
    paper = Paper()
    assert paper.step() == {} and paper.asked == []
    paper.add([1], Sampling(250))
    for count in (8, 8, 500):
        paper.step(count)
    paper.add([1], Sampling(250))
    paper.step()
    paper.step()
    assert [count for _, count, _ in paper.asked] == [1, 8, 128, 1, 8]
    assert engine.CHUNK == 8
    for forced, _, pause in paper.asked:
        assert forced.shape == (4, 128) and (forced == -1).all() and pause == -1


def test_rows_end_and_their_slots_are_free():
    paper = Paper()
    paper.add_many([[1], [2], [3]], [Sampling(4), Sampling(9), Sampling(9, stop=(3,))])
    ids = lambda written: {slot: [t.id for t in tokens] for slot, (tokens, _) in written.items()}
    ends = lambda written: {slot: end for slot, (_, end) in written.items()}
    first, second = paper.step(), paper.step(4)
    assert ids(first) == {0: [1], 1: [1], 2: [1]} and set(ends(first).values()) == {None}
    assert ids(second) == {0: [1, 2, 3], 1: [1, 2, 3, 4], 2: [1, 2]}
    assert ends(second) == {0: "length", 1: None, 2: "stop"}
    assert list(paper.writers) == [1] and paper.free == 3
    assert paper.rows["alive"].tolist() == [False, True, False, False]
    paper.cancel(0)
    paper.cancel(1)
    paper.cancel(1)
    assert paper.free == 4 and not paper.rows["alive"].any()


def test_what_a_tool_says_is_forced_as_far_as_a_chunk_goes():
    paper = Paper()
    paper.add_many([[1], [2]], [Sampling(250)] * 2)
    paper.step()
    paper.writers[1].forced = list(range(200))
    seen = paper.step(3)
    forced, *_ = paper.asked[-1]
    assert forced[1].tolist() == list(range(128)) and (forced[[0, 2, 3]] == -1).all()
    assert paper.writers[1].forced == list(range(3, 200)), "as many as were written"
    assert [token.forced for token in seen[1][0]] == [True] * 3
    assert [token.forced for token in seen[0][0]] == [False] * 3
    paper.writers[1].forced = [5]
    assert [token.forced for token in paper.step(3)[1][0]] == [True, False, False]


def test_alternatives_are_brought_for_those_who_ask():
    paper = Paper()
    paper.add_many([[1], [2]], [Sampling(99), Sampling(99, logprobs=2)])
    written = paper.step()
    assert written[0][0][0].top == [] and written[1][0][0].top == [(0, 0.0), (1, -0.5)]
    assert paper._fetch(paper._decode(np.full((4, 128), -1), 1)).top_id is not None
    paper.cancel(1)
    chunk = paper._fetch(paper._decode(np.full((4, 128), -1), 1))
    assert chunk.top_id is None and chunk.top_logprob is None
    assert paper.step()[0][0][0].top == []


def test_token_number_0_is_a_token():
    paper = Paper()
    paper.add([1], Sampling(9))
    decode = paper.decode

    def shifted(*given, **more):
        *rest, chunk = decode(*given, **more)
        return *rest, chunk._replace(id=np.maximum(chunk.id - 1, -1))

    paper.decode = shifted
    written = [token.id for _ in range(2) for token in paper.step(3)[0][0]]
    assert written == [0, 0, 1, 2]


def test_no_numbers_are_told():
    paper = Paper()
    paper.add([1], Sampling(9))
    paper.logprob = float("nan")
    with pytest.raises(UserError, match="computes no numbers"):
        paper.step()


def test_drafts_are_counted(monkeypatch):
    paper = Paper(speculate=2)
    given = {}

    def note(params, configs, caches, rows, forced, count, *, pause, speculate):
        given.update(count=count, pause=pause, speculate=speculate, configs=configs)
        *_, chunk = paper.note_decode(None, None, None, None, forced, count, pause=pause)
        return caches, rows, chunk._replace(drafted=np.int32(6), accepted=np.int32(4))

    monkeypatch.setattr(engine.speculative, "decode", note)
    paper.add([1], Sampling(99))
    paper.step()
    paper.step(5)
    assert given == dict(count=5, pause=-1, speculate=2, configs=(CONFIG,))
    assert (paper.drafted, paper.accepted) == (12, 8)


# ---- side by side --------------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch):
    """Engines of two parts with three slots each."""
    made = []

    def part(params, config, slots, length, tokenizer, tool, **speculation):
        made.append((params, slots, length, tool, speculation))
        return Paper(slots, length, tool)

    monkeypatch.setattr(engine, "Engine", part)
    engines = Engines({"a": 1}, CONFIG, 6, 40, "tokenizer", str, sides=2, speculate=3)
    assert made == [({"a": 1}, 3, 40, str, dict(draft=None, speculate=3))] * 2
    return engines


def test_parts_share_weights_that_were_made_ready_once(monkeypatch):
    made, given = [], []
    monkeypatch.setattr(
        engine.model, "decoding_params", lambda *model: made.append(model) or made[-1]
    )
    monkeypatch.setattr(
        engine, "Engine", lambda *args, **speculation: given.append((args, speculation))
    )
    draft = {"b": 2}, CONFIG.replace(n_layer=2)
    Engines({"a": 1}, CONFIG, 6, 40, sides=3, speculate=3, draft=draft)
    assert made == [({"a": 1}, CONFIG), draft] and len(given) == 3
    for (params, *_), speculation in given:
        assert params is made[0] and speculation["draft"] == (made[1], draft[1])
        assert speculation["draft"][0] is made[1]


def test_rows_are_dealt_to_the_part_with_most_room(pair):
    prompts = [[n] for n in range(5)]
    slots = pair.add_many(prompts, [Sampling(9, seed=n) for n in range(5)])
    assert slots == [0, 1, 2, 3, 4] and pair.free == 1 and pair.slots == 6 and pair.length == 40
    tokens = [part.rows["token"].tolist() for part in pair.parts]
    assert tokens == [[0, 2, 4], [1, 3, 0]]
    assert pair.parts[1].rows["seed"].tolist() == [1, 3, 0]
    pair.cancel(2)
    pair.cancel(0)
    assert [part.free for part in pair.parts] == [2, 1]
    # one each, then where there is more room
    assert pair.add_many([[7], [8], [9]], [Sampling(9)] * 3) == [0, 2, 5]
    assert pair.free == 0


def test_parts_are_written_together(pair):
    pair.add_many([[1], [2], [3]], [Sampling(9), Sampling(3), Sampling(9)])
    assert {slot: len(tokens) for slot, (tokens, _) in pair.step().items()} == {0: 1, 1: 1, 2: 1}
    pair.add_many([[4]], [Sampling(9)])
    # the new one's first token waits for the slowest part
    written = pair.step()
    assert {slot: len(tokens) for slot, (tokens, _) in written.items()} == dict.fromkeys(
        range(4), 1
    )
    written = pair.step(5)
    assert {slot: end for slot, (_, end) in written.items()} == {
        0: None,
        1: "length",
        2: None,
        3: None,
    }
    assert [len(written[slot][0]) for slot in range(4)] == [5, 1, 5, 5]
    pair.parts[0].drafted, pair.parts[1].drafted = 3, 4
    pair.parts[0].accepted, pair.parts[1].accepted = 1, 1
    assert (pair.drafted, pair.accepted) == (7, 2)


def test_one_part_needs_no_thread(monkeypatch):
    monkeypatch.setattr(engine, "Engine", lambda *args, **speculation: Paper(args[2], args[3]))
    single = Engines({}, CONFIG, 3, 40, sides=1)
    single.threads = None
    assert single.add_many([[1], [2]], [Sampling(2)] * 2) == [0, 1]
    assert set(single.step()) == {0, 1} and single.free == 3 - 2


# ---- all at once ---------------------------------------------------------------------------------


def test_engines_are_just_large_enough(monkeypatch):
    made, counts = [], []

    class Noted(Paper):
        def __init__(self, params, config, slots, length, tokenizer, tool, **speculation):
            made.append((slots, length, speculation))
            super().__init__(slots, length, tool)

        def step(self, count):
            counts.append(count)
            return super().step(count)

    monkeypatch.setattr(engine, "Engines", Noted)
    prompts = [[1] * 3, [2], [3], [4], [5]]
    texts = engine.generate({}, CONFIG, prompts, Sampling(2, seed=7))
    assert texts == [[1, 1]] * 5 and made == [(6, 128, dict(speculate=0, draft=None))]
    # prompt and answer together have room
    engine.generate({}, CONFIG, [[1] * 120], Sampling(9), speculate=2, draft="d")
    assert made[1] == (1, 192, dict(speculate=2, draft="d"))
    # who waits for a tool or may end any time is looked at more often
    counts.clear()
    engine.generate({}, CONFIG, [[1]], Sampling(1))
    engine.generate({}, CONFIG, [[1]], Sampling(1), tool=str)
    engine.generate({}, CONFIG, [[1]], Sampling(1, stop_strings=("a",)))
    list(engine.stream({}, CONFIG, [[1]], Sampling(1)))
    assert counts == [128, 32, 32, 8]
    streamed = list(engine.stream({}, CONFIG, [[1], [2]], Sampling(4)))
    assert streamed == [[[1], [1]], [[1, 2, 3], [1, 2, 3]]]
    assert engine.generate({}, CONFIG, [], Sampling(1)) == []
    assert list(engine.stream({}, CONFIG, [], Sampling(1))) == []


def test_rows_draw_by_seeds_of_their_own(monkeypatch):
    seeds = []

    class Noted(Paper):
        def __init__(self, params, config, slots, length, *rest, **speculation):
            super().__init__(slots, length)

        def add_many(self, prompts, samplings):
            seeds.extend(sampling.seed for sampling in samplings)
            return super().add_many(prompts, samplings)

    monkeypatch.setattr(engine, "Engines", Noted)
    engine.generate({}, CONFIG, [[1]] * 3, Sampling(1, seed=5))
    assert seeds == [5, 6, 7]


def test_numpys_twin_of_writing_rows_is_the_devices():
    """What stands for `set_rows` above does what it does."""
    rows = {"a": np.arange(3), "b": np.zeros((3, 2))}
    slots, new = np.array([2, 0, 3]), {"a": np.array([7, 8, 9]), "b": np.ones((3, 2))}
    own, theirs = set_rows(rows, slots, new), decode.set_rows(dict(rows), slots, new)
    for name in rows:
        np.testing.assert_array_equal(own[name], theirs[name])
