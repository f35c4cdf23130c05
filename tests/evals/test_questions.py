"""lib/evals/questions.py: who knows scores 100, who guesses the baseline; records merge."""

import itertools
import json
import math
import re
import types

import jax
import numpy as np
import pytest

from lib import evals, model
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.evals import questions, records
from lib.evals.likelihood import Score
from lib.files import UserError
from lib.params import init_params
from lib.tasks import Task, choice_item, embedded, hub, stdlib
from lib.tasks.own import jsonl
from tests.helpers.hub_rows import CHAT, ROWS, parquet, rows_of

TOKENIZER = Tokenizer.train(
    ["the cat sat on the mat, and the answer is: 1 2 3 4 5 6 7 8 9 " * 9], 285
)
CONFIG = Config(
    vocab_size=TOKENIZER.vocab_size,
    sequence_len=512,
    n_layer=1,
    n_embd=32,
    n_head=1,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=16,
    microbatch=1,
    total_batch_size=512,
    loss_chunk=512,
)
LIMIT = 4


@pytest.fixture(scope="module")
def params():
    """A model of random weights, none of them zero."""
    leaves, tree = jax.tree.flatten(init_params(0, CONFIG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [a + 0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)]
    )


@pytest.fixture(scope="module")
def uniform():
    """A model to which all tokens are equally likely."""
    params = init_params(0, CONFIG)
    return params | {"head": params["head"] * 0}


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """All tasks there are, those of the Hub with files of its schema, and one of a user's own."""
    root = tmp_path_factory.mktemp("root")
    for name, source in hub.SOURCES.items():
        path = root / source.repo / source.config / source.splits["test"] / "0.parquet"
        path.parent.mkdir(parents=True)
        path.write_bytes(parquet(rows_of(name)))
    (root / "identity_conversations.jsonl").write_text("\n".join([json.dumps(CHAT)] * 60))
    (root / "own.jsonl").write_text(
        '{"question": "Which?", "choices": ["x", "y"], "answer": 1}\n' * 3
    )
    return embedded.TASKS | stdlib.TASKS | hub.make(root=root) | {"own": jsonl(root / "own.jsonl")}


NAMES = [*embedded.TASKS, *hub.TASKS, "own"]


def run(params, names, known, **kw):
    kw = dict(limit=LIMIT, max_tokens=4, batch=4, progress=False) | kw
    own = {name: kw.pop(name) for name in ("answers", "progress") if name in kw}
    settings = questions.Questions(**kw)
    return questions.evaluate(params, CONFIG, TOKENIZER, names, settings, known=known, **own)


def knowing(items) -> questions.ModelAnswers:
    """Someone who has read the answers, and finds them by their words, not by their letters."""
    continued = set()
    for item in items:
        if "choices" in item:
            context = (
                item["context"][item["gold"]]
                if isinstance(item["context"], list)
                else item["context"]
            )
            before, after = questions.continuation_ids(
                TOKENIZER, context, item["choices"][item["gold"]]
            )
            continued.add((tuple(before), tuple(after)))
    said = {}
    for item in items:
        if "messages" in item and "letters" not in item:
            ids, mask = TOKENIZER.render_conversation(item["messages"], 10**6)
            start = len(TOKENIZER.render_for_completion(item["messages"]))
            said[tuple(ids[:start])] = ids[start:-1]
    option = {
        item["question"]: item["options"][item["gold"]] for item in items if "options" in item
    }

    def next_logprobs(prompts):
        out = np.full((len(prompts), CONFIG.vocab_size), -9.0)
        for row, ids in zip(out, prompts):
            text = TOKENIZER.decode(ids)
            answer = next(answer for question, answer in option.items() if question in text)
            row[TOKENIZER.encode(re.search(rf"^- {re.escape(answer)}=(.)$", text, re.M)[1])] = -0.1
        return out

    def continuations(requests):
        def right(before, after):
            return (tuple(before), tuple(after)) in continued

        return [
            [
                Score(
                    -1.0 * len(c) if right(before, c) else -2.0 * len(c),
                    len(c),
                    right(before, c),
                    0,
                )
                for c in after
            ]
            for before, after in requests
        ]

    def texts(prompts, samplings):
        for i, ids in enumerate(prompts):
            yield i, None
            yield i, said[tuple(ids)]

    return questions.ModelAnswers(
        next_logprobs, continuations, lambda rows: [np.zeros(len(t)) for _, t in rows], texts
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_who_knows_the_answers_scores_everything(known, name, shuffle):
    answers = knowing(known[name].items("test")[:LIMIT])
    entry = run(None, [name], known, answers=answers, shuffle=shuffle)["tasks"][name]
    assert entry["score"] == 1.0 and entry["n"] == len(entry["items"]) == min(
        LIMIT, len(known[name].items("test"))
    )
    if entry["kind"] == "perplexity":
        assert entry["per_byte"] == entry["per_token"] == 1.0 and entry["bpb"] == 0.0
    else:
        assert (
            entry["centered"] == 1.0
            and entry["stderr"] > 0
            and all(item["correct"] == 1 for item in entry["items"])
        )


@pytest.mark.slow
def test_who_guesses_scores_the_baseline(uniform, known):
    record = run(uniform, NAMES, known, limit=3)
    assert set(record["tasks"]) == set(NAMES) and record["skipped"] == {}
    for name, entry in record["tasks"].items():
        if entry["kind"] == "perplexity":
            assert entry["per_token"] == pytest.approx(CONFIG.vocab_size, rel=1e-4), name
        else:
            assert entry["score"] == pytest.approx(entry["baseline"]) and entry[
                "centered"
            ] == pytest.approx(0.0), name
    assert {
        name: record["tasks"][name]["baseline"]
        for name in ("mmlu", "arc_challenge", "piqa", "lambada", "gsm8k", "own")
    } == pytest.approx(
        dict(mmlu=0.25, arc_challenge=1 / 3, piqa=0.5, lambada=0.0, gsm8k=0.0, own=0.5)
    )
    assert record["tasks"]["lambada"]["perplexity"] == pytest.approx(
        CONFIG.vocab_size ** len(TOKENIZER.encode(" dog")), rel=1e-3
    )
    assert record["chatcore"]["score"] == pytest.approx(0.0)


# ---- how it is measured


def letter_items(n=7):
    return [
        choice_item(f"i{k}", "the " * (9 * k) + "?", ["cat", "mat", "hat"], k % 3) for k in range(n)
    ]


def test_letters_are_those_of_a_forward_of_each_prompt_alone(params):
    items = letter_items()
    entry = run(params, ["t"], {"t": Task("choice", lambda split: items)}, limit=None, batch=3)[
        "tasks"
    ]["t"]
    forward = jax.jit(model.forward, static_argnums=1)
    for item, got in zip(items, entry["items"]):
        ids = TOKENIZER.render_for_completion(item["messages"])
        padded = np.pad(np.array(ids), (0, 512 - len(ids)))[None]
        logits = np.asarray(forward(params, CONFIG, padded)[0])[0, len(ids) - 1]
        scores = [logits[TOKENIZER.encode(letter)[0]] for letter in "ABC"]
        assert got == dict(id=item["id"], correct=float(np.argmax(scores) == item["gold"]))
    assert (
        entry["majority"] == pytest.approx(3 / 7)
        and entry["baseline"] == pytest.approx(1 / 3)
        and entry["truncated"] == 0
    )


def test_shuffling_draws_an_order_for_each_item_and_seed():
    items = letter_items(30)

    def golds(seed):
        return [questions._mixed(item, seed)["gold"] for item in items]

    assert golds(0) == golds(0) != golds(1)
    # by the seed alone, every item's options would change places alike
    moved = {(item["gold"], gold) for item, gold in zip(items, golds(0))}
    assert len(moved) > 6


def test_shuffling_moves_no_likelihood_and_a_trailing_blank_nothing(params, known):
    names = ["code_completion", "hellaswag", "winogrande"]
    plain, turned = (
        run(params, names, known, limit=8, shuffle=shuffle, seed=3)["tasks"]
        for shuffle in (False, True)
    )
    for name in names:
        assert plain[name]["items"] == turned[name]["items"], name
    items = stdlib.completion_items("test")[:8]
    blank = [
        item
        | dict(
            context=item["context"] + "  ", choices=[c.removeprefix("  ") for c in item["choices"]]
        )
        for item in items
        if all(c.startswith("  ") for c in item["choices"])
    ]
    spaced = run(params, ["t"], {"t": Task("likelihood", lambda split: blank)})["tasks"]["t"][
        "items"
    ]
    want = {item["id"]: item for item in plain["code_completion"]["items"]}
    assert len(blank) > 3 and all(item == want[item["id"]] for item in spaced[:LIMIT])


def test_blanks_go_to_the_continuation():
    pair = questions.continuation_ids(TOKENIZER, "the cat", " sat")
    assert (
        pair
        == questions.continuation_ids(TOKENIZER, "the cat ", "sat")
        == ([TOKENIZER.bos, *TOKENIZER.encode("the cat")], TOKENIZER.encode(" sat"))
    )
    before, after = questions.continuation_ids(TOKENIZER, "the c", "at")  # a border inside a token
    assert TOKENIZER.decode(before[1:]) == "the c" and TOKENIZER.decode(after) == "at"

    def question(space):
        return TOKENIZER.render_for_completion(
            choice_item("", "Which?" + space, ["a" + space, "b"], 0)["messages"]
        )

    assert question("") == question(" ") == question("\n")


def test_every_token_of_a_text_is_a_target_once_with_half_a_row_before_it():
    for length, width in itertools.product((0, 1, 7, 8, 9, 40), (8, 9)):
        ids, seen = list(range(100, 100 + length)), []
        for inputs, targets in questions._windows(ids, 1, width):
            assert len(inputs) == len(targets) <= width and inputs[0] == 1
            new = [(i, t) for i, t in enumerate(targets) if t >= 0]
            assert all(inputs[i] == t - 1 for i, t in new if i) and (
                not seen or new[0][0] >= width // 2
            )
            seen += [t for _, t in new]
        assert seen == ids


def test_perplexity_of_texts_and_of_what_an_assistant_says(params):
    text = "the cat sat on the mat, naïve 12 " * 40
    said = [
        dict(role="user", content="hello you"),
        dict(
            role="assistant",
            content=[
                dict(type="text", text="So "),
                dict(type="python", text="1+2"),
                dict(type="python_output", text="3"),
                dict(type="text", text="3."),
            ],
        ),
    ]
    items = {
        "text": [dict(id="a", text=text, words=321), dict(id="b", text="the mat", words=2)],
        "chat": [dict(id="c", messages=said), dict(id="d", messages=CHAT)],
    }
    got = run(
        params,
        ["text", "chat"],
        {name: Task("perplexity", lambda split, name=name: items[name], None) for name in items},
    )["tasks"]
    entry = got["text"]
    assert entry["bytes"] == len(text.encode()) + 7 and entry["tokens"] == sum(
        len(TOKENIZER.encode(i["text"])) for i in items["text"]
    )
    ids = TOKENIZER.encode("the mat", bos=True)
    row = np.full((2, 512), -1, np.int32)
    row[0], row[0, : len(ids) - 1], row[1, : len(ids) - 1] = 0, ids[:-1], ids[1:]
    alone = float(np.asarray(evals.token_losses(params, CONFIG, row[:1], row[1:])).sum())
    assert entry["items"][1] == dict(
        id="b", nats=pytest.approx(alone, rel=1e-4), tokens=len(ids) - 1, bytes=7, words=2
    )
    assert entry["score"] == entry["per_word"] == pytest.approx(math.exp(entry["nats"] / 323))
    assert entry["bpb"] == pytest.approx(math.log2(entry["per_byte"])) and entry["stderr"] > 0
    assert [item["bytes"] for item in got["chat"]["items"]] == [len("So 1+23."), len("Hello!")]
    assert got["chat"]["score"] == got["chat"]["per_token"] and got["chat"]["truncated"] == 0


def test_long_prompts_lose_their_oldest_tokens_and_are_counted(params):
    long = "the cat sat " * 400
    items = {
        "choice": [
            choice_item("a", long, ["x", "y"], 0),
            choice_item("b", "?", ["x", "y"], 0),
        ],
        "likelihood": [
            dict(id="a", context=long, choices=[" cat", " sat"], gold=0),
            dict(id="b", context="a", choices=[" b", " c"], gold=0),
        ],
        "generate": [
            dict(id="a", messages=[dict(role="user", content=long)]),
            dict(id="b", messages=CHAT),
        ],
        "perplexity": [
            dict(id="a", messages=[*CHAT, dict(role="user", content=long), CHAT[1]]),
            dict(id="b", messages=CHAT),
        ],
    }
    table = {
        kind: Task(
            kind,
            lambda split, kind=kind: items[kind],
            grade=(lambda item, text: False) if kind == "generate" else None,
        )
        for kind in items
    }
    found = run(params, list(items), table)["tasks"]
    assert {kind: entry["truncated"] for kind, entry in found.items()} == dict.fromkeys(items, 1)
    assert questions._cut(list(range(10)), 4) == ([0, 7, 8, 9], True) and questions._cut(
        [1, 2], 2
    ) == (
        [1, 2],
        False,
    )


def test_written_answers_depend_on_item_and_seed_only(params):
    items = [
        dict(id=f"i{k}", messages=[dict(role="user", content="the " * k + "cat")])
        for k in range(1, 7)
    ]
    table = {"t": Task("generate", lambda split: items, grade=lambda item, text: "a" in text)}

    def ask(**kw):
        return run(params, ["t"], table, **dict(limit=None, temperature=1.0, max_tokens=12) | kw)[
            "tasks"
        ]["t"]["items"]

    four = ask()
    assert ask(batch=2) == four != ask(seed=1) and ask(limit=3) == four[:3]
    assert len({item["text"] for item in four}) > 1


def test_samples_and_pass_at_k(params):
    items = [dict(id=f"i{k}", messages=[dict(role="user", content="the " * k)]) for k in range(5)]
    table = {
        "t": Task("generate", lambda split: items, grade=lambda item, text: len(text) % 2 == 0)
    }
    entry = run(params, ["t"], table, limit=None, temperature=1.0, samples=6)["tasks"]["t"]
    shares = [item["correct"] for item in entry["items"]]
    assert list(entry["pass_at"]) == ["1", "2", "5", "6"] and 0 < np.mean(shares) < 1
    # samples of one item differ
    assert any(0 < share < 1 for share in shares)
    assert entry["score"] == pytest.approx(np.mean(shares)) and entry["pass_at"]["1"][
        "score"
    ] == pytest.approx(np.mean(shares))
    assert entry["pass_at"]["6"]["score"] == pytest.approx(np.mean([share > 0 for share in shares]))


def answering(*ids):
    """Someone who always writes these ids, and remembers what was asked."""
    asked = []

    def texts(prompts, samplings):
        asked.extend(zip(prompts, samplings))
        for i in range(len(prompts)):
            yield i, None
            yield i, list(ids)

    return questions.ModelAnswers(None, None, None, texts), asked


def test_every_sample_of_every_item_has_a_seed_of_its_own():
    items = [dict(id=f"i{k}", messages=CHAT) for k in range(5)]
    table = {"t": Task("generate", lambda split: items, grade=lambda item, text: True)}
    seeds = []
    for seed in (0, 1):
        answers, asked = answering(TOKENIZER.bos)
        run(None, ["t"], table, limit=5, temperature=1.0, samples=6, seed=seed, answers=answers)
        seeds += [sampling.seed for _, sampling in asked]
    assert len(seeds) == len(set(seeds)) == 60


def test_a_long_prompt_leaves_room_for_the_answer():
    talk = [dict(role="user", content="word " * CONFIG.sequence_len), CHAT[-1]]
    items = [dict(id="long", messages=talk)]
    table = {"t": Task("generate", lambda split: items, grade=lambda item, text: True)}
    answers, asked = answering(TOKENIZER.bos)
    run(None, ["t"], table, limit=1, answers=answers)
    [(prompt, sampling)] = asked
    assert len(prompt) + sampling.max_tokens == CONFIG.sequence_len


def test_what_was_called_is_not_what_was_said():
    special = TOKENIZER.special
    call = [special["<|python_start|>"], *TOKENIZER.encode("1 2"), special["<|python_end|>"]]
    output = [special["<|output_start|>"], *TOKENIZER.encode("9"), special["<|output_end|>"]]
    heard = []
    items = [dict(id="i", messages=CHAT)]
    grade = lambda item, text: heard.append(text) or "9" not in text  # noqa: E731
    table = {"t": Task("generate", lambda split: items, grade=grade)}
    answers, _ = answering(*TOKENIZER.encode("the"), *call, *output, *TOKENIZER.encode("cat"))
    entry = run(None, ["t"], table, answers=answers)["tasks"]["t"]
    assert heard == ["the cat"] and entry["score"] == 1.0
    assert entry["items"] == [dict(id="i", correct=1.0, text="the cat")]


def test_special_tokens_are_neither_text_nor_loss():
    items = [dict(id="c", messages=CHAT)]
    table = {"t": Task("perplexity", lambda split: items, None)}
    ones = lambda rows: [np.where(np.array(t) >= 0, 1.0, 0.0) for _, t in rows]  # noqa: E731
    answers = questions.ModelAnswers(None, None, ones, None)
    entry = run(None, ["t"], table, answers=answers)["tasks"]["t"]
    spoken = TOKENIZER.encode(CHAT[1]["content"])
    assert entry["tokens"] == entry["nats"] == len(spoken)
    assert entry["bytes"] == len(CHAT[1]["content"].encode())


def test_standard_errors_and_ties():
    assert questions._perplexity_of([2.0], [1]) == (pytest.approx(math.e**2), None)
    assert (
        questions._credit([-1.0, -1.0 + 1e-7, -3.0], 0) == 0.5
        and questions._credit([-1.0, -1.1], 0) == 1
        and questions._credit([-1.0, -1.1], 1) == 0
    )
    rng = np.random.default_rng(0)
    nats, units = rng.gamma(20, 1, 300), rng.integers(5, 15, 300)
    draws = [rng.integers(0, 300, 300) for _ in range(400)]
    spread = np.std([math.exp(nats[d].sum() / units[d].sum()) for d in draws])
    assert questions._perplexity_of(nats, units)[1] == pytest.approx(spread, rel=0.15)


def test_a_guess_is_worth_its_chance_item_by_item():
    """Of two options a half and of four a quarter: three eighths, and not one in three."""
    items = [dict(gold=0), dict(gold=1)]
    job = types.SimpleNamespace(task=types.SimpleNamespace(baseline=0.25), items=items)
    entry = questions._accuracy(job, [1.0, 0.0], [2, 4])
    assert entry["baseline"] == 0.375 and entry["score"] == entry["majority"] == 0.5
    assert entry["centered"] == pytest.approx((0.5 - 0.375) / (1 - 0.375))
    # where nothing is offered the task says what a guess is worth
    assert questions._accuracy(job, [1.0, 0.0])["baseline"] == 0.25


# ---- what goes wrong


def failing(item, text):
    return item["id"] == "good" or 1 / 0


BAD = {
    "a grader that fails": (
        "generate",
        [dict(id="good", messages=CHAT), dict(id="bad", messages=CHAT)],
        RuntimeError,
        "bad: ZeroDivisionError",
    ),
    "messages out of turn": (
        "generate",
        [dict(id="bad", messages=CHAT[1:] * 2)],
        UserError,
        "bad: this chat cannot be rendered",
    ),
    "a letter of several tokens": (
        "choice",
        [dict(id="bad", messages=CHAT, letters=["A", "B)"], gold=0)],
        UserError,
        "bad: letters",
    ),
    "gold out of range": (
        "likelihood",
        [dict(id="bad", context="a", choices=[" b"], gold=1)],
        UserError,
        "bad: .*gold",
    ),
    "an empty choice": (
        "likelihood",
        [dict(id="bad", context="a", choices=["", " b"], gold=1)],
        UserError,
        "bad: .*choices",
    ),
    "nothing to measure": ("perplexity", [dict(id="x", text="")], UserError, "task t has no text"),
    "an item without its parts": (
        "choice",
        [dict(id="bad", messages=CHAT)],
        RuntimeError,
        "bad: KeyError: 'letters'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_breaks_stops_with_the_items_id_and_is_never_scored(params, case):
    kind, items, error, message = BAD[case]
    with pytest.raises(error, match=message if "task t" in message else f"task t, item {message}"):
        run(params, ["t"], {"t": Task(kind, lambda split: items, grade=failing)})


@pytest.mark.parametrize(
    "kind, item",
    [
        ("choice", letter_items(1)[0]),
        ("likelihood", dict(context="a", choices=[" b", " c"], gold=0)),
        ("perplexity", dict(text="the cat")),
        ("likelihood", dict(context="a", choices=[" b"], gold=0)),
        ("generate", dict(messages=CHAT)),
    ],
)
def test_a_broken_model_stops_and_is_not_scored(params, kind, item):
    broken = params | {"head": params["head"] * np.nan}
    # the writer says it in a sentence of its own: that is a UserError
    with pytest.raises((RuntimeError, UserError), match="task t, item bad"):
        run(
            broken,
            ["t"],
            {
                "t": Task(
                    kind, lambda split: [item | dict(id="bad")], grade=lambda item, text: False
                )
            },
        )


def test_an_error_while_answering_names_the_items_at_work():
    def texts(prompts, samplings):
        yield from ((0, None), (1, None), (1, []))
        raise ValueError("out of paper")

    items = [
        dict(id=f"i{k}", messages=[dict(role="user", content="a" * (9 - k))]) for k in range(3)
    ]
    with pytest.raises(RuntimeError, match="task t, item i0: ValueError: out of paper"):
        run(
            None,
            ["t"],
            {"t": Task("generate", lambda split: items, grade=lambda item, text: True)},
            answers=questions.ModelAnswers(None, None, None, texts),
        )


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(limit=0), "limit must be at least 1"),
        (dict(batch=0), "batch"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(samples=0), "samples"),
        (dict(samples=2), "2 samples at temperature 0"),
        (dict(temperature=-1.0), "temperature -1"),
        (dict(names=["mmlux"]), "unknown task 'mmlux'"),
        (dict(names=[]), "no task was named"),
        (dict(names=["nothing.jsonl"]), "cannot read nothing.jsonl"),
    ],
)
def test_bad_arguments_are_told_before_anything_runs(known, kw, message):
    with pytest.raises(UserError, match=message):
        run(None, **dict(names=["own"], known=known) | kw)


def test_without_a_network_the_rest_still_runs(params, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lib.data.download.BACKOFF", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    known = hub.make(cache_dir=tmp_path, identity="http://127.0.0.1:9/x") | stdlib.TASKS
    record = run(params, None, known, progress=True)
    assert set(record["tasks"]) == set(stdlib.TASKS) and set(record["skipped"]) == set(known) - set(
        stdlib.TASKS
    )
    assert all("\n" not in why and "cannot download" in why for why in record["skipped"].values())
    assert "chatcore" not in record
    out = capsys.readouterr().out
    assert re.search(r"^mmlu +skipped: cannot download", out, re.M) and re.search(
        r"^code_completion +\d.*random 25.0", out, re.M
    )


def test_a_file_of_ones_own_by_its_path(params, tmp_path):
    path = tmp_path / "pets.jsonl"
    path.write_text(
        '{"context": "the", "choices": ["cat", "sat"], "answer": 0}\n'
        '{"context": "the", "choices": ["mat", "dog"], "answer": 1}'
    )
    record = run(params, [path], {})
    assert [item["id"] for item in record["tasks"]["pets"]["items"]] == ["pets/1", "pets/2"]


def test_the_words_of_an_item_are_its_question_and_right_answer(known):
    words = {name: questions.texts_of(known[name].items("test")[:1])[0]["text"] for name in ROWS}
    assert (
        words["mmlu"] == "What is 2+2? 4"
        and words["piqa"] == "Question: Open a jar\nAnswer: Twist the lid."
    )
    assert (
        words["winogrande"] == "The cup did not fit the bag, as the cup was too large."
        and words["smoltalk"] == "Hi\nHello!"
    )
    assert words["gsm8k"].startswith("How much?\nIt is 12*100=12*10012001200.") and words[
        "wikitext103"
    ].startswith("= A Title =")


# ---- records


def entry(score, kind="choice", baseline=0.25):
    return dict(
        kind=kind,
        score=score,
        stderr=0.1,
        baseline=baseline,
        centered=(score - baseline) / (1 - baseline),
    )


def test_records_of_one_checkpoint_are_merged_and_of_another_replaced(tmp_path):
    first = dict(
        step=5,
        checkpoint="sft/step_5",
        tasks=dict(a=entry(0.5), b=entry(0.25)),
        skipped=dict(c="no network", d="no network"),
        bpb=dict(stdlib=dict(bpb=1.0)),
        samples=["old"],
    )
    records.write(tmp_path, "sft", first)
    second = dict(
        step=5,
        checkpoint="sft/step_5",
        tasks=dict(a=entry(1.0), c=entry(0.25)),
        skipped=dict(b="no network"),
    )
    merged = records.write(tmp_path, "sft", second)
    assert merged == json.loads((tmp_path / "evals/sft.json").read_text())
    assert {name: e["score"] for name, e in merged["tasks"].items()} == dict(a=1.0, b=0.25, c=0.25)
    assert (
        merged["skipped"] == dict(d="no network")
        and merged["bpb"] == first["bpb"]
        and merged["samples"] == ["old"]
    )
    assert (
        merged["stage"] == "sft"
        and merged["device"]
        and merged["jax"] == jax.__version__
        and merged["time"].endswith("Z")
    )
    assert merged["chatcore"]["score"] == pytest.approx(1 / 3) and merged["chatcore"]["tasks"] == [
        "a",
        "b",
        "c",
    ]
    # another checkpoint at the same step
    elsewhere = records.write(
        tmp_path / "other", "sft", second | dict(checkpoint="sft/step_5", tasks=dict(z=entry(0.5)))
    )
    moved = records.write(
        tmp_path / "other", "sft", second | dict(checkpoint="best/step_5", tasks=dict(y=entry(0.5)))
    )
    assert list(elsewhere["tasks"]) == ["z"] and list(moved["tasks"]) == ["y"]
    # each task says when it was measured, one that was not measured again when it was before
    assert all(e["time"].endswith("Z") for e in merged["tasks"].values())
    early = records.write(
        tmp_path / "dated", "sft", first | dict(tasks=dict(a=entry(0.5) | dict(time="long ago")))
    )
    late = records.write(tmp_path / "dated", "sft", second | dict(tasks=dict(b=entry(0.5))))
    assert early["tasks"]["a"]["time"] == late["tasks"]["a"]["time"] == "long ago"
    third = records.write(
        tmp_path, "sft", dict(step=6, checkpoint="sft/step_6", tasks=dict(b=entry(0.5)))
    )
    assert (
        list(third["tasks"]) == ["b"]
        and "bpb" not in third
        and "samples" not in third
        and third["skipped"] == {}
    )
    assert not list((tmp_path / "evals").glob(".*"))
    (tmp_path / "evals/sft.json").write_text("{")
    with pytest.raises(UserError, match="sft.json: not JSON.*evaluate again"):
        records.write(tmp_path, "sft", third)
    with pytest.raises(UserError, match="unknown stage 'sfft'"):
        records.write(tmp_path, "sfft", third)
