"""Questions put to a model, part by part, by hand: no model is there, and nothing is computed."""

import contextlib
import math
import types

import numpy as np
import pytest

from lib.data.tokenizer import Tokenizer
from lib.evals import questions, stats
from lib.evals.likelihood import Score
from lib.files import UserError
from lib.generate import Sampling, Token
from lib.tasks import Task
from tests.helpers.golden import PARITY
from tests.helpers.hub_rows import CHAT

TOKENIZER = Tokenizer.load(PARITY / "tokenizer.json")


def config_of(sequence_len):
    return types.SimpleNamespace(sequence_len=sequence_len)


# ---- settings and shapes -------------------------------------------------------------------------


def test_settings_at_their_ends():
    least = dict(limit=1, batch=1, max_tokens=1, samples=1)
    assert questions.Questions(**least).temperature == 0.0
    assert questions.Questions(samples=2, temperature=0.5).samples == 2
    for name in least:
        with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
            questions.Questions(**{name: 0}, temperature=1.0)
    for settings in (dict(temperature=-0.5), dict(samples=2)):
        with pytest.raises(UserError, match="it must not be negative, nor 0 for more than one"):
            questions.Questions(**settings)
    plain = questions.Questions()
    assert (plain.limit, plain.seed, plain.batch, plain.max_tokens) == (None, 0, 32, 256)
    assert (plain.temperature, plain.samples, plain.shuffle) == (0.0, 1, False)


def test_widths_double_from_128_on():
    given = (0, 1, 128, 129, 256, 257, 512, 513)
    assert [questions._width(n) for n in given] == [128, 128, 128, 256, 256, 512, 512, 1024]
    padded = questions._padded([[1, 2], [3] * 129], config_of(200), 3, -1)
    assert padded.shape == (3, 200) and padded[:, :3].tolist() == [[1, 2, -1], [3] * 3, [-1] * 3]
    assert (padded[1] == 3).sum() == 129
    assert questions._padded([[1]], config_of(200), 1, 0).shape == (1, 128)


def test_a_size_that_is_there_serves_what_is_half_as_large():
    shapes = questions.Shapes()
    needed = (256, 128, 96, 512, 300, 200, 48, 95)
    assert [shapes.holding(n) for n in needed] == [256, 256, 96, 512, 512, 256, 96, 96]


def test_only_what_was_asked_is_handed_back(monkeypatch):
    given = []

    def next_logprobs(params, config, tokens, last):
        given.append((tokens, last))
        return np.arange(len(tokens))[:, None]

    def losses(params, config, inputs, targets):
        given.append((inputs, targets))
        return np.arange(inputs.size, dtype=np.float32).reshape(inputs.shape)

    monkeypatch.setattr(questions, "_next_logprobs", next_logprobs)
    monkeypatch.setattr(questions, "token_losses", losses)
    answers = questions.model_answers("params", config_of(64), None, 4)
    assert answers.next_logprobs([[1, 2], [3, 4, 5]]).tolist() == [[0], [1]]
    tokens, last = given.pop()
    assert last.tolist() == [1, 2, 0, 0] and tokens.shape == (4, 64)
    assert tokens[:, :3].tolist() == [[1, 2, 0], [3, 4, 5], [0] * 3, [0] * 3]
    rows = answers.losses([([1, 2], [2, 0]), ([3], [4])])
    assert [row.tolist() for row in rows] == [[0, 1], [64]] and rows[0].dtype == np.float64
    inputs, targets = given.pop()
    assert inputs[:2, :2].tolist() == [[1, 2], [3, 0]]
    assert targets[:2, :3].tolist() == [[2, 0, -1], [4, -1, -1]] and (targets[2:] == -1).all()


def test_an_engine_has_room_for_the_longest_prompt_and_its_answer(monkeypatch):
    def engines(*given):
        parts = [types.SimpleNamespace(slots=given[2] / 2) for _ in range(2)]
        return types.SimpleNamespace(given=given, parts=parts)

    monkeypatch.setattr(questions, "Engines", engines)
    monkeypatch.setattr(questions, "_written", lambda engine, prompts, samplings: engine)
    answers = questions.model_answers("params", "config", "tokenizer", 4)
    for lengths, most, slots, width, narrowest in (
        ((50, 3), (78, 200), 2, 256, 64),
        ((100,), (28,), 1, 256, 128),
        ((1,) * 6, (1,) * 6, 4, 256, 16),
        ((300,), (1,), 1, 512, 128),
        # with the program of the first, which is at most twice as wide
        ((33,), (1,), 1, 256, 64),
    ):
        samplings = [Sampling(tokens) for tokens in most]
        engine = answers.texts([[1] * length for length in lengths], samplings)
        wanted = ("params", "config", slots, width, "tokenizer", questions.calculator)
        assert engine.given == wanted
        # all prompts of a task in one shape
        assert [part.narrowest for part in engine.parts] == [narrowest] * 2
        assert [part.together for part in engine.parts] == [1] * 2


class Paper:
    """Engines whose rows write as many tokens as their "sampling" says, one in each step."""

    def __init__(self, slots):
        self.slots, self.rows, self.joined, self.widest = slots, {}, [], 0

    @property
    def free(self):
        return self.slots - len(self.rows)

    def add_many(self, prompts, samplings):
        free = [slot for slot in range(self.slots) if slot not in self.rows]
        slots = free[: len(prompts)]
        self.rows |= dict(zip(slots, samplings, strict=True))
        self.joined.append("".join(prompts))
        self.widest = max(self.widest, len(self.rows))
        return slots

    def step(self, count):
        assert count == questions.LONG_CHUNK
        written = {}
        for slot, left in list(self.rows.items()):
            written[slot] = [Token(left, -1.0)], "stop" if left == 1 else None
            self.rows[slot] = left - 1
            if left == 1:
                del self.rows[slot]
        return written


def test_prompts_join_in_groups_and_are_told_as_they_begin_and_end():
    engine = Paper(8)
    told = list(questions._written(engine, list("abcde"), [1, 2, 1, 3, 1]))
    assert engine.joined == ["ab", "cd", "e"]
    begun = [(i, None) for i in range(5)]
    assert told == [*begun, (0, [1]), (2, [1]), (4, [1]), (1, [2, 1]), (3, [3, 2, 1])]
    # as many as there is room for, and no more
    engine = Paper(8)
    assert len(list(questions._written(engine, list("abcdefghi"), [1] * 9))) == 18
    assert engine.widest == 8 and engine.joined == ["ab", "cd", "ef", "gh", "i"]
    narrow = Paper(3)
    ends = dict(questions._written(narrow, list("abcde"), [1, 2, 1, 3, 1]))
    assert narrow.joined == list("abcde") and ends[3] == [3, 2, 1]
    # one probability that is no number among others
    broken = Paper(4)
    broken.step = lambda count: {0: ([Token(1, -1.0), Token(2, math.nan)], "stop")}
    with pytest.raises(ValueError, match="no numbers"):
        list(questions._written(broken, ["a"], [1]))


# ---- scores --------------------------------------------------------------------------------------


def test_perplexities_and_accuracies_at_their_ends():
    assert questions._perplexity_of([1e6], [1]) == (math.exp(700), None)
    perplexity, error = questions._perplexity_of([2.0, 4.0], [1, 1])
    assert (perplexity, error) == (pytest.approx(math.e**3), pytest.approx(math.e**3))
    # where one item has nothing to choose from a guess is worth what the task says
    job = types.SimpleNamespace(task=types.SimpleNamespace(baseline=None), items=[dict(gold=0)] * 2)
    for options in ([2, 1], [], None):
        entry = questions._accuracy(job, [1.0, 0.0], options, extra=3)
        assert entry["score"] == 0.5 and entry["extra"] == 3
        assert entry["baseline"] is entry["majority"] is entry["centered"] is None


def test_one_score_that_is_no_number_is_enough():
    for scores in ([math.nan, -1.0], [-1.0, math.inf], [-math.inf, -1.0], [math.nan]):
        with pytest.raises(ValueError, match="scores that are no numbers"):
            questions._credit(scores, 0)
    assert questions._credit([-1.0, -1.0, -3.0], 1) == 0.5


def test_a_continuation_alone_is_greedy_or_not():
    items = [{}, {}]
    scores = [Score(-2.0, 1, True, 0), Score(-4.0, 2, False, 0)]
    correct, more = questions._one_continuation(scores, items)
    assert correct == [1.0, 0.0]
    assert items == [dict(correct=1.0, nats=2.0), dict(correct=0.0, nats=4.0)]
    cube = pytest.approx(math.e**3)
    assert more == dict(perplexity=cube, perplexity_stderr=cube)


def test_pass_at_k_of_some_items():
    entries = questions._pass_at(3, [0, 1, 3])
    scores = {k: entry["score"] for k, entry in entries.items()}
    assert scores == pytest.approx({"1": 4 / 9, "2": 5 / 9, "3": 2 / 3})
    assert entries["1"]["stderr"] == stats.proportion([0, 1 / 3, 1])[1]
    assert list(questions._pass_at(2, [1])) == ["1", "2"]
    assert 0 <= questions._seed("x") < 2**32 and questions._seed(1, 1) != questions._seed(1, 2)


# ---- continuations -------------------------------------------------------------------------------


def continued(context, choices, gold=0):
    job = types.SimpleNamespace(tokenizer=TOKENIZER, config=config_of(16))
    return questions._continued(job, dict(context=context, choices=choices, gold=gold))


def test_neighbours_with_one_context_are_one_request():
    pair = lambda context, choice: questions.continuation_ids(TOKENIZER, context, choice)
    (a, b), (_, c) = pair("a", " b"), pair("a", " c")
    assert continued("a", [" b", " c"]) == ([(a, [b, c])], False)
    other, d = pair("z", " b")
    alike = continued(["a", "a", "z"], [" b", " c", " b"])
    assert alike.requests == [(a, [b, c]), (other, [d])]
    assert len(continued(["a", "z", "a"], [" b"] * 3).requests) == 3
    assert questions.Continued([([1] * 3, [[1], [1] * 4]), ([1] * 5, [[1]])], False).length == 7
    for gold in (-1, 2):
        with pytest.raises(UserError, match="gold must be the index of one"):
            continued("a", [" b", " c"], gold)
    with pytest.raises(UserError, match="choices with text"):
        continued("a", [" b", ""])


def test_a_context_has_half_of_the_room_at_least():
    context = "abcdefghijklmnopqrstuvwxyz" * 2
    for choice in (" q", "qxzjqxzjqxzjqxzj"):
        before, after = questions.continuation_ids(TOKENIZER, context, choice)
        room = max(8, 16 - len(after))
        assert len(before) > 16 and (len(after) < 8) == (choice == " q")
        found = continued(context, [choice])
        assert found.cut and found.requests == [([before[0], *before[1 - room :]], [after])]


# ---- written answers -----------------------------------------------------------------------------


def test_of_a_written_answer_the_beginning_is_kept():
    told = []

    def texts(prompts, samplings):
        assert {len(prompt) <= 32 for prompt in prompts} == {True}
        for i, letter in ((1, "b"), (0, "a"), (2, "b"), (3, "b")):
            yield i, None
            yield i, TOKENIZER.encode(letter * 400)

    long = [dict(role="user", content="word " * 60), CHAT[1]]
    items = [dict(id="x", messages=CHAT), dict(id="y", messages=long)]
    task = Task("generate", lambda split: items, 0.0, grade=lambda item, text: text[0] == "a")
    settings = questions.Questions(samples=2, temperature=0.5, max_tokens=99)
    bar = types.SimpleNamespace(reset=told.append, update=lambda n=1: told.append(n))
    ask = types.SimpleNamespace(texts=texts)
    job = questions.TaskJob("t", task, items, ask, config_of(64), TOKENIZER, settings, bar)
    entry = questions._generate(job)
    assert entry["items"] == [
        dict(id="x", correct=0.5, text="a" * 300),
        dict(id="y", correct=0.0, text="b" * 300),
    ]
    assert (entry["max_tokens"], entry["temperature"], entry["samples"]) == (32, 0.5, 2)
    assert entry["truncated"] == 1 and entry["score"] == 0.25 and told == [4, 1, 1, 1, 1]
    assert entry["pass_at"]["1"]["score"] == 0.25 and entry["pass_at"]["2"]["score"] == 0.5


# ---- perplexity ----------------------------------------------------------------------------------


def test_a_chat_is_cut_where_the_models_context_ends():
    ids, mask = TOKENIZER.render_conversation(CHAT, 10**6)
    for width, cut in ((len(ids) - 2, True), (len(ids) - 1, False), (len(ids) + 5, False)):
        job = types.SimpleNamespace(tokenizer=TOKENIZER, config=config_of(width))
        read = questions._foreseen(job, dict(messages=CHAT))
        [(inputs, targets)] = read.rows
        assert read.cut == cut and inputs == ids[:-1][:width] and len(targets) == len(inputs)
        learnt = [t for t in targets if t >= 0]
        assert learnt == TOKENIZER.encode(CHAT[1]["content"])[: len(learnt)] and learnt
    whole = questions._foreseen(job, dict(text="a b"))
    assert whole.cut is False and len(whole.rows) == 1


def test_perplexities_per_token_byte_and_word_by_hand():
    job = types.SimpleNamespace(name="t", config=config_of(64))
    items = [
        dict(id="a", nats=2.0, tokens=1, bytes=4, words=1),
        dict(id="b", nats=4.0, tokens=2, bytes=4, words=3),
    ]
    entry = questions._foresight(job, items)
    units = dict(token=2.0, byte=0.75, word=1.5)
    for unit, nats in units.items():
        assert entry[f"per_{unit}"] == pytest.approx(math.exp(nats))
    assert (entry["score"], entry["stderr"]) == questions._perplexity_of([2.0, 4.0], [1, 3])
    assert entry["bpb"] == pytest.approx(6 / math.log(2) / 8)
    assert [entry[name] for name in ("nats", "tokens", "bytes", "words")] == [6.0, 3, 8, 4]
    # words count only where all items have them
    del items[1]["words"]
    entry = questions._foresight(job, items)
    assert "per_word" not in entry and "words" not in entry
    assert (entry["score"], entry["stderr"]) == questions._perplexity_of([2.0, 4.0], [1, 2])
    with pytest.raises(RuntimeError, match="task t, item b: the loss is not finite"):
        questions._foresight(job, [items[0], items[1] | dict(nats=math.inf)])
    with pytest.raises(UserError, match="task t has no text to measure"):
        questions._foresight(job, [dict(id="a", nats=0.0, tokens=0, bytes=0)])


# ---- which tasks, and what is kept of them -------------------------------------------------------


def test_tasks_by_name_and_files_by_their_path(monkeypatch):
    monkeypatch.setattr(questions, "jsonl", lambda path: f"own {path}")
    known = dict(a="task a", pets="other")
    names = ["a", "x/pets.jsonl", "x/dogs.jsonl", "y/dogs.jsonl", "a"]
    assert questions.find(names, known) == {
        "a": "task a",
        "x/pets.jsonl": "own x/pets.jsonl",
        "dogs": "own x/dogs.jsonl",
        "y/dogs.jsonl": "own y/dogs.jsonl",
    }
    assert questions.find(None, known) == known
    with pytest.raises(UserError, match="choose some of a, pets"):
        questions.find([], known)


def test_items_or_one_line_why_there_are_none():
    def task(items):
        return types.SimpleNamespace(items=lambda split: dict(test=items)[split])

    assert questions.items_or_reason(task([1, 2, 3]), 2) == [1, 2]
    assert questions.items_or_reason(task([1, 2, 3]), None) == [1, 2, 3]
    assert questions.items_or_reason(task([]), None) == "it has no test split"

    def away(split):
        raise UserError("no\n  network")

    assert questions.items_or_reason(types.SimpleNamespace(items=away), 2) == "no network"


def test_an_entry_says_how_fast_it_was_and_of_what(monkeypatch):
    clock = types.SimpleNamespace(perf_counter=iter([10.0, 14.0]).__next__)
    monkeypatch.setattr(questions, "time", clock)
    monkeypatch.setitem(questions.KINDS, "choice", lambda job: dict(score=1.0))
    settings = questions.Questions(seed=3, limit=9)
    job = types.SimpleNamespace(task=Task("choice", None), items=[1, 2], settings=settings)
    rate = dict(n=2, seconds=4.0, per_second=0.5)
    assert questions._measured(job) == dict(kind="choice", seed=3, limit=9, score=1.0, **rate)
    assert questions._mixed(dict(id="a"), 0) == dict(id="a")


def test_a_bar_and_lines_are_shown_only_where_that_is_wanted(monkeypatch):
    bars, lines = [], []

    def bar(**options):
        bars.append(options)
        return contextlib.nullcontext("bar")

    monkeypatch.setattr(questions, "progress_bar", bar)
    monkeypatch.setattr(questions, "tqdm", types.SimpleNamespace(write=lines.append))
    monkeypatch.setattr(questions, "_measured", lambda job: dict(kind="choice", bar=job.bar))
    monkeypatch.setattr(questions, "summary", lambda name, entry: f"{name} in a line")
    known = {name: Task("choice", lambda split: [1, 2]) for name in "ab"}
    known["c"] = Task("choice", lambda split: [])
    for progress, hidden in ((True, None), (False, True)):
        record = questions.evaluate(
            None, None, TOKENIZER, known=known, answers="ask", progress=progress
        )
        assert bars == [dict(total=2, desc=n, leave=False, disable=hidden) for n in "ab"]
        told = [f"{'c':20} skipped: it has no test split", "a in a line", "b in a line"]
        assert lines == (told if progress else []) and record["tasks"]["a"]["bar"] == "bar"
        bars.clear()
        lines.clear()


def test_the_words_of_every_kind_of_item():
    said = [dict(type="text", text="so "), dict(type="python_output", text="3")]
    chat = [dict(role="user", content="hi"), dict(role="assistant", content=said)]
    for item, words in (
        (dict(text="t"), "t"),
        (dict(context="c ", choices=["x", "y"], gold=1), "c y"),
        (dict(context=["p ", "q "], choices=["x", "y"], gold=1), "q y"),
        (dict(question="q?", options=["x", "y"], gold=1), "q? y"),
        (dict(messages=chat), "hi\nso 3"),
    ):
        assert questions.texts_of([item | dict(id="i")]) == [dict(id="i", text=words)]


def test_an_entry_in_a_line():
    entry = dict(kind="choice", score=0.5, stderr=0.125, baseline=0.25, majority=None)
    entry |= dict(truncated=0, n=4, per_second=2.0)
    say = lambda **more: questions.summary("t", entry | more)
    assert say() == f"{'t':20} 50.00 ± 12.50 % (random 25.0), n 4, 2.0/s"
    line = f"{'t':20} 50.00 % (random 25.0, majority 75.0), n 4, 2.0/s, 2 prompts cut"
    assert say(stderr=None, majority=0.75, truncated=2) == line
    text = dict(kind="perplexity", score=3.0, bpb=0.5)
    line = f"{'t':20} perplexity 3.00 ± 0.25, 0.5000 bits per byte, n 4, 2.0/s"
    assert say(**text, stderr=0.25) == line
    assert "perplexity 3.00, 0.5" in say(**text, stderr=None)
