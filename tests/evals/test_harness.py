"""lib/evals/harness.py: lm_eval drives a checkpoint of ours, offline, and agrees with us."""

import itertools
import json
import math
import os

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")
import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402

from lib import evals  # noqa: E402
from lib.config import Config  # noqa: E402
from lib.data import batches, tokens_of  # noqa: E402
from lib.data.speech import said  # noqa: E402
from lib.data.tokenizer import Tokenizer  # noqa: E402
from lib.evals import harness, questions  # noqa: E402
from lib.files import UserError  # noqa: E402
from lib.params import init_params  # noqa: E402
from lib.tasks import Task  # noqa: E402
from lib.train import checkpoint  # noqa: E402

# lm_eval and what it imports
pytestmark = pytest.mark.slow

WORDS = "the cat sat on the mat, and the answer is: one two three four five. "
TOKENIZER = Tokenizer.train([WORDS * 9], 300)
CONFIG = Config(
    vocab_size=TOKENIZER.vocab_size,
    sequence_len=64,
    n_layer=1,
    n_embd=32,
    n_head=1,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=16,
    microbatch=1,
    total_batch_size=64,
    loss_chunk=64,
    num_steps=1,
    compute_dtype="float32",
)
QUESTIONS = [
    {
        "question": f"{a} cat and",
        "choices": [" the mat", " one two three", " sat"],
        "gold": i % 3,
        "text": WORDS * (1 + 3 * (i % 2)) + a,
    }
    for i, a in enumerate(["the", "one", "five", "sat on", "a", "two, three, the", "four"])
]
YAML = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
"""
TASKS = {
    "choose": """
task: choose
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "write": """
task: write
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["e", "."], max_gen_toks: 9, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "read": """
task: read
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with a base model of random weights, none of them zero, and tasks in tasks/."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    leaves, tree = jax.tree.flatten(init_params(0, CONFIG))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(
        tree, [a + 0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)]
    )
    TOKENIZER.save(folder / "tokenizer.json")
    checkpoint.save(
        folder / "checkpoints",
        1,
        {"params": params},
        dict(config=CONFIG.to_dict(), tokenizer=TOKENIZER.fingerprint, settings={}),
    )
    (folder / "tasks").mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    places = YAML.replace("DATA", str(folder / "data.jsonl")).replace(
        "CACHE", str(folder / "cache")
    )
    for name, text in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.strip() + places)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        return harness.evaluate(
            folder, list(TASKS), include_path=folder / "tasks", defaults=False, bootstrap_iters=0
        )


@pytest.fixture(scope="module")
def lm(folder):
    return harness.register()(folder.name, runs_dir=str(folder.parent), batch_size=4)


def ask(lm, kind, *arguments):
    return getattr(lm, kind)([Instance(kind, {}, a, i) for i, a in enumerate(arguments)])


def by_hand(lm, context, continuation):
    """Sum of log-probabilities of a continuation's ids from one plain forward pass."""
    m = lm.model
    ids = [*context, *continuation]
    losses = evals.token_losses(m.params, m.config, np.array([ids[:-1]]), np.array([ids[1:]]))
    return -float(np.asarray(losses, np.float64)[0, len(context) - 1 :].sum())


def test_choices_agree_with_our_own_scores(results, lm):
    items = [
        dict(id=str(i), context=q["question"], choices=q["choices"], gold=q["gold"])
        for i, q in enumerate(QUESTIONS)
    ]
    m = lm.model
    known = {"choose": Task("likelihood", lambda split: items, 1 / 3)}
    ours = questions.evaluate(
        m.params, m.config, m.tokenizer, ["choose"], known=known, progress=False
    )["tasks"]["choose"]
    theirs = sorted(results["samples"]["choose"], key=lambda sample: sample["doc_id"])
    assert len(theirs) == len(QUESTIONS)
    means = []
    for q, sample in zip(QUESTIONS, theirs):
        got = [
            float(answer[0][0] if isinstance(answer[0], (list, tuple)) else answer[0])
            for answer in sample["filtered_resps"]
        ]
        pairs = [harness.pair_ids(m.tokenizer, q["question"], choice) for choice in q["choices"]]
        np.testing.assert_allclose(got, [by_hand(lm, *pair) for pair in pairs], atol=1e-4)
        means.append(
            np.argmax([score / len(after) for score, (_, after) in zip(got, pairs)]) == q["gold"]
        )
        assert sample["acc"] == (np.argmax(got) == q["gold"])
    # the same sums, ours decided by their mean per token
    assert [item["correct"] for item in ours["items"]] == means
    assert results["results"]["choose"]["acc,none"] == pytest.approx(
        np.mean([s["acc"] for s in theirs])
    )


def test_rolling_gives_our_bits_per_byte(results, lm):
    m = lm.model
    found = results["results"]["read"]
    short = [q["text"] for q in QUESTIONS if len(TOKENIZER.encode(q["text"])) < CONFIG.sequence_len]
    assert 0 < len(short) < len(QUESTIONS)  # the others take several windows
    sums = ask(lm, "loglikelihood_rolling", *[(text,) for text in short])
    for text, total in zip(short, sums):
        assert total == pytest.approx(
            by_hand(lm, [TOKENIZER.bos], TOKENIZER.encode(text)), abs=1e-4
        )
    rows = batches(tokens_of(short[:1], TOKENIZER), 1, CONFIG.sequence_len, loop=False)
    ours = evals.bits_per_byte(m.params, m.config, rows, TOKENIZER.token_bytes)
    assert -sums[0] / math.log(2) / len(short[0].encode()) == pytest.approx(ours.bpb, rel=1e-5)
    every = ask(lm, "loglikelihood_rolling", *[(q["text"],) for q in QUESTIONS])
    size = sum(len(q["text"].encode()) for q in QUESTIONS)
    assert found["bits_per_byte,none"] == pytest.approx(-sum(every) / size / math.log(2), rel=1e-6)
    assert found["byte_perplexity,none"] == pytest.approx(
        2 ** found["bits_per_byte,none"], rel=1e-6
    )


def test_windows_are_those_of_lm_eval(lm):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = WORDS * 8
    ids = TOKENIZER.encode(text)
    windows = list(
        map(
            make_disjoint_window,
            get_rolling_token_windows(ids, TOKENIZER.bos, CONFIG.sequence_len, 1),
        )
    )
    assert len(windows) > 2 and sum(len(scored) for _, scored in windows) == len(ids)
    assert ask(lm, "loglikelihood_rolling", (text,))[0] == pytest.approx(
        sum(by_hand(lm, *window) for window in windows), abs=2e-4
    )


def test_generation_is_ours_and_stops(results, lm):
    m = lm.model
    for sample, q in zip(sorted(results["samples"]["write"], key=lambda s: s["doc_id"]), QUESTIONS):
        prompt, answer = [TOKENIZER.bos, *TOKENIZER.encode(q["question"])], sample["resps"][0][0]
        ids = list(prompt)
        for _ in range(9):  # greedy, one plain forward at a time
            ids.append(
                int(
                    np.argmax(
                        np.asarray(
                            questions._next_logprobs(
                                m.params,
                                m.config,
                                np.array([ids + [0] * (64 - len(ids))]),
                                np.array([len(ids) - 1]),
                            )
                        )[0]
                    )
                )
            )
        # up to the first token, then the first text, that ends an answer
        written = list(itertools.takewhile(lambda id: id not in lm.stop, ids[len(prompt) :]))
        full = said(TOKENIZER, written)
        stop = min((at for at in (full.find("e"), full.find(".")) if at >= 0), default=len(full))
        assert answer == full[:stop]
        assert "e" not in answer and "." not in answer


def test_sampling_repeats_and_long_contexts_are_cut_with_a_warning(lm):
    sampled = dict(until=[], max_gen_toks=6, do_sample=True, temperature=1.0)
    first, again, other = (
        ask(lm, "generate_until", ("the cat", a))
        for a in (sampled, sampled, sampled | {"temperature": 5.0})
    )
    assert first == again != other
    with pytest.warns(UserWarning, match="1 of 2 contexts were longer"):
        long, short = ask(
            lm, "generate_until", (WORDS * 20, {"max_gen_toks": 4}), ("one", {"max_gen_toks": 4})
        )
    assert short == ask(lm, "generate_until", ("one", {"max_gen_toks": 4}))[0]
    ids = TOKENIZER.encode(WORDS * 20)[-(CONFIG.sequence_len - 4 - 1) :]
    assert len(TOKENIZER.encode(TOKENIZER.decode(ids))) == len(ids)
    assert long == ask(lm, "generate_until", (TOKENIZER.decode(ids), {"max_gen_toks": 4}))[0]
    with pytest.warns(UserWarning, match="1 of 1 contexts"):
        ask(lm, "loglikelihood", (WORDS * 20, " the mat"))


@pytest.mark.parametrize(
    "context, continuation",
    [("the cat", " sat"), ("the cat ", "sat"), ("", "the cat"), ("the c", "at")],
)
def test_pairs_are_whole_texts_behind_bos(lm, context, continuation):
    before, after = harness.pair_ids(TOKENIZER, context, continuation)
    assert (
        before[0] == TOKENIZER.bos
        and TOKENIZER.decode([*before[1:], *after]) == context + continuation
        and after
    )
    ((logprob, greedy),) = ask(lm, "loglikelihood", (context, continuation))
    assert logprob == pytest.approx(by_hand(lm, before, after), abs=1e-4) and isinstance(
        greedy, bool
    )


def test_the_greedy_text_is_told_to_be_greedy(lm):
    contexts = [WORDS[:n] for n in (3, 7, 11, 14, 18, 23, 27, 31, 34, 44, 48, 52)]
    said = ask(lm, "generate_until", *[(context, {"max_gen_toks": 1}) for context in contexts])
    pairs = [
        (c, t)
        for c, t in zip(contexts, said)
        if t
        and "\ufffd" not in t
        and [*map(len, harness.pair_ids(TOKENIZER, c, t))] == [1 + len(TOKENIZER.encode(c)), 1]
    ]
    assert pairs  # the others are bytes that stand for no text, or join the word before
    assert all(greedy for _, greedy in ask(lm, "loglikelihood", *pairs))
    assert not any(
        greedy for _, greedy in ask(lm, "loglikelihood", *[(c, " zebra") for c, _ in pairs])
    )


def test_chats_are_rendered_with_special_tokens_that_text_cannot_make(lm):
    history = [
        {"role": "system", "content": "be <|bos|> kind"},
        {"role": "user", "content": "the cat?"},
    ]
    want = TOKENIZER.render_for_completion(history)
    assert harness.context_ids(TOKENIZER, lm.apply_chat_template(history)) == (want, "")
    few = [*history, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "one?"}]
    before, after = harness.pair_ids(TOKENIZER, lm.apply_chat_template(few) + "the", " cat")
    assert before == [
        *TOKENIZER.render_for_completion(few),
        *TOKENIZER.encode("the"),
    ] and after == TOKENIZER.encode(" cat")
    prefill = [*history, {"role": "assistant", "content": "the"}]
    assert harness.context_ids(TOKENIZER, lm.apply_chat_template(prefill, False)) == (want, "the")
    assert (
        TOKENIZER.special["<|user_start|>"]
        not in harness.pair_ids(TOKENIZER, "<|user_start|>", "x")[0]
    )


def test_bad_requests_are_refused_before_the_model_runs(folder, lm):
    with pytest.raises(UserError, match="knows no task nonsense"):
        harness.evaluate(folder, ["nonsense"], include_path=folder / "tasks", defaults=False)
    with pytest.raises(UserError, match="include_path .* is no folder"):
        harness.evaluate(folder, ["choose"], include_path=folder / "none", defaults=False)
    with pytest.raises(UserError, match="num_beams"):
        ask(lm, "generate_until", ("the", {"num_beams": 4}))
    with pytest.raises(UserError, match="no sft checkpoint"):
        harness.evaluate(
            folder, ["choose"], include_path=folder / "tasks", defaults=False, stage="sft"
        )
    with pytest.raises(UserError, match="device"):
        harness.register()(folder.name, runs_dir=str(folder.parent), device="cuda")
    (folder / "tasks" / "gone.yaml").write_text(
        TASKS["choose"].replace("task: choose", "task: gone")
        + YAML.replace("DATA", "/nowhere.jsonl").replace("CACHE", str(folder / "cache"))
    )
    with pytest.raises(UserError, match="data"):
        harness.evaluate(folder, ["gone"], include_path=folder / "tasks", defaults=False)


def test_what_was_called_is_not_handed_to_lm_eval(lm, monkeypatch):
    special = TOKENIZER.special
    call = [special["<|python_start|>"], *TOKENIZER.encode("one"), special["<|python_end|>"]]
    written = [*TOKENIZER.encode("the"), *call, *TOKENIZER.encode("cat")]

    def texts(prompts, samplings):
        # in another order than they were asked in
        for i in reversed(range(len(prompts))):
            yield i, None
            yield i, written if i else TOKENIZER.encode("sat")

    monkeypatch.setattr(lm, "answers", lm.answers._replace(texts=texts))
    assert ask(lm, "generate_until", ("a", {}), ("b", {})) == ["sat", "the cat"]


def test_a_second_measurement_adds_to_the_first(tmp_path, results):
    def measured(names, **config):
        """The results as if only some tasks had been measured, with these settings."""
        parts = {
            part: {name: results[part][name] for name in names if name in results[part]}
            for part in harness.BY_TASK
            if part in results
        }
        return results | parts | dict(config=results["config"] | config)

    def kept(names, **config):
        return json.loads(harness.write(tmp_path, measured(names, **config)).read_text())

    first = kept(["choose", "write"], limit=None)
    both = kept(["read", "choose"], limit=3)
    assert set(both["results"]) == set(both["n-samples"]) == {"choose", "write", "read"}
    assert both["results"]["write"] == first["results"]["write"]
    assert both["date"] == results["date"] and both["config"]["limit"] == 3
    assert {name: m["limit"] for name, m in both["measured"].items()} == dict(
        choose=3, write=None, read=3
    )
    assert all(m["time"].endswith("Z") for m in both["measured"].values())
    # of another checkpoint: nothing of the old one stays
    other = kept(["read"], step=2)
    assert set(other["results"]) == set(other["measured"]) == {"read"}


def test_results_are_kept_for_the_report(folder, results):
    kept = json.loads(harness.write(folder, results).read_text())
    assert (folder / "evals" / "lm_eval_base.json").exists() and "samples" not in kept
    assert (
        kept["config"]["step"] == 1
        and kept["results"]["choose"]["acc,none"] == results["results"]["choose"]["acc,none"]
    )
    from lib import report
    from lib.report.sections import harness_table

    rows = harness_table(report.read(folder)).rows
    assert ["choose", "base", "acc"] in [row[:3] for row in rows] and all(
        row[-1] == str(len(QUESTIONS)) for row in rows
    )


def test_the_command_keeps_results_shows_them_and_never_forks(
    tmp_path, results, monkeypatch, capsys
):
    def no_fork():
        raise AssertionError("threads of JAX would stand still in a fork")

    monkeypatch.setattr(os, "fork", no_fork)
    monkeypatch.setattr(harness, "evaluate", lambda *_, **__: results)
    harness.main(harness.HarnessSettings(run="mine", tasks="any", runs_dir=str(tmp_path)))
    shown = capsys.readouterr().out.splitlines()

    # each task has a line, and the file is there
    for task in results["results"]:
        assert any(line.split()[0] == task for line in shown)
    assert list((tmp_path / "mine" / "evals").glob("lm_eval_*.json"))
