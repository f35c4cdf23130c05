"""CORE against the reference's prompts, tokens, losses and decisions; it does measure."""

import base64
import dataclasses
import functools
import http.server
import json
import math
import random
import threading
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import train
from lib.data.tokenizer import Tokenizer
from lib.evals import contamination, core, likelihood, stats
from lib.evals.likelihood import Score
from lib.files import UserError
from lib.model import forward
from tests.helpers.golden import load, parity_model


@pytest.fixture(scope="module")
def golden():
    return load("core.json")


@pytest.fixture(scope="module")
def tokenizer():
    data = load("tokenizer.json")
    return Tokenizer(
        data["pattern"], tuple(base64.b64decode(token) for token, _ in data["mergeable_ranks"])
    )


@pytest.fixture(scope="module")
def t():
    return parity_model("T")


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def bundle(golden, tmp_path_factory):
    return write(tmp_path_factory.mktemp("bundle"), golden["bundle_files"])


@pytest.fixture(scope="module")
def measured(t, tokenizer, bundle):
    """The whole evaluation on model T, with the scores of every task."""
    config, params = t
    seen = []

    def score(requests):
        seen.append(likelihood.score(params, config, tokenizer, requests))
        return seen[-1]

    return core.evaluate(score, tokenizer, bundle, report=lambda line: None), seen


# ---- parity


@pytest.mark.parametrize("number", range(6))
def test_prompts_and_tokens_are_the_reference_s(golden, tokenizer, bundle, number):
    want = golden["tasks"][number]
    task = core.load_bundle(bundle)[0][number]
    prepared = core.prepare(tokenizer, task)
    assert (
        len(task.items) == len(want["examples"])
        and task.fewshot == want["task_meta"]["num_fewshot"]
    )
    for example, (start, count) in zip(want["examples"], prepared.spans):
        index = example["index_after_shuffle"]
        assert {k: v for k, v in task.items[index].items() if k != "id"} == example["item"]
        assert core.prompts_of(task, index) == example["prompts"]
        spans = [
            (c + k, len(c), len(c) + len(k))
            for c, ks in prepared.requests[start : start + count]
            for k in ks
        ]
        assert spans == list(zip(example["token_ids"], example["start_idx"], example["end_idx"]))


@pytest.mark.parametrize("number", range(6))
def test_losses_and_decisions_are_the_reference_s(golden, measured, number):
    examples, scores = (
        golden["tasks"][number]["examples"],
        iter(s for one in measured[1][number] for s in one),
    )
    entry = list(measured[0]["tasks"].values())[number]
    for example, item in zip(examples, entry["items"]):
        mine = [next(scores) for _ in example["start_idx"]]
        if "option_mean_losses" in example:
            np.testing.assert_allclose(
                [core.mean_loss(s) for s in mine], example["option_mean_losses"], atol=1e-4
            )
        else:
            assert mine[0].greedy == (example["predicted_tokens"] == example["actual_tokens"])
        assert item["correct"] == example["is_correct"]


def test_results_are_the_reference_s(golden, t, tokenizer, bundle, measured):
    lines = []
    scorer = core.scorer(t[1], t[0], tokenizer)
    cut = core.evaluate(scorer, tokenizer, bundle, limit=4, report=lines.append)
    # a line for each task, and the sum of them all
    assert len(lines) == len(cut["tasks"]) + 1
    assert lines[-1].startswith(f"CORE {cut['core']['score']:.4f} ± {cut['core']['stderr']:.4f}")
    assert lines[-1].endswith("of a part of the benchmark")
    for got, want in ((measured[0], golden["results"]), (cut, golden["results_max_per_task_4"])):
        tasks = got["core"]["tasks"]
        assert {k: v["accuracy"] for k, v in tasks.items()} == pytest.approx(
            want["results"], rel=1e-6
        )
        assert {k: v["centered"] for k, v in tasks.items()} == pytest.approx(
            want["centered_results"], rel=1e-6, abs=1e-6
        )
        assert got["core"]["score"] == pytest.approx(want["core_metric"], rel=1e-6)
    assert cut["core"]["partial"] and not measured[0]["core"]["partial"]


def test_the_record_says_how_sure_and_how_fast(measured):
    for entry in measured[0]["tasks"].values():
        assert (
            0 < entry["stderr"] < 0.3
            and entry["per_second"] > 0
            and entry["majority"] > 0
            and entry["truncated"] == 0
        )
        assert {i["correct"] for i in entry["items"]} <= {0, 1} and len(
            {i["id"] for i in entry["items"]}
        ) == entry["n"]
        assert (entry["seed"], entry["fewshot_seed"]) == (1337, 1234)
    assert measured[0]["core"]["stderr"] == pytest.approx(
        stats.mean_centered(measured[0]["tasks"])[1]
    )
    json.dumps(measured[0])


# ---- does the measurement measure


def made_up(kind, n=400, options=4, fewshot=2, seed=0):
    rng = random.Random(seed)

    def word():
        return "".join(rng.choices("abcdefghij", k=5))

    def item(gold):
        if kind == "multiple_choice":
            query = f"{word()} {word()}"
            return dict(query=query, choices=[word() for _ in range(options)], gold=gold)
        if kind == "schema":
            contexts = [word() for _ in range(options)]
            return dict(context_options=contexts, continuation=word(), gold=gold)
        return dict(context=f"{word()} {word()}", continuation=word())

    items = [item(rng.randrange(options)) | {"id": str(i)} for i in range(n)]
    chance = 0.0 if kind == "language_modeling" else 1 / options
    return core.CoreTask(
        f"made_up_{kind}", kind, "made_up.jsonl", fewshot, " ", chance, tuple(items)
    )


each_kind = pytest.mark.parametrize("kind", list(core.KINDS))


def answers(prepared, choose):
    """Scores of a model that finds option choose(item) of each item likeliest; None: all alike."""
    out = []
    for item, (start, count) in zip(prepared.task.items, prepared.spans):
        pick = choose(item)
        for i in range(count):
            (_, (continuation,)) = prepared.requests[start + i]
            n = len(continuation)
            out.append(
                [Score(-n * (1.0 if i == pick else 2.0), n, pick is not None and i == pick, 0)]
            )
    return out


@each_kind
def test_who_always_picks_gold_scores_100_and_who_avoids_it_0(kind, tokenizer):
    prepared = core.prepare(tokenizer, made_up(kind, n=60))

    def gold(item):
        return item.get("gold", 0)

    right = core.decide(prepared, answers(prepared, gold))
    wrong = core.decide(prepared, answers(prepared, lambda item: (gold(item) + 1) % 4))
    assert (right["score"], right["centered"]) == (1, 1) and wrong["score"] == 0


@each_kind
def test_who_knows_nothing_scores_the_baseline(kind, tokenizer):
    prepared, rng = core.prepare(tokenizer, made_up(kind)), random.Random(1)
    for choose in (lambda item: None, lambda item: rng.randrange(4) if "gold" in item else None):
        entry = core.decide(prepared, answers(prepared, choose))
        assert (
            abs(entry["score"] - entry["baseline"]) < 3 * entry["stderr"]
            and abs(entry["centered"]) < 0.15
        )
        # every continuation is another, so the commonest is one of all
        likeliest = (0, 0.01) if kind == "language_modeling" else (0.2, 0.35)
        assert likeliest[0] < entry["majority"] < likeliest[1]


def test_a_uniform_model_guesses_no_continuation(t, tokenizer):
    config, params = t
    flat = params | {"head": jnp.zeros_like(params["head"])}
    found = [
        s
        for one in likelihood.score(
            flat, config, tokenizer, [([5, 6], [[7, 8, 9]]), ([5], [[0, 0], [0, 1]])]
        )
        for s in one
    ]
    assert [s.logprob for s in found] == pytest.approx(
        [-s.tokens * math.log(config.vocab_size) for s in found], rel=1e-5
    )
    # of equals the first, as argmax has it
    assert [s.greedy for s in found] == [False, True, False]


def reordered(item, rng):
    name = "choices" if "choices" in item else "context_options"
    order = list(range(len(item[name])))
    rng.shuffle(order)
    return item | {name: [item[name][i] for i in order], "gold": order.index(item["gold"])}


@pytest.mark.parametrize("number", range(4))
def test_the_order_of_choices_moves_nothing(t, tokenizer, bundle, measured, number):
    task, rng = core.load_bundle(bundle)[0][number], random.Random(2)
    other = dataclasses.replace(task, items=tuple(reordered(item, rng) for item in task.items))
    prepared = core.prepare(tokenizer, other)
    assert prepared.requests != core.prepare(tokenizer, task).requests
    found = core.decide(prepared, likelihood.score(t[1], t[0], tokenizer, prepared.requests))
    assert found["items"] == list(measured[0]["tasks"].values())[number]["items"]


def test_blanks_around_a_context_and_lines_of_a_file_move_nothing(
    golden, tokenizer, bundle, tmp_path
):
    files = {}
    for name, text in golden["bundle_files"].items():
        if "lm" in name:
            rows = [json.loads(line) for line in text.splitlines()]
            text = (
                "\r\n".join(json.dumps(row | {"context": row["context"] + " \t"}) for row in rows)
                + "\r\n"
            )
        files[name] = text

    def requests(folder):
        return [core.prepare(tokenizer, task).requests for task in core.load_bundle(folder)[0]]

    assert requests(write(tmp_path, files)) == requests(bundle)


def test_a_line_separator_within_an_item_does_not_end_it(golden, tmp_path):
    files = {
        name: text.replace("Oslo.", "Os\u2028lo\x85")
        for name, text in golden["bundle_files"].items()
    }
    (task, *_), _ = core.load_bundle(write(tmp_path, files))
    assert len(task.items) == 10 and any("Os\u2028lo\x85" in item["choices"] for item in task.items)


def test_a_failing_item_stops_the_evaluation_and_is_named(t, tokenizer, bundle):
    (task, *_), _ = core.load_bundle(bundle)
    where = f"{task.label} item {task.items[3]['id']}: "

    def with_item(item):
        return dataclasses.replace(task, items=(*task.items[:3], item, *task.items[4:]))

    without = {k: v for k, v in task.items[3].items() if k != "choices"}
    with pytest.raises(RuntimeError, match=f"^{where}KeyError"):
        core.prepare(tokenizer, with_item({k: v for k, v in task.items[3].items() if k != "query"}))
    with pytest.raises(UserError, match=f"^{where}gold is 9"):
        core.prepare(tokenizer, with_item(task.items[3] | {"gold": 9}))
    with pytest.raises((UserError, RuntimeError), match=f"^{where}"):
        core.prepare(tokenizer, with_item(without))
    prepared = core.prepare(tokenizer, task)
    scores = answers(prepared, lambda item: 0)
    scores[prepared.spans[3][0] + 1] = [Score(math.nan, 3, False, 0)]
    with pytest.raises(UserError, match=f"^{where}the model's likelihood is not a number"):
        core.decide(prepared, scores)

    def broken(requests):
        raise ValueError("no more memory")

    with pytest.raises(RuntimeError, match=f"^{task.label} item .*no more memory"):
        core.evaluate(broken, tokenizer, bundle)


def test_an_option_without_tokens_of_its_own_is_decided_as_the_reference_does(tokenizer):
    task = core.CoreTask(
        "x",
        "multiple_choice",
        "x",
        0,
        " ",
        0.5,
        ({"query": "a", "choices": ["b", "b c"], "gold": 1, "id": "0"},),
    )
    prepared = core.prepare(tokenizer, task)
    assert [len(ks[0]) for _, ks in prepared.requests] == [0, len(tokenizer.encode(" c"))]
    scores = [[Score(0.0, 0, True, 0)], [Score(-1.0, 1, True, 0)]]
    assert core.decide(prepared, scores)["score"] == 0  # NaN first in Python's min stays the least


# ---- likelihoods


def requests_of(n=24, seed=0, vocab=490):
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(vocab) for _ in range(n)]

    few, out = ids(70), []
    for i in range(n):
        context = [few + ids(9), ids(30), few + ids(4), []][i % 4]
        out.append(
            (context, [ids(rng.randrange(0, 4)) for _ in range(3)] if i % 3 else [[1], [2], [3]])
        )
    return out


@pytest.fixture(scope="module")
def plain(t):
    config, params = t
    logits_of = jax.jit(lambda tokens: forward(params, config, tokens)[0])

    def score(before, scored):
        row = np.zeros((1, config.sequence_len), np.int32)
        row[0, : len(before) + len(scored) - 1] = [*before, *scored[:-1]]
        logits = np.asarray(logits_of(row), np.float64)[0, len(before) - 1 :][: len(scored)]
        lse = np.log(np.exp(logits).sum(-1))
        return float(sum(logits[i, x] - lse[i] for i, x in enumerate(scored))), bool(
            (logits.argmax(-1) == scored).all()
        )

    return score


def test_scores_equal_a_plain_forward_whatever_shares_and_whatever_is_beside(t, tokenizer, plain):
    config, params = t
    requests = requests_of()
    together = likelihood.score(params, config, tokenizer, requests, batch_tokens=512)
    for (context, continuations), scores in zip(requests, together):
        for ids, s in zip(continuations, scores):
            want = plain(context or [tokenizer.bos], ids) if ids else (0.0, True)
            assert s.logprob == pytest.approx(want[0], abs=1e-3) and (
                s.tokens,
                s.greedy,
                s.cut,
            ) == (len(ids), want[1], 0)
    order = random.Random(1).sample(range(len(requests)), len(requests))
    shuffled = likelihood.score(
        params, config, tokenizer, [requests[i] for i in order], batch_tokens=512
    )
    apart = likelihood.score(params, config, tokenizer, requests, batch_tokens=512, share=False)

    def flat(scores):
        return np.array([s.logprob for one in scores for s in one])

    np.testing.assert_allclose(flat(shuffled), flat([together[i] for i in order]), atol=1e-4)
    np.testing.assert_allclose(flat(apart), flat(together), atol=1e-4)


def test_a_beginning_is_read_once_for_all_that_share_it():
    def row(ids):
        return likelihood.Row(np.array(ids, ">i4").tobytes(), len(ids) - 1, [[1]], [None])

    few = list(range(100))
    questions = [few + [200 + q] * 20 for q in range(8)]
    rows = [row(q + [300 + o, 7, 8, 9]) for q in questions for o in range(4)] + [
        row([400 + i] * 50) for i in range(3)
    ]
    for r in rows[:32]:
        r.first = 119
    (shared, groups), (none, alone) = likelihood._plan(rows, 512)
    assert (
        shared == 100
        and [g.shared for g in groups] == [119] * 8
        and [len(g.rows) for g in groups] == [4] * 8
    )
    assert none == 0 and len(alone) == 3
    # what hardly anything shares is not worth a cache
    assert [
        (p, [g.shared for g in gs])
        for p, gs in likelihood._plan([row([0] + [i] * 30) for i in range(1, 5)], 16)
    ] == [(0, [0] * 4)]


def test_few_shapes_serve_many_lengths(t, tokenizer):
    config, params = t
    likelihood._whole.clear_cache()
    rng = random.Random(0)
    requests = [
        ([rng.randrange(490) for _ in range(n)], [[1, 2]]) for n in range(40, 66) for _ in range(3)
    ]
    likelihood.score(params, config, tokenizer, requests, batch_tokens=512, share=False)
    before = likelihood._whole._cache_size()
    assert before <= 4
    rng.shuffle(requests)
    calls = []
    likelihood.score(
        params,
        config,
        tokenizer,
        requests,
        batch_tokens=512,
        share=False,
        progress=lambda *done: calls.append(done),
    )
    assert likelihood._whole._cache_size() == before and calls[-1] == (78, 78) and len(calls) >= 9


def test_long_prompts_lose_their_beginning_and_are_counted(t, tokenizer, plain):
    config, params = t
    rng = random.Random(3)
    context = [rng.randrange(490) for _ in range(300)]
    (scores,) = likelihood.score(params, config, tokenizer, [(context, [[5, 6], [7]])])
    # the last token is not an input
    assert [s.cut for s in scores] == [300 + 2 - 1 - 256, 300 + 1 - 1 - 256]
    assert scores[0].logprob == pytest.approx(plain(context[-255:], [5, 6])[0], abs=1e-4)
    (scores,) = likelihood.score(
        params, config, tokenizer, [(context, [[5, 6], [7]])], max_tokens=400
    )
    assert [s.cut for s in scores] == [0, 0]
    task = made_up("multiple_choice", n=2, fewshot=0)
    task = dataclasses.replace(
        task, items=tuple(i | {"query": "word " * 300 * int(i["id"])} for i in task.items)
    )
    prepared = core.prepare(tokenizer, task)
    assert (
        core.decide(prepared, likelihood.score(params, config, tokenizer, prepared.requests))[
            "truncated"
        ]
        == 1
    )


def test_rolling_scores_each_token_once_as_lm_eval_cuts_it(t, tokenizer, plain):
    config, params = t
    rng = random.Random(4)
    text = [rng.randrange(490) for _ in range(600)]
    (row, short) = likelihood.rolling(params, config, tokenizer, [text, text[:3]])
    want = (
        plain([tokenizer.bos], text[:256])[0]
        + plain(text[255:256], text[256:512])[0]
        + plain(text[343:512], text[512:])[0]
    )
    assert len(row) == 600 and row.sum(dtype=np.float64) == pytest.approx(want, rel=1e-5)
    assert short.sum() == pytest.approx(plain([tokenizer.bos], text[:3])[0], abs=1e-4)
    assert [len(k) for _, k, _ in likelihood._windows([9], text, 256, 100)] == [100] * 6
    # what just fits is one piece, and one token more is several
    assert [len(k) for _, k, _ in likelihood._windows([9], text[:256], 256, 100)] == [256]
    assert [len(k) for _, k, _ in likelihood._windows([9], text[:257], 256, 100)] == [100, 100, 57]


def test_bad_requests_are_refused_in_one_sentence(t, tokenizer):
    config, params = t
    score = functools.partial(likelihood.score, params, config, tokenizer)
    with pytest.raises(UserError, match="request 1 holds token 500"):
        score([([1], [[2]]), ([1], [[500]])])
    with pytest.raises(UserError, match="batch_tokens"):
        score([([1], [[2]])], batch_tokens=0)
    assert score([]) == [] and score([([1], [])]) == [[]]


def test_what_an_item_says_is_looked_for_in_training_text(bundle):
    texts = {task.label: core.texts_of(task) for task in core.load_bundle(bundle)[0]}
    assert [item["text"] for item in texts["syn_schema_0shot"]][
        0
    ] == "Chloé thanked Maya because Chloé had received a silver coin."
    seen = texts["syn_schema_0shot"][2]
    found = contamination.overlap(["So " + seen["text"].upper()], texts, n=8)
    hits = found["syn_schema_0shot"]["items"]
    assert (
        seen["id"] in hits
        and len(hits) < 4
        and found["syn_schema_2shot"]["items"] == hits
        and not found["syn_lm_0shot"]["items"]
    )


# ---- the bundle


def zipped(bundle, path, inside="eval_bundle/"):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in bundle.rglob("*") if p.is_file()):
            archive.write(file, inside + str(file.relative_to(bundle)))
    return path


def test_of_several_numbers_of_examples_the_first_counts():
    entry = dict(label="a", icl_task_type="schema", dataset_uri="a.jsonl", num_fewshot=[3, 10])
    assert core._entry(entry, Path("core.yaml")) == ("a", "schema", "a.jsonl", 3, " ")


def test_a_zip_is_read_as_the_folder_is(bundle, tmp_path):
    assert core.load_bundle(zipped(bundle, tmp_path / "b.zip")) == core.load_bundle(bundle)
    assert (
        core.load_bundle(zipped(bundle, tmp_path / "flat.zip", ""))[1]
        == core.load_bundle(bundle)[1]
    )


def test_the_bundle_is_downloaded_once_and_verified(bundle, tmp_path):
    data, asked = zipped(bundle, tmp_path / "b.zip").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        get = functools.partial(
            core.download, tmp_path / "cache", f"http://127.0.0.1:{server.server_port}/b.zip"
        )
        path = get()
        assert path.read_bytes() == data and get() == path and len(asked) == 1
        with pytest.raises(UserError, match="SHA-256"):
            get(expect="0" * 64)
        path.write_bytes(data[:-1] + b"?")
        with pytest.raises(UserError, match="SHA-256.*delete it"):
            get()
        path.with_name("eval_bundle.zip.sha256").unlink()
        path.write_bytes(data[:200])
        with pytest.raises(UserError, match="not a whole zip"):
            get()
    finally:
        server.shutdown()
        server.server_close()


def test_without_a_network_it_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot download http://127.0.0.1:9/") as error:
        core.download(tmp_path, "http://127.0.0.1:9/eval_bundle.zip", tries=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"core.yaml": None}, "holds no core.yaml"),
        ({"core.yaml": "icl_tasks: [{label: a}]"}, "without 'icl_task_type'"),
        ({"core.yaml": "nothing: here"}, "not as in DCLM"),
        (
            {
                "core.yaml": "icl_tasks: [{label: a, icl_task_type: riddle, dataset_uri: b, "
                "num_fewshot: [0]}]"
            },
            "unknown type of CORE task a 'riddle'",
        ),
        (
            {"eval_meta_data.csv": "Eval Task,Random baseline\nother,25\n"},
            "no random baseline for syn_capitals_0shot",
        ),
        ({"eval_data/geo/syn_capitals.jsonl": None}, "syn_capitals.jsonl is missing"),
        ({"eval_data/geo/syn_capitals.jsonl": "{\n"}, "syn_capitals.jsonl item 0: not JSON"),
        ({"eval_data/geo/syn_capitals.jsonl": ""}, "there are 0 items"),
    ],
)
def test_a_bundle_that_is_not_one_is_refused(golden, tmp_path, change, says):
    files = {
        name: text for name, text in (golden["bundle_files"] | change).items() if text is not None
    }
    with pytest.raises((UserError, RuntimeError)) as error:
        core.load_bundle(write(tmp_path, files))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_paths_and_limits_that_make_no_sense_are_refused(bundle, tokenizer, tmp_path):
    (tmp_path / "text").write_text("x")
    for call, says in (
        (lambda: core.load_bundle(tmp_path / "none"), "no CORE bundle at"),
        (lambda: core.load_bundle(tmp_path / "text"), "neither"),
        (lambda: core.load_bundle(bundle, limit=0), "limit of 0"),
        (lambda: core.load_bundle(bundle, limit=3), "raise the limit"),
        (lambda: core.evaluate(None, tokenizer, bundle, only=["nope"]), "unknown CORE task 'nope'"),
    ):
        with pytest.raises(UserError, match=says):
            call()


def test_a_limit_takes_the_first_items_of_the_shuffled_whole(bundle):
    whole = core.load_bundle(bundle)[0]
    limit = 1 + max(task.fewshot for task in whole)
    parts = core.load_bundle(bundle, limit=limit)[0]
    assert any(limit < len(task.items) for task in whole)
    assert [part.items for part in parts] == [task.items[:limit] for task in whole]


# ---- during training


@pytest.mark.slow
def test_measuring_between_steps_changes_no_step_and_compiles_none(t, tokenizer, bundle, measured):
    config = dataclasses.replace(
        t[0], microbatch=1, total_batch_size=t[0].sequence_len, num_steps=4
    )
    step = train.make_train_step(config)
    rows = np.random.default_rng(0).integers(0, 490, (4, 1, config.sequence_len)).astype(np.int32)
    measure = core.during_training(config, tokenizer, bundle, limit=4)

    def losses(measuring):
        state, out, found = train.init_state(config), [], []
        for row in rows:
            state, metrics = step(state, row, np.roll(row, -1))
            out.append(float(metrics["loss"]))
            if measuring:
                found.append(measure(state.params))
        return out, found

    alone, _ = losses(False)
    size = step._cache_size()
    beside, found = losses(True)
    assert beside == alone and step._cache_size() == size
    assert set(found[0]) == {"core", "core_stderr"} | {
        f"core/{label}" for label in measured[0]["core"]["tasks"]
    }
    assert all(isinstance(v, float) for v in found[0].values())
    assert measure(t[1])["core"] == pytest.approx(
        load("core.json")["results_max_per_task_4"]["core_metric"], rel=1e-6
    )
