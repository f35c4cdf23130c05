"""Greedy text is the reference's, a row is the same alone or among others, tools and stops work
inside a batch, nothing recompiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import model
from lib.config import Config
from lib.files import UserError
from lib.generate import Engine, Engines, Sampling, generate, sampling, stream
from lib.generate import decode as decode_module
from lib.generate import engine as engine_module
from lib.generate.engine import LONG_CHUNK, WHOLE_CHUNK
from lib.generate.writer import Token, Writer
from lib.params import init_params
from lib.sandbox import calculator
from tests.helpers.engines import PROMPTS, drain, golden, greedy, ids, scripted
from tests.helpers.golden import load, parity_model


def alone(prompt, settings):
    """What the golden model writes after one prompt in an engine of one slot."""
    config, params, _ = golden()
    engine = Engine(params, config, 1, 64)
    engine.add(prompt, settings)
    return ids(drain(engine, count=LONG_CHUNK)[0][0])


# ---- the reference's text ------------------------------------------------------------------------


def test_greedy_tokens_match_the_reference_beyond_the_context():
    config, params = parity_model("A")
    io = load("model_A_io.safetensors")
    assert generate(params, config, [io["gen_prompt"].tolist()], greedy(32)) == [
        io["gen_tokens"].tolist()
    ]


def test_greedy_logits_match_the_reference():
    config, params = parity_model("A")
    io = load("model_A_io.safetensors")
    prompt = io["gen_prompt"]
    cache = model.init_cache(config, 1, 256)
    logits, cache = jax.jit(model.forward, static_argnums=1)(
        params, config, np.concatenate([prompt, io["gen_tokens"][:-1]])[None], cache
    )
    np.testing.assert_allclose(logits[0, len(prompt) - 1 :], io["gen_logits"], atol=2e-4)


def test_trained_model_writes_the_references_text():
    config, params, _ = golden()
    cases = load("generation_T.json")["greedy"]
    new = generate(params, config, [c["prompt_ids"] for c in cases], greedy(32))
    assert [row[: len(c["stream_tokens"])] for row, c in zip(new, cases)] == [
        c["stream_tokens"] for c in cases
    ]
    ends = (
        load("tokenizer.json")["special_tokens"]["<|assistant_end|>"],
        cases[0]["prompt_ids"][0],
    )
    new = generate(params, config, [c["prompt_ids"] for c in cases], greedy(32, stop=ends))
    assert [c["prompt_ids"] + row for c, row in zip(cases, new)] == [
        c["batch_rows"][0] for c in cases
    ]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("count", [1, 3, 32])
def test_tool_calls_match_the_reference(case, count, monkeypatch):
    trace = load("generation_T.json")["tool_traces"][case]
    engine, prompt = (
        scripted(monkeypatch, trace["scripted_greedy_ids_per_forward"]),
        trace["prompt_ids"],
    )
    settings = Sampling(
        trace["max_tokens"], temperature=0, stop=(golden()[2].special["<|assistant_end|>"],)
    )
    slots = engine.add_many([prompt] * engine.slots, [settings] * engine.slots)
    rows, why = drain(engine, count=count)
    for row, slot in enumerate(slots):
        assert prompt + ids(rows[slot]) == trace["generate_batch_rows"][row]
        assert [0] * len(prompt) + [int(not t.forced) for t in rows[slot]] == trace[
            "generate_batch_masks"
        ][row]
        assert why[slot] == "stop"


def test_a_tool_that_refuses_forces_nothing_and_a_long_answer_crosses_chunks(monkeypatch):
    special = golden()[2].special
    call = [special["<|python_start|>"], 50, special["<|python_end|>"]]
    for answer in (None, "7" * 90):
        engine = scripted(monkeypatch, [call + [65] * 20 + [len(answer or "")]])
        engine.tool = lambda text, answer=answer: answer
        engine.add([491, 70, 71], Sampling(60, temperature=0))
        (tokens,), _ = drain(engine)[0].values(), None
        forced = golden()[2].encode(answer) if answer else []
        want = [special["<|output_start|>"], *forced, special["<|output_end|>"]] if answer else []
        assert ids(t for t in tokens if t.forced) == want[: 60 - len(call)]
        assert len(tokens) == 60


def test_a_row_that_waits_for_its_tool_stands_still_while_others_write(monkeypatch):
    special = golden()[2].special
    call = [special["<|python_start|>"], 50, special["<|python_end|>"]]
    scripts = [call + [65] * 9, [70] * 12]
    engine = scripted(monkeypatch, scripts)
    engine.tool = lambda text: None
    slots = engine.add_many([[491, 70, 71]] * 2, [greedy(12)] * 2)
    rows, _ = drain(engine, count=WHOLE_CHUNK)
    assert [ids(rows[slot]) for slot in slots] == scripts


def test_an_empty_call_asks_no_tool():
    tokenizer = golden()[2]
    asked = []
    writer = Writer(greedy(9), tokenizer, asked.append)
    for text in ("<|python_start|>", "<|python_end|>"):
        writer.push(Token(tokenizer.special[text], 0.0))
    assert asked == [] and writer.forced == [] and writer.call is None


def test_a_call_that_ends_with_its_row_asks_no_tool():
    tokenizer = golden()[2]
    asked = []
    writer = Writer(greedy(3), tokenizer, asked.append)
    start, end = (tokenizer.special[f"<|python_{which}|>"] for which in ("start", "end"))
    for id in (start, tokenizer.encode("7")[0], end):
        writer.push(Token(id, 0.0))
    assert writer.finish == "length" and asked == [] and writer.forced == []


def test_stop_strings_look_at_what_is_said_and_not_into_calls(monkeypatch):
    tokenizer = golden()[2]
    call = [tokenizer.special["<|python_start|>"], *tokenizer.encode("2*3")]
    call.append(tokenizer.special["<|python_end|>"])
    # what the tool answers is forced, so the script goes on behind it
    output = tokenizer.encode("6")
    script = [*call, 0, *[0] * len(output), 0, *tokenizer.encode("so 6*"), *tokenizer.encode("x")]
    engine = scripted(monkeypatch, [script])
    slot = engine.add([491, 70, 71], Sampling(60, temperature=0, stop_strings=("*",)))
    rows, why = drain(engine)
    assert why == {slot: "stop"}
    assert ids(rows[slot])[: len(call)] == call
    assert tokenizer.decode(ids(rows[slot])[len(call) + 2 + len(output) :]) == "so 6"


# ---- rows do not depend on each other ------------------------------------------------------------


def test_a_row_does_not_depend_on_its_batch_and_seeds_repeat():
    config, params, _ = golden()
    prompts = PROMPTS + [p[::-1] for p in PROMPTS]
    settings = dict(temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.1)
    together = generate(params, config, prompts, Sampling(20, seed=5, **settings))
    assert together == [
        alone(p, Sampling(20, seed=5 + i, **settings)) for i, p in enumerate(prompts)
    ]
    assert together != generate(params, config, prompts, Sampling(20, seed=6, **settings))
    twice = generate(params, config, [*PROMPTS[:2], *PROMPTS[:2]], greedy(6))
    assert twice == [alone(p, greedy(6)) for p in PROMPTS[:2]] * 2, "each a copy of its own prompt"
    same_prompt = generate(params, config, [[491]] * 6, Sampling(20, temperature=1.5))
    assert len({row[0] for row in same_prompt}) > 1, "every row draws its own first token"


def test_rows_join_and_leave_in_the_middle_and_equal_their_solo_runs():
    config, params, _ = golden()
    samplings = [
        Sampling(n, temperature=t, top_k=k, seed=n)
        for n, t, k in ((30, 0, 0), (9, 1.0, 0), (25, 0.8, 5), (12, 1.2, 0))
    ]
    solo = [alone(p, s) for p, s in zip(PROMPTS, samplings)]
    engine, rows = Engine(params, config, 2, 64), {}
    waiting, running, done = [0, 1, 2, 3], {}, {}
    for step in range(40):
        if waiting and engine.free and step != 1:
            row = waiting.pop(0)
            running[engine.add(PROMPTS[row], samplings[row])] = row
        for slot, (tokens, finish) in engine.step(3).items():
            rows.setdefault(running[slot], []).extend(ids(tokens))
            if finish:
                done[running.pop(slot)] = finish
    assert (
        rows == dict(enumerate(solo))
        and done == dict.fromkeys(range(4), "length")
        and engine.free == 2
    )
    assert engine.step() == {}


def test_a_cancelled_row_frees_its_slot_and_disturbs_nobody():
    config, params, _ = golden()
    engine = Engine(params, config, 2, 64)
    kept, dropped = (
        engine.add(PROMPTS[1], Sampling(20, temperature=0)),
        engine.add(PROMPTS[2], Sampling(40, temperature=0)),
    )
    rows = {kept: engine.step()[kept][0]}
    assert len(rows[kept]) == 1, "the first token of a new row waits for no others"
    engine.cancel(dropped)
    engine.cancel(dropped)  # once is enough
    assert np.flatnonzero(engine.rows["alive"]).tolist() == [kept], "the device writes no further"
    assert engine.free == 1 and engine.add(PROMPTS[0], Sampling(5, temperature=0)) == dropped
    rows, _ = drain(engine, rows)
    assert ids(rows[kept]) == alone(PROMPTS[1], Sampling(20, temperature=0))
    assert ids(rows[dropped]) == alone(PROMPTS[0], Sampling(5, temperature=0))


def test_engines_side_by_side_write_what_one_row_alone_writes():
    config, params, _ = golden()
    samplings = [
        Sampling(n, temperature=t, top_k=k, seed=n)
        for n, t, k in ((30, 0, 0), (9, 1.0, 0), (25, 0.8, 5), (12, 1.2, 0))
    ]
    solo = [alone(p, s) for p, s in zip(PROMPTS, samplings)]
    engines = Engines(params, config, 4, 64, sides=2)
    slots = engines.add_many(PROMPTS, samplings)
    assert (
        sorted(slots) == [0, 1, 2, 3]
        and [part.free for part in engines.parts] == [0, 0]
        and engines.free == 0
    )
    assert all(len(tokens) == 1 for tokens, _ in engines.step().values()), (
        "the first tokens don't wait for a whole chunk"
    )
    engines.cancel(slots[2])
    assert engines.free == 1 and engines.add_many(PROMPTS[2:3], samplings[2:3]) == slots[2:3]
    made = {slot: solo[i][:1] if i != 2 else [] for i, slot in enumerate(slots)}
    while engines.free < 4:
        for slot, (tokens, _) in engines.step(7).items():
            made[slot] += ids(tokens)
    assert [made[slot] for slot in slots] == solo and engines.step() == {}


def test_engines_add_all_rows_or_none():
    config, params, _ = golden()
    engines = Engines(params, config, 4, 64, sides=2)
    for prompts, message in (
        ([[1]] * 5, "5 rows do not fit into 4 free slots"),
        ([[1], [1] * 64], "leaves no room"),
        ([[1], []], "no tokens"),
    ):
        with pytest.raises(UserError, match=message):
            engines.add_many(prompts, [Sampling(4)] * len(prompts))
        assert engines.free == 4
    with pytest.raises(UserError, match="5 slots can't be split evenly between 2 engines"):
        Engines(params, config, 5, 64, sides=2)


def test_what_fails_in_one_engine_is_raised():
    config, params, tokenizer = golden()
    engines = Engines(params, config, 4, 64, sides=2)
    engines.add_many([[1]] * 4, [Sampling(4)] * 4)
    engines.parts[1].caches = None
    with pytest.raises(TypeError):
        engines.step()


def test_only_small_models_on_a_cpu_with_cores_to_spare_are_split(monkeypatch):
    config, params, _ = golden()
    count = lambda slots: len(Engines(params, config, slots, 16).parts)
    monkeypatch.setattr(engine_module.os, "cpu_count", lambda: 8)
    assert [count(slots) for slots in (1, 2, 3, 4, 5, 6, 32)] == [1, 1, 1, 2, 1, 2, 2]
    for owner, name, value in (
        (engine_module.os, "cpu_count", lambda: 1),
        (engine_module.jax, "default_backend", lambda: "gpu"),
        (engine_module, "SMALL", 1000),
    ):
        with monkeypatch.context() as other:
            other.setattr(owner, name, value)
            assert count(8) == 1


def test_no_setting_recompiles():
    config, params, tokenizer = golden()
    generate(params, config, PROMPTS, Sampling(4))
    sizes = lambda: [
        f._cache_size()
        for f in (decode_module.decode, decode_module.prefill, decode_module.set_rows)
    ]
    before = sizes()
    for settings in (
        dict(temperature=0),
        dict(temperature=0.3, top_k=7),
        dict(top_p=0.5, min_p=0.1),
        dict(seed=9, stop=(3, 4, 5)),
        dict(repetition_penalty=1.3, stop_strings=("x", "yz")),
    ):
        generate(params, config, PROMPTS, Sampling(4, **settings), tokenizer)
    # nor does another length in the same bucket
    generate(params, config, [p + [60] for p in PROMPTS], greedy(3))
    assert sizes() == before


# ---- the cache -----------------------------------------------------------------------------------

TINY = Config(
    vocab_size=90,
    sequence_len=256,
    n_layer=3,
    n_embd=32,
    n_head=4,
    n_kv_head=2,
    head_dim=8,
    mlp_dim=32,
    window_pattern="SL",
    microbatch=1,
    total_batch_size=256,
)


@functools.cache
def tiny_params():
    leaves, tree = jax.tree.flatten(init_params(0, TINY))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [a + 0.1 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)]
    )


def test_ragged_prefill_and_decoding_equal_full_logits_at_every_position():
    """Rows of different lengths, prefilled in pieces longer and shorter than the ring of 144 slots,
    then token by token.
    """
    assert {a.shape[1] for a in model.init_cache(TINY, 1, 9999).k} == {144, 272}
    x = np.random.default_rng(0).integers(0, 90, (3, 250)).astype(np.int32)
    forward = jax.jit(model.forward, static_argnums=1)
    full, _ = forward(tiny_params(), TINY, x)
    cache, at = model.init_cache(TINY, 3, 9999), np.zeros(3, int)
    for sizes in (
        (200, 3, 60),
        (16, 16, 0),
        (1, 16, 7),
        *[(1, 1, 1)] * 3,
        *[(1, 0, 1)] * 3,
        (16, 16, 16),
        (5, 0, 16),
    ):
        width = {200: 200}.get(max(sizes), 16 if max(sizes) > 1 else 1)
        tokens = np.full((3, width), -1, np.int32)
        for row, n in enumerate(sizes):
            tokens[row, :n] = x[row, at[row] : at[row] + n]
        logits, cache = forward(tiny_params(), TINY, tokens, cache)
        for row, n in enumerate(sizes):
            np.testing.assert_allclose(logits[row, :n], full[row, at[row] : at[row] + n], atol=5e-5)
        at += sizes
        np.testing.assert_array_equal(cache.length, at)


def test_decoding_copies_no_cache_per_step():
    """XLA must update every ring in place: no copy of a cache-sized array inside the loop."""
    for slots in (1, 3):
        engine = Engine(tiny_params(), TINY, slots, 512)
        shapes = {f"f32[{','.join(map(str, a.shape))}]" for a in engine.caches[0].k}
        text = (
            decode_module.decode.lower(
                engine.params[0],
                TINY,
                engine.caches[0],
                engine.rows,
                np.full((slots, 8), -1, np.int32),
                8,
                pause=-1,
            )
            .compile()
            .as_text()
        )
        assert all(shape in text for shape in shapes)
        assert [
            line
            for line in text.splitlines()
            if " copy(" in line and any(shape in line for shape in shapes)
        ] == []


def test_long_prompts_and_equal_prompts_are_prefilled_as_one():
    """240 tokens take two passes of PREFILL and overrun the short rings; four equal prompts are
    prefilled once.
    """
    prompt = np.random.default_rng(1).integers(0, 90, 240).tolist()
    engine, calls = Engine(tiny_params(), TINY, 4, 256), []
    fill = engine._fill
    engine._fill = lambda slots, prompts: calls.append(len(prompts)) or fill(slots, prompts)
    engine.add_many([prompt] * 4, [Sampling(16, temperature=0)] * 4)
    rows, _ = drain(engine)
    assert calls == [1] and len({tuple(ids(t)) for t in rows.values()}) == 1
    logits, _ = jax.jit(model.forward, static_argnums=1)(
        tiny_params(), TINY, np.array([prompt + ids(rows[0])])
    )
    assert logits[0, 239:-1].argmax(-1).tolist() == ids(rows[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_ready_for_decoding_are_not_copied(dtype):
    config = TINY.replace(compute_dtype=dtype)
    for params in (tiny_params(), model.quantized(tiny_params(), config)):
        ready = model.decoding_params(params, config)
        assert model.decoding_params(ready, config) is ready
        assert {a.dtype.name for a in jax.tree.leaves(ready) if a.ndim > 1} <= {dtype, "int8"}


def test_outputs_first_say_the_same_and_are_for_gpus(monkeypatch):
    # said, for what auto is depends on the device
    config = TINY.replace(compute_dtype="float32")
    prompts = np.random.default_rng(0).integers(0, 90, (2, 12)).tolist()
    plain = model.decoding_params(tiny_params(), config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    turned = model.decoding_params(tiny_params(), config)
    assert set(turned["blocks"][0]["wo"]) == {"by_output"}
    # from any form, and what is turned already is not turned back
    again = model.decoding_params(turned, config)
    assert all(a is b for a, b in zip(jax.tree.leaves(turned), jax.tree.leaves(again)))
    # int8 has its outputs first anyway
    small = model.decoding_params(model.quantized(tiny_params(), config), config)
    assert set(small["blocks"][0]["wo"]) == {"int8", "scale"}

    # several tokens at once, and one after the other
    forward = jax.jit(model.forward, static_argnums=1)
    exact, _ = forward(plain, config, np.array(prompts))
    close, _ = forward(turned, config, np.array(prompts))
    np.testing.assert_allclose(close, exact, atol=2e-5)
    written = generate(turned, config, prompts, greedy(4))
    read = np.array([prompt + new for prompt, new in zip(prompts, written)])
    exact, _ = forward(plain, config, read)
    assert exact[:, 11:-1].argmax(-1).tolist() == written


def test_int8_weights_stay_close_and_decode():
    x = np.random.default_rng(0).integers(0, 90, (2, 64)).astype(np.int32)
    small = jax.jit(model.quantized, static_argnums=1)(tiny_params(), TINY)
    exact, _ = model.forward(tiny_params(), TINY, x)
    rough, _ = model.forward(small, TINY, x)
    assert 1e-4 < np.linalg.norm(rough - exact) / np.linalg.norm(exact) < 0.05
    held = lambda p: sum(a.nbytes for a in jax.tree.leaves([p["blocks"], p["head"]]))
    assert held(small) < 0.35 * held(tiny_params())
    losses = model.token_losses(small, TINY, x, x), model.token_losses(tiny_params(), TINY, x, x)
    assert abs(float(losses[0].mean() - losses[1].mean())) < 0.05
    assert generate(small, TINY, [x[0, :9].tolist()], greedy(2))[0][0] == int(rough[0, 8].argmax())


# ---- sampling ------------------------------------------------------------------------------------


def sample(logits_BV, seen=None, **settings):
    """`sampling.sample` with the same settings in every row, each with its own seed."""
    B, V = logits_BV.shape
    row = sampling.new_row([0], Sampling(1, **settings), V) | dict(
        seen=np.zeros(V, bool) if seen is None else seen
    )
    rows = {name: jnp.broadcast_to(value, (B, *np.shape(value))) for name, value in row.items()}
    return np.asarray(
        jax.jit(sampling.sample)(logits_BV, rows | dict(seed=jnp.arange(B, dtype=jnp.uint32)))
    )


SETS = [
    (dict(), {0, 1, 2, 3}),
    (dict(top_k=2), {0, 1}),
    (dict(top_p=0.6), {0, 1}),
    (dict(top_p=0.1), {0}),
    (dict(top_k=1), {0}),
    (dict(top_k=99), {0, 1, 2, 3}),
    (dict(top_k=3, top_p=0.95), {0, 1, 2}),
    (dict(min_p=0.25), {0, 1, 2}),
    (dict(min_p=0.5), {0, 1}),
    (dict(top_k=2, top_p=0.62), {0}),
    (dict(top_p=0.6, min_p=0.7), {0}),
]


@pytest.mark.parametrize("settings,allowed", SETS, ids=str)
def test_sampling_draws_from_the_right_set_in_the_right_shares(settings, allowed):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    shares = np.bincount(sample(jnp.log(jnp.tile(p, (4000, 1))), **settings), minlength=4) / 4000
    want = np.where([i in allowed for i in range(4)], p, 0)
    np.testing.assert_allclose(shares, want / want.sum(), atol=0.03)
    assert set(np.flatnonzero(shares)) == allowed


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    shares = (
        np.bincount(sample(jnp.log(jnp.tile(p, (4000, 1))), temperature=temperature), minlength=4)
        / 4000
    )
    np.testing.assert_allclose(
        shares, p ** (1 / temperature) / (p ** (1 / temperature)).sum(), atol=0.03
    )


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits, seen = jnp.array([[2.0, 1.5, -1.0, -1.5]]), np.array([True, False, False, False])
    greedy = functools.partial(sample, temperature=0, repetition_penalty=1.4)
    assert sample(logits, seen, temperature=0) == [0]
    assert greedy(logits, seen) == [1]
    # a likelier one below 0 falls behind too: divided it would stay in front
    assert greedy(jnp.array([[-1.0, -1.2]]), np.array([True, False])) == [1]


def test_filters_agree_with_sorting_on_random_logits():
    """The bisection against the textbook's sort, row by row with settings of their own."""
    rng = np.random.default_rng(0)
    B, V = 64, 300
    logits = rng.normal(size=(B, V)).astype(np.float32) * 3
    k, top_p, min_p = (
        rng.integers(0, 40, B),
        rng.uniform(0.2, 1, B),
        rng.uniform(0, 0.2, B) * (rng.random(B) < 0.5),
    )
    rows = dict(
        top_k=k.astype(np.int32), top_p=top_p.astype(np.float32), min_p=min_p.astype(np.float32)
    )
    kept = np.isfinite(jax.jit(sampling.filtered)(logits, rows))
    for b in range(B):
        order = np.argsort(-logits[b])[: k[b] or V]
        p = np.exp(logits[b, order].astype(np.float64))
        p /= p.sum()
        order = order[(np.cumsum(p) - p < top_p[b]) & (p >= min_p[b] * p[0])]
        assert set(order) == set(np.flatnonzero(kept[b])), (k[b], top_p[b], min_p[b])


def test_logprobs_are_the_models_own():
    config, params, _ = golden()
    engine = Engine(params, config, 2, 64)
    plain, asked = (
        Sampling(6, temperature=0.7, top_k=3, seed=1),
        Sampling(6, temperature=0.7, top_k=3, seed=1, logprobs=4),
    )
    engine.add_many([PROMPTS[1]] * 2, [plain, asked])
    (a, b), _ = drain(engine)[0].values(), None
    logits, _ = model.forward(params, config, np.array([PROMPTS[1] + ids(b)]))
    want = np.asarray(jax.nn.log_softmax(logits[0, len(PROMPTS[1]) - 1 : -1]))
    for i, (x, y) in enumerate(zip(a, b)):
        assert (
            x.id == y.id
            and x.top == []
            and x.logprob == y.logprob == pytest.approx(float(want[i, y.id]), abs=1e-4)
        )
        assert [t for t, _ in y.top] == np.argsort(-want[i])[:4].tolist()
        np.testing.assert_allclose([p for _, p in y.top], np.sort(want[i])[::-1][:4], atol=1e-4)


# ---- where a row ends ----------------------------------------------------------------------------


def test_stops_at_a_token_and_streams_what_generate_returns():
    config, params, _ = golden()
    prompt, count = [491, 275, 327], WHOLE_CHUNK + 5  # more than one dispatch
    free = generate(params, config, [prompt], greedy(count))[0]
    assert len(free) == count
    stop = free[12]
    cut = generate(params, config, [prompt], greedy(count, stop=(stop,)))[0]
    assert cut == free[: free.index(stop)]
    many = (*range(480, 491), stop)  # more than the device is told of
    assert generate(params, config, [prompt], greedy(count, stop=many))[0] == cut
    streamed = list(stream(params, config, [prompt], greedy(count)))
    assert (
        len(streamed[0][0]) == 1
        and len(streamed) > 2
        and sum((rows[0] for rows in streamed), []) == free
    )


@pytest.mark.parametrize(
    "where", ["first token", "inside", "across", "late", "never", "two", "two in one token"]
)
def test_stop_strings_are_found_wherever_they_cross_tokens(where):
    config, params, tokenizer = golden()
    prompt = load("generation_T.json")["greedy"][0]["prompt_ids"]
    free = generate(params, config, [prompt], greedy(30))[0]
    text = tokenizer.decode(free)
    pieces = [tokenizer.decode([t]) for t in free]
    stops = {
        "first token": (text[0],),
        "inside": (max(pieces, key=len)[1:3],),
        "across": (pieces[2][-1] + pieces[3] + pieces[4][:1],),
        "late": (text[-4:],),
        "never": ("\0no",),
        "two": (text[20:24], text[9:12]),
        "two in one token": (max(pieces, key=len)[2:4], max(pieces, key=len)[1:3]),
    }[where]
    want = text[: min((text.find(s) for s in stops if s in text), default=len(text))]
    settings = greedy(30, stop_strings=stops)
    got = generate(params, config, [prompt], settings, tokenizer)[0]
    assert tokenizer.decode(got) == want
    held = stream(params, config, [prompt], settings, tokenizer)
    written = ""
    for rows in held:
        written += tokenizer.decode(rows[0])
        assert want.startswith(written), "nothing of a stop string is ever let out"
    assert written == want


def test_a_full_slot_ends_as_length():
    config, params, _ = golden()
    engine = Engine(params, config, 1, 16)
    engine.add(PROMPTS[1], Sampling(500, temperature=0))
    rows, why = drain(engine)
    assert len(rows[0]) == 16 - len(PROMPTS[1]) and why == {0: "length"}


BAD = {
    "empty prompt": (dict(prompts=[[]]), "no tokens"),
    "foreign token": (dict(prompts=[[500]]), "outside the model's vocabulary"),
    "no room": (dict(max_tokens=0), "max_tokens must be from 1"),
    "temperature": (dict(temperature=-1), "temperature must be from 0"),
    "top_p": (dict(top_p=-0.1), "top_p must be from 0 to 1"),
    "not a number": (dict(temperature=float("nan")), "temperature"),
    "min_p": (dict(min_p=2), "min_p"),
    "penalty": (dict(repetition_penalty=0), "repetition_penalty"),
    "stop string": (dict(stop_strings=("",)), "stop string is empty"),
    "no tokenizer": (dict(stop_strings=("a",)), "need the tokenizer"),
    "tool": (dict(tool=calculator), "need the tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_get_one_sentence(case):
    config, params, _ = golden()
    given, sentence = dict(BAD[case][0]), BAD[case][1]
    with pytest.raises(UserError, match=sentence):
        prompts, tool = given.pop("prompts", [[1]]), given.pop("tool", None)
        generate(params, config, prompts, Sampling(**dict(max_tokens=4) | given), tool=tool)


def test_a_full_engine_and_a_long_prompt_are_refused():
    config, params, _ = golden()
    engine = Engine(params, config, 1, 16)
    with pytest.raises(UserError, match="leaves no room"):
        engine.add([1] * 16, Sampling(1))
    engine.add([1], Sampling(9))
    with pytest.raises(UserError, match="do not fit into 0 free slots"):
        engine.add([1], Sampling(1))


def test_answers_to_one_prompt_leave_the_others_their_caches():
    config, params, _ = golden()
    engine = Engine(params, config, 4, 64)
    early = engine.add_many([PROMPTS[2], PROMPTS[0]], [greedy(12)] * 2)
    before = {slot: tokens for slot, (tokens, _) in engine.step(4).items()}
    late = engine.add_many([PROMPTS[1]] * 2, [greedy(6)] * 2)
    rows, _ = drain(engine, before)
    for slot, prompt in zip(early, (PROMPTS[2], PROMPTS[0])):
        assert ids(rows[slot]) == alone(prompt, greedy(12))
    for slot in late:
        assert ids(rows[slot]) == alone(PROMPTS[1], greedy(6))
