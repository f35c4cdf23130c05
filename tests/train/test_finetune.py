"""Conversations reach the step as the reference packs them, teach the assistant's words alone, and
phases resume bit for bit.
"""

import itertools
import json
import types

import jax
import numpy as np
import pytest

from lib import data, model, train
from lib.config import Config
from lib.data import Tokenizer
from lib.files import UserError
from lib.tasks import items_of
from lib.train import checkpoint
from lib.train import finetune as sft
from lib.train.optim import compile_key
from tests.helpers.golden import load

TINY = Config(
    vocab_size=265,
    sequence_len=64,
    n_layer=1,
    n_embd=32,
    n_head=2,
    n_kv_head=1,
    head_dim=16,
    mlp_dim=64,
    microbatch=2,
    total_batch_size=256,
    num_steps=4,
    warmup_steps=2,
    loss_chunk=64,
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["plain bytes"], 265)


def chat(*texts):
    return [
        dict(role="user" if i % 2 == 0 else "assistant", content=t) for i, t in enumerate(texts)
    ]


def chats(*conversations):
    return data.Chats(list(conversations), ["here"] * len(conversations), str(conversations))


MANY = chats(*(chat(f"{n} plus {n}?", f"{2 * n}" * (1 + n % 5)) for n in range(40)))


def test_rows_are_the_references():
    golden, rows = load("sft_packing.json"), load("sft_packing_rows.safetensors")
    saved = load("tokenizer.json")
    import base64

    tokens = tuple(base64.b64decode(t) for t, _ in saved["mergeable_ranks"])
    tokenizer = Tokenizer(saved["pattern"], tokens)
    got = data.chat_batches(
        chats(*(c["messages"] for c in golden["conversations"])),
        tokenizer,
        golden["B"],
        golden["T"],
        buffer_size=golden["buffer_size"],
        shuffle=False,
    )
    for k, (inputs, targets, cursor) in enumerate(itertools.islice(got, golden["num_batches"])):
        np.testing.assert_array_equal(inputs, rows["inputs"][k])
        np.testing.assert_array_equal(targets, rows["targets"][k])
        assert cursor["epoch"] == golden["after_each_batch"][k]["current_epoch"]
    assert cursor["truncated"] == cursor["empty"] == 0


def test_only_what_the_assistant_says_is_a_target(tokenizer):
    for inputs, targets, _ in itertools.islice(data.chat_batches(MANY, tokenizer, 3, 64), 20):
        for x, y in zip(inputs, targets):
            text = "".join(tokenizer.decode([t]) if t >= 0 else "·" for t in y).replace(
                "<|assistant_end|>", "\n"
            )
            assert "\n" in text, "a row teaches something"
            assert (
                all(part.strip("·").isdigit() for part in text.split("\n")[:-1])
                and text.split("\n")[-1].strip("·") == ""
            )
            given = [
                tokenizer.special[name]
                for name in ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>")
            ]
            assert not np.isin(y, given).any()
            assert (y[:-1][y[:-1] >= 0] == x[1:][y[:-1] >= 0]).all()  # a target is the next input


def test_text_among_the_chats_is_learnt_whole_but_for_its_beginning(tokenizer):
    mixed = chats("import os", chat("2 plus 2?", "4"), "x" * 100)
    ((inputs, targets, cursor),) = data.chat_batches(
        mixed, tokenizer, 2, 63, loop=False, shuffle=False
    )
    learnt = [tokenizer.decode([t for t in row if t >= 0]) for row in targets]
    assert (
        sorted(learnt) == sorted(["x" * 63, "4<|assistant_end|>import os"])
        and cursor["truncated"] == 1
    )
    assert (inputs[:, 0] == tokenizer.bos).all() and not (targets == tokenizer.bos).any()


def test_the_text_of_a_mixture_is_that_of_training_only():
    train_side, val_side = (
        sft.open_mixture(dict(source_text=1.0), split).messages for split in ("train", "val")
    )
    tested = {item["text"] for item in items_of("source_text", "test")}
    assert (
        train_side
        and val_side
        and not (set(train_side) | set(val_side)) & tested
        and not set(train_side) & set(val_side)
    )


def test_an_epoch_holds_every_conversation_once_and_its_own_order(tokenizer):
    def answers(**kwargs):
        out = []
        batches = data.chat_batches(MANY, tokenizer, 2, 64, loop=False, **kwargs)
        for _, targets, cursor in batches:  # noqa: B007  (the last one is returned)
            out += tokenizer.decode(targets[targets >= 0]).split("<|assistant_end|>")[:-1]
        return out, cursor

    first, cursor = answers(seed=1)
    assert sorted(first) == sorted(m[1]["content"] for m in MANY.messages) and cursor[
        "conversations"
    ] == len(MANY)
    assert first == answers(seed=1)[0] != answers(seed=2)[0]
    assert 0 < cursor["padding"] < cursor["cells"] and cursor["targets"] == sum(
        len(a) + 1 for a in first
    )


def test_cursor_resumes_exactly(tokenizer):
    whole = list(
        itertools.islice(data.chat_batches(MANY, tokenizer, 2, 64, seed=3, buffer_size=7), 30)
    )
    assert whole[-1][2]["epoch"] > 2
    for at in (0, 5, 17):
        cursor = json.loads(json.dumps(whole[at][2]))
        rest = list(
            itertools.islice(
                data.chat_batches(MANY, tokenizer, 2, 64, seed=3, buffer_size=7, cursor=cursor),
                29 - at,
            )
        )
        for (x, y, c), (a, b, d) in zip(whole[at + 1 :], rest, strict=True):
            assert np.array_equal(x, a) and np.array_equal(y, b) and c == d
    with pytest.raises(UserError, match="seed 3"):
        data.chat_batches(MANY, tokenizer, 2, 64, seed=4, buffer_size=7, cursor=whole[0][2])


def test_long_conversations_are_cut_and_counted_and_silent_ones_left_out(tokenizer):
    mixed = chats(chat("hi", "x" * 500), chat("y" * 500, "never reached"), chat("a", "b"))
    *_, (inputs, targets, cursor) = data.chat_batches(mixed, tokenizer, 4, 64, loop=False)
    assert (cursor["conversations"], cursor["truncated"], cursor["empty"]) == (2, 1, 1)
    # bos, 2 + hi + 1 come before
    assert sorted((targets >= 0).sum(1)) == [0, 0, 2, 64 - 5] and targets.max() < TINY.vocab_size
    with pytest.raises(UserError, match="in none of 1 conversations"):
        next(data.chat_batches(chats(chat("y" * 500, "x")), tokenizer, 1, 64))


def test_a_conversation_that_just_fits_is_not_cut(tokenizer):
    length = len(tokenizer.render_conversation(chat("hi", "there"))[0])
    for width, cut in ((length, 0), (length - 1, 1)):
        batches = data.chat_batches(chats(chat("hi", "there")), tokenizer, 1, width - 1, loop=False)
        *_, (_, _, cursor) = batches
        assert cursor["truncated"] == cut


def test_no_target_is_no_nan():
    state = train.init_state(TINY)
    before = jax.tree.map(np.array, state.params)
    state, metrics = train.make_train_step(TINY)(
        state, np.zeros((4, 64), np.int32), np.full((4, 64), -1, np.int32)
    )
    assert (
        float(metrics["loss"]) == 0
        and float(metrics["grad_norm"]) == 0
        and int(metrics["count"]) == 0
    )
    # no gradient, no moments: what is left is weight decay
    assert not any(np.any(x) for x in jax.tree.leaves((state.opt_state.m, state.opt_state.v)))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params)):
        assert (np.abs(new) <= np.abs(old) * (1 + 1e-6)).all()


def test_loss_is_per_target_however_they_are_spread(tokenizer):
    """Two microbatches, one with many targets and one with few, weigh by targets: the mean over all
    of them.
    """
    state = train.init_state(TINY)
    x = np.random.default_rng(0).integers(0, 256, (4, 64)).astype(np.int32)
    y = np.where(np.arange(64) < np.array([[60], [50], [1], [2]]), np.roll(x, -1, 1), -1)
    mean, _ = model.loss_fn(state.params, TINY, x, y)
    _, metrics = train.make_train_step(TINY)(state, x, y)
    assert (
        float(metrics["loss"]) == pytest.approx(float(mean), rel=1e-5)
        and int(metrics["count"]) == 113
    )


@pytest.mark.parametrize("warm", [False, True])
def test_a_phase_resumes_bit_for_bit(tokenizer, tmp_path, warm):
    config = sft.phase_config(TINY, 4, 0.5, warm)
    step = train.make_train_step(config)
    pretrained = train.steps(
        train.make_train_step(TINY),
        train.init_state(TINY),
        data.chat_batches(MANY, tokenizer, 4, 64),
        TINY,
    )
    base = jax.tree.map(np.array, list(pretrained)[-1].state)

    def begin():
        state = jax.tree.map(jax.numpy.array, base)
        return sft.start(state.params, config, state.opt_state if warm else None)

    def go(state, cursor=None):
        return list(
            train.steps(
                step,
                state,
                data.chat_batches(MANY, tokenizer, 4, 64, cursor=cursor),
                config,
                pause=lambda n: n == 2,
            )
        )

    whole = []
    for s in train.steps(
        step, begin(), data.chat_batches(MANY, tokenizer, 4, 64), config, pause=lambda n: n == 2
    ):
        whole.append(s.metrics)
        if s.step == 2:
            checkpoint.save(tmp_path, 2, s.state, dict(cursor=s.cursor))
        last = s.state
    last = jax.tree.map(np.array, last)
    state, meta = checkpoint.restore(tmp_path, train.state_template(config))
    rest = go(state, meta["cursor"])
    assert rest[-1].step == 4 and rest[-1].metrics["loss"] == whole[-1]["loss"]
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(rest[-1].state))
    )


def test_a_warm_start_keeps_moments_and_follows_the_phases_schedule():
    from lib.train.optim import lr_multiplier

    base = train.init_state(TINY)
    old = base.opt_state._replace(
        step=jax.numpy.asarray(100, jax.numpy.int32),
        m=jax.tree.map(lambda m: m + 1, base.opt_state.m),
    )
    config = sft.phase_config(TINY, 40, 0.5, warm=True)
    state = sft.start(base.params, config, old)
    h = {k: np.asarray(v) for k, v in state.opt_state.hyper.items() if k != "lr"}
    assert (
        int(state.step) == 0
        and int(state.opt_state.step) == 100
        and jax.tree.leaves(state.opt_state.m)[0].min() == 1
    )
    for n in range(40):
        asked = lr_multiplier(
            n, 40, config.warmup_steps, config.warmdown_ratio, config.final_lr_frac
        )
        done = lr_multiplier(
            100 + n, h["num_steps"], h["warmup_steps"], h["warmdown_ratio"], h["final_lr_frac"]
        )
        assert done == pytest.approx(asked, abs=1e-5)
    fresh = sft.start(base.params, config)
    assert int(fresh.opt_state.step) == 0 and not any(
        m.any() for m in jax.tree.leaves(fresh.opt_state.m)
    )
    assert float(fresh.opt_state.hyper["lr"]["matrix"]) == pytest.approx(
        0.5 * float(base.opt_state.hyper["lr"]["matrix"])
    )


# ---- mixtures and files


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return str(path)


def test_three_shapes_of_file_give_the_same_chats(tmp_path):
    openai = [dict(messages=chat("hi", "hello")), dict(messages=chat("a", "b", "c", "d"))]
    lists = [m["messages"] for m in openai]
    names = ["human", "gpt"]
    share = [
        dict(
            id="x",
            conversations=[{"from": names[i % 2], "value": m["content"]} for i, m in enumerate(c)],
        )
        for c in lists
    ]
    share[0]["conversations"].insert(0, {"from": "gpt", "value": "I greet first"})
    got = [
        data.read_chats(write(tmp_path / f"{i}.jsonl", *lines, ""))
        for i, lines in enumerate([openai, lists, share])
    ]
    assert got[0] == got[1] == got[2] == lists
    parts = dict(
        messages=[
            dict(role="developer", content="be brief"),
            dict(role="user", content=[dict(type="text", text="hi")]),
            dict(role="assistant", content="hello", name="x"),
        ]
    )
    joined = [dict(role="system", content="be brief"), *chat("hi", "hello")]
    assert data.read_chats(write(tmp_path / "parts.jsonl", parts)) == [joined]


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "not JSON"),
        ('"text"', "expected"),
        ("[]", "no messages"),
        ("5", "expected"),
        ('{"text": "x"}', "messages"),
        ('{"messages": [{"role": "user"}]}', "content"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}', "speaker 'alien'"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no messages"),
        ('{"conversations": []}', "no messages"),
        ('{"messages": [{"role": "user", "content": 5}]}', "not text"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "is due"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "not text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    path = write(tmp_path / "chats.jsonl", chat("hi", "hello"), line)
    with pytest.raises(UserError, match=rf"chats\.jsonl, line 2: (.*)({says})"):
        data.read_chats(path)


def test_bad_lines_of_a_mixture_are_skipped_on_request(tmp_path):
    lines = [chat(f"q{i}", f"a{i}") for i in range(10)]
    path = write(tmp_path / "chats.jsonl", *lines, "{")
    with pytest.raises(UserError, match="line 11"):
        sft.open_mixture({path: 1.0}, "train")
    sides = [sft.open_mixture({path: 1.0}, split, "skip") for split in ("train", "val")]
    assert sum(map(len, sides)) == 10
    with pytest.raises(UserError, match="unknown bad_lines"):
        sft.open_mixture({path: 1.0}, "train", "ignore")


def test_a_phase_remembers_which_model_it_began_with(tokenizer, tmp_path, monkeypatch):
    remembered = []
    remember = lambda store, if_exists, config, identity, *rest: remembered.append(identity)
    monkeypatch.setattr(sft, "find_past", remember)
    path = write(tmp_path / "chats.jsonl", *(chat(f"q{i}", "a") for i in range(30)))
    phase = sft.Phase("sft", {path: 1.0})
    for scale in (1.0, 2.0):
        params = {"embed": np.full((265, 32), scale, np.float32)}
        sft.open_phase(phase, sft.Base(params, TINY, tokenizer, "here"), tmp_path, "continue", None)
    one, other = remembered
    assert [name for name in one if one[name] != other[name]] == ["start"]


def test_no_more_conversations_are_held_out_than_a_validation_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "VAL_EVERY", 1)
    monkeypatch.setattr(sft, "VAL_MOST", 2)
    path = write(tmp_path / "chats.jsonl", *(chat(f"q{i}", "a") for i in range(5)))
    assert [len(sft.open_mixture({path: 1.0}, side)) for side in ("train", "val")] == [3, 2]


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(UserError, match="no conversations"):
        data.read_chats(write(tmp_path / "a.jsonl", "", ""))
    with pytest.raises(UserError, match="cannot read .*no.jsonl"):
        data.read_chats(tmp_path / "no.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not UTF-8"):
        data.read_chats(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="single conversation"):
        sft.open_mixture({write(tmp_path / "c.jsonl", chat("a", "b")): 1.0}, "train")


def test_mixture_weighs_by_epochs_and_its_sides_share_nothing(tmp_path):
    a = write(tmp_path / "a.jsonl", *(chat(f"a{i}", "x") for i in range(400)))
    b = write(tmp_path / "b.jsonl", *(chat(f"b{i}", "x") for i in range(10)))
    train_side, val = (sft.open_mixture({a: 0.5, b: 3.0}, split) for split in ("train", "val"))
    of = lambda side, name: [
        m[0]["content"] for m, s in zip(side.messages, side.source) if s == name
    ]
    assert len(of(train_side, a)) == round((400 - len(of(val, a))) / 2) and len(
        set(of(train_side, a))
    ) == len(of(train_side, a))
    assert (
        len(of(train_side, b)) == 27 and len(set(of(train_side, b))) == 9 and len(of(val, b)) == 1
    )
    words = lambda side: {m[0]["content"] for m in side.messages}
    assert not words(train_side) & words(val) and 1 <= len(of(val, a)) < 40
    again, other = (sft.open_mixture({a: epochs, b: 3.0}, "train") for epochs in (0.5, 0.4))
    assert train_side.identity == again.identity != other.identity


def test_what_a_mixture_holds_twice_counts_once_however_it_is_written(tmp_path):
    asked, said = (dict(role=role, content=role) for role in ("user", "assistant"))
    turned = [dict(reversed(message.items())) for message in (asked, said)]
    others = [chat(f"q{i}", "a") for i in range(9)]
    path = write(tmp_path / "c.jsonl", *map(json.dumps, ([asked, said], turned)), *others)
    assert sum(len(sft.open_mixture({path: 1.0}, side)) for side in ("train", "val")) == 10


def test_parse_mixture(tmp_path):
    assert sft.parse_mixture("embedded_mid") == sft.MIXTURES["embedded_mid"]
    assert sft.parse_mixture("arithmetic:0.5 spelling my.jsonl:3") == dict(
        arithmetic=0.5, spelling=1.0
    ) | {"my.jsonl": 3.0}
    both = sft.MIXTURES["embedded_sft"] | {"my.jsonl": 3.0}
    assert sft.parse_mixture("embedded_sft my.jsonl:3") == both, (
        "a user's own chats beside a named mixture"
    )
    assert sft.parse_mixture("embedded_sft:2") == {
        name: 2 * epochs for name, epochs in sft.MIXTURES["embedded_sft"].items()
    }
    for bad, says in [
        ("", "empty"),
        ("arithmetic:x", "number of epochs"),
        ("arithmetc", "unknown source"),
        ("spelling:0", "above 0"),
        ("spelling:nan", "above 0"),
        ("spelling:1e6", "above 0"),
    ]:
        with pytest.raises(UserError, match=says):
            sft.parse_mixture(bad)


@pytest.mark.parametrize("name", sft.MIXTURES)
def test_mixtures_name_real_sources(name):
    from lib.tasks import tasks

    assert set(sft.MIXTURES[name]) <= set(tasks())


def test_plan_is_near_the_truth(tokenizer):
    said = sft.plan(MANY, tokenizer, TINY, epochs=3.0)
    rows = sum(len(inputs) for inputs, *_ in data.chat_batches(MANY, tokenizer, 1, 64, loop=False))
    assert said["conversations"] == {"here": 40} and abs(said["steps"] - 3 * rows / 4) <= 2


def test_fingerprint_tells_models_apart():
    a, b = (model.init_params(jax.random.key(seed), TINY) for seed in (0, 1))
    assert sft.fingerprint(a) == sft.fingerprint(jax.tree.map(np.array, a)) != sft.fingerprint(b)


# ---- beginning and measuring a phase -------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_the_start_of_a_phase_leaves_the_callers_arrays_alone(warm):
    """The step overwrites the state it is given, and a phase may be begun again from the same."""
    before = train.init_state(TINY)
    kept = jax.tree.map(np.array, before)
    state = sft.start(before.params, TINY, before.opt_state if warm else None)
    rows = np.arange(4 * 65, dtype=np.int32).reshape(4, 65) % 265
    train.make_train_step(TINY)(state, rows[:, :-1], rows[:, 1:])
    for ours, theirs in zip(jax.tree.leaves(before), jax.tree.leaves(kept), strict=True):
        assert not ours.is_deleted()
        assert (np.asarray(ours) == theirs).all()


def test_validation_weighs_targets_alike_however_they_are_spread():
    """One target in the first batch, sixty in the second: the mean is over sixty-one."""
    params = jax.jit(lambda: train.init_state(TINY).params)()
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 265, (2, 2, 1, 64)).astype(np.int32)
    targets[0, 0, 1:] = -1
    targets[1, 0, 60:] = -1

    losses = [model.token_losses(params, TINY, *batch) for batch in zip(inputs, targets)]
    means = [float(losses[0].sum()), float(losses[1].sum()) / 60]
    wanted = (means[0] + 60 * means[1]) / 61
    assert abs(np.mean(means) - wanted) > 1e-3, "the two must differ for this to tell anything"

    batches = [(*batch, {"cursor": n}) for n, batch in enumerate(zip(inputs, targets))]
    assert sft.validation_loss(params, TINY, batches) == pytest.approx(wanted, rel=1e-6)
    assert np.isnan(sft.validation_loss(params, TINY, [(inputs[0], np.full((1, 64), -1))]))


def test_a_phase_is_saved_three_times_and_keeps_the_last():
    run = types.SimpleNamespace(config=types.SimpleNamespace(num_steps=31))
    saving = sft.saving(run)
    # with every second validation, and at the end
    assert (saving.every, saving.keep, saving.metric) == (12, 1, "val_loss")


def test_a_phase_skips_ignored_tokens_on_a_cpu_alone(monkeypatch):
    assert sft.phase_config(TINY, 4, 0.5).skip_ignored
    monkeypatch.setattr(sft.jax, "default_backend", lambda: "tpu")
    assert compile_key(sft.phase_config(TINY, 4, 0.5)) == compile_key(TINY)
    # one that began on a CPU goes on as it did
    begun = TINY.replace(skip_ignored=True)
    assert sft.phase_config(begun, 4, 0.5).skip_ignored


# ---- a phase by hand -----------------------------------------------------------------------------


def test_a_plan_by_hand(tokenizer):
    """Lengths are of what a row of 65 holds at most; three passes of it, four rows a step."""
    some = chats(chat("a", "b" * 9), chat("a", "b" * 200))
    lengths = [len(tokenizer.render_conversation(one, 65)[0]) for one in some.messages]
    assert lengths[1] == 65
    planned = sft.plan(some, tokenizer, TINY, epochs=300.0)
    assert planned["tokens"] == sum(lengths) and planned["conversations"] == {"here": 2}
    assert planned["steps"] == round(300 * sum(lengths) / 65 / 4)
    assert sft.plan(some, tokenizer, TINY, epochs=0.01)["steps"] == 1
    # of many every so manieth
    many = chats(*(some.messages * 3))
    assert sft.plan(many, tokenizer, TINY, 1.0, sample=3)["tokens"] == 6 * lengths[0]


def test_the_config_of_a_phase():
    base = TINY.replace(warmup_steps=5, num_steps=100)
    config = sft.phase_config(base, 40, 0.5)
    assert (config.num_steps, config.warmup_steps) == (40, 4)
    assert sft.phase_config(base, 80, 1.0).warmup_steps == 5
    assert sft.phase_config(base, 80, 1.0, warm=True).warmup_steps == 0
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "adamw_lr"):
        assert getattr(config, name) == 0.5 * getattr(base, name)
    assert sft.phase_config(base, 1, 1.0).num_steps == 1
    for steps, lr in ((0, 1.0), (1, 0.0), (1, -1.0)):
        with pytest.raises(UserError, match="at least 1 step and rates above 0"):
            sft.phase_config(base, steps, lr)


@pytest.mark.parametrize("warm", [False, True])
def test_what_a_phase_is_opened_with(tokenizer, tmp_path, monkeypatch, capsys, warm):
    past, asked, begun = {}, [], []
    monkeypatch.setattr(sft, "find_past", lambda *given: past.update(given=given))
    monkeypatch.setattr(sft, "fingerprint", lambda params: f"print of {params}")
    monkeypatch.setattr(sft, "start", lambda *given: begun.append(given))
    monkeypatch.setattr(
        sft, "chat_batches", lambda *given, **more: asked.append((given, more)) or iter(())
    )
    # a run that only keeps what it is given
    monkeypatch.setattr(sft, "TrainingRun", lambda *given, **more: (given, more))
    phase = sft.Phase("sft", {"here": 2.0}, epochs=3.0, lr=0.5)
    phase.__dict__["chats"] = MANY
    base = sft.Base("params", TINY.replace(seed=6), tokenizer, "text", "moments" if warm else None)
    (config, feed), given = sft.open_phase(phase, base, tmp_path, "continue", "afresh")

    steps = sft.plan(MANY, tokenizer, TINY, 3.0)["steps"]
    assert config == sft.phase_config(base.config, steps, 0.5, warm)
    identity = dict(
        tokenizer=tokenizer.fingerprint,
        mixture={"here": 2.0},
        conversations=MANY.identity,
        source="text",
        optimizer_state="warm" if warm else "fresh",
        start="print of params",
    )
    assert given["identity"] == identity and given["past"] is None
    assert past["given"] == (tmp_path, "continue", config, identity, tmp_path, "afresh")
    assert given["folder"] == given["store"] == tmp_path
    given["begin"]()
    assert begun == [("params", config, "moments" if warm else None)]
    # rows are those of a whole batch, in the order of this seed, from where the cursor stands
    assert list(feed("cursor")) == []
    assert asked == [((MANY, tokenizer, 4, 64), dict(cursor="cursor", seed=6))]
    told = capsys.readouterr().out
    assert f"tokens x 3 epochs = {steps} steps of 4 x 64, 0.5 x rates" in told
    assert "continuing" not in told and "finished" not in told


def test_what_is_said_of_a_phase_that_was_begun_before(tokenizer, tmp_path, monkeypatch, capsys):
    phase = sft.Phase("sft", {"here": 2.0})
    phase.__dict__["chats"] = MANY
    steps = sft.plan(MANY, tokenizer, TINY, 1.0)["steps"]
    monkeypatch.setattr(sft, "fingerprint", lambda params: "print")
    monkeypatch.setattr(sft, "TrainingRun", lambda *given, **more: more["past"])
    for step, line in ((steps, "finished before: where"), (1, "continuing at step 1")):
        past = types.SimpleNamespace(path="where", meta=dict(step=step))
        monkeypatch.setattr(sft, "find_past", lambda *given, past=past: past)
        base = sft.Base(None, TINY, tokenizer, "text")
        assert sft.open_phase(phase, base, tmp_path, "continue", None) is past
        assert capsys.readouterr().out.endswith(f"  {line}\n")


def test_a_validation_reads_what_is_held_out_once(tokenizer, monkeypatch):
    phase = sft.Phase("sft", {"here": 1.0})
    phase.__dict__["held_out"] = MANY
    read = []
    monkeypatch.setattr(sft, "validation_loss", lambda *given: read.append(given) or 2.5)
    for steps, every in ((31, 6), (6, 1), (20, 4)):
        config = TINY.replace(num_steps=steps)
        run = types.SimpleNamespace(config=config)
        measurement = sft.validation(phase, run, tokenizer)
        assert (measurement.every, measurement.gives, measurement.by_clock) == (
            every,
            "val_loss",
            False,
        )
    assert measurement.measure("params") == {"val_loss": 2.5}
    [(params, config, rows)] = read
    assert (params, config) == ("params", run.config)
    own = list(data.chat_batches(MANY, tokenizer, 2, 64, loop=False))
    assert len(rows) == len(own)
    for (inputs, targets, *_), (want, want_targets, *_) in zip(rows, own):
        assert (inputs == want).all() and (targets == want_targets).all()


def test_packing_in_words():
    cursor = dict(conversations=1234, truncated=2, empty=3, targets=30, padding=5, cells=120)
    line = sft.packing_line(cursor)
    assert "1,234 conversations, 2 cut" in line and "3 left out" in line
    assert "25% of the tokens learnt, 4.2% padding" in line


def test_what_a_task_teaches(monkeypatch):
    learnt = [dict(role="user", content="a"), dict(role="assistant", content="b")]
    items = [dict(messages=learnt), dict(text="words")]
    monkeypatch.setattr(sft, "items_of", lambda name, split: items if split == "train" else None)
    assert sft._source("task", "refuse") == [learnt, "words"]
    for bad in (dict(messages=learnt[:1]), dict(text=""), dict(question="a")):
        monkeypatch.setattr(sft, "items_of", lambda name, split, bad=bad: [*items, bad])
        with pytest.raises(UserError, match="task task holds neither conversations nor text"):
            sft._source("task", "refuse")
    read = []
    monkeypatch.setattr(sft, "read_chats", lambda *name, **more: read.append((name, more)))
    for name, lines in (("a.jsonl", "skip"), ("a.jsonl.gz", "refuse")):
        sft._source(name, lines)
    assert read == [(("a.jsonl",), dict(skip_bad=True)), (("a.jsonl.gz",), dict(skip_bad=False))]


def test_a_part_of_an_epoch_by_hand(monkeypatch):
    """Ten conversations, none marked by its hash: the one with the least hash validates."""
    texts = [f"text {n}" for n in range(10)]
    monkeypatch.setattr(sft, "_source", lambda name, bad_lines: texts)
    monkeypatch.setattr(sft, "VAL_EVERY", 2**40)
    held_out = sft.open_mixture({"a": 3.0}, "val")
    assert len(held_out) == 1 and held_out.source == ["a"]
    for epochs, count in ((1.0, 9), (2.0, 18), (0.5, 4), (2.4, 18 + 4), (0.01, 0)):
        some = sft.open_mixture({"a": epochs}, "train")
        assert len(some.messages) == len(some.source) == count
        assert held_out.messages[0] not in some.messages
    assert len(set(sft.open_mixture({"a": 1.0}, "train").messages)) == 9
    # all are marked, and of those so many validate
    monkeypatch.setattr(sft, "VAL_EVERY", 1)
    monkeypatch.setattr(sft, "VAL_MOST", 3)
    assert len(sft.open_mixture({"a": 1.0}, "val")) == 3
    assert len(sft.open_mixture({"a": 1.0}, "train")) == 7
    one, two = (sft.open_mixture({"a": 1.0}, split).identity for split in ("train", "val"))
    assert one != two and one == sft.open_mixture({"a": 1.0}, "train").identity
    monkeypatch.setattr(sft, "_source", lambda name, bad_lines: ["alone"])
    with pytest.raises(UserError, match="a holds a single conversation"):
        sft.open_mixture({"a": 1.0}, "train")


def test_when_a_phase_was_sent_away_is_handed_on():
    run = types.SimpleNamespace(config=types.SimpleNamespace(num_steps=2))
    then, sent_at = (lambda step, path: None), (lambda: 3.0)
    saving = sft.saving(run, then, sent_at)
    assert (saving.every, saving.then, saving.sent_at) == (1, then, sent_at)
    assert sft.saving(run).sent_at() == float("inf") and sft.saving(run).then(1, "path") is None


def test_what_a_task_says_twice_counts_once_however_it_is_written(monkeypatch):
    asked, said = (dict(role=role, content=role) for role in ("user", "assistant"))
    turned = [dict(reversed(message.items())) for message in (asked, said)]
    talks = [[asked, said], turned, *(chat(f"q{i}", "a") for i in range(9))]
    monkeypatch.setattr(sft, "_source", lambda name, bad_lines: talks)
    assert sum(len(sft.open_mixture({"a": 1.0}, side)) for side in ("train", "val")) == 10
