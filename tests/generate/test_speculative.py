"""Drafting ahead changes nothing in what is written: greedy and sampled, by draft model and by
look-up, in ragged batches.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.generate import Engine, Sampling, generate, stream
from lib.generate.speculative import State, accept, look_up
from tests.helpers.engines import PROMPTS, drain, ids, scripted
from tests.helpers.golden import PARITY, load, parity_model


@functools.cache
def golden():
    """The trained model, and a poor draft of it: its weights disturbed."""
    config, params = parity_model("T")
    noise = lambda a, k: a + 0.1 * a.std() * jax.random.normal(k, a.shape)
    leaves, tree = jax.tree.flatten(params)
    draft = jax.tree.unflatten(
        tree,
        [noise(a, k) for a, k in zip(leaves, jax.random.split(jax.random.key(0), len(leaves)))],
    )
    return config, params, draft


SETTINGS = [
    Sampling(50, temperature=0, logprobs=2),
    Sampling(33, temperature=1.0, seed=3),
    Sampling(50, temperature=0.8, top_k=20, top_p=0.9),
    Sampling(20, temperature=1.1, repetition_penalty=1.2, stop=(10, 32)),
]


@functools.cache
def written(kind):
    """What an engine writes after PROMPTS, and the share of its drafts that were accepted."""
    config, params, draft = golden()
    options = {
        "plain": {},
        "look-up": dict(speculate=4),
        "draft": dict(speculate=3, draft=(draft, config)),
        "itself": dict(speculate=3, draft=(params, config)),
    }[kind]
    engine = Engine(params, config, 4, 128, **options)
    engine.add_many(PROMPTS, SETTINGS)
    rows, why = drain(engine)
    return rows, why, engine.accepted / max(engine.drafted, 1)


@pytest.mark.parametrize("kind", ["look-up", "draft", "itself"])
def test_the_text_is_that_of_plain_decoding_at_any_setting(kind):
    rows, why, _ = written("plain")
    new, ends, share = written(kind)
    assert {s: ids(t) for s, t in new.items()} == {
        s: ids(t) for s, t in rows.items()
    } and ends == why
    for slot in rows:
        np.testing.assert_allclose(
            [t.logprob for t in new[slot]], [t.logprob for t in rows[slot]], atol=1e-4
        )
    assert [[i for i, _ in t.top] for t in new[0]] == [[i for i, _ in t.top] for t in rows[0]]
    # of its own drafts all are right, but for those behind an end
    least, most = (0.9, 1.0) if kind == "itself" else (0.01, 0.99)
    assert least < share <= most


@pytest.mark.slow
def test_the_distribution_is_unchanged():
    """4,000 continuations of two tokens with a poor draft, against the model's own probabilities:
    chi-square over the likely pairs.
    """
    config, params, draft = golden()
    n, prompt = 500, PROMPTS[1]
    engine, counts = Engine(params, config, n, 16, speculate=1, draft=(draft, config)), {}
    for seed in range(0, 8 * n, n):
        engine.add_many([prompt] * n, [Sampling(2, seed=seed + i, top_k=3) for i in range(n)])
        for tokens in drain(engine)[0].values():
            counts[tuple(ids(tokens))] = counts.get(tuple(ids(tokens)), 0) + 1
    from lib import model

    forward = jax.jit(model.forward, static_argnums=1)

    def top(tokens):
        logits = np.asarray(forward(params, config, np.array([tokens]))[0][0, -1], np.float64)
        best = np.argsort(-logits)[:3]
        p = np.exp(logits[best] - logits[best[0]])
        return dict(zip(best.tolist(), p / p.sum()))

    want = {(a, b): p * q for a, p in top(prompt).items() for b, q in top(prompt + [a]).items()}
    assert set(counts) <= set(want) and sum(counts.values()) == 8 * n
    likely = {pair: p * 8 * n for pair, p in want.items() if p * 8 * n >= 5}
    chi = sum((counts.get(pair, 0) - mean) ** 2 / mean for pair, mean in likely.items())
    assert chi < len(likely) + 4 * np.sqrt(2 * len(likely)), (chi, len(likely))
    assert 0.2 < engine.accepted / engine.drafted < 1


@pytest.mark.parametrize("case", [0, 2])
def test_tool_results_are_forced_through_drafts(case, monkeypatch):
    from lib import model
    from lib.generate import speculative

    trace = load("generation_T.json")["tool_traces"][case]
    engine, prompt = (
        scripted(monkeypatch, trace["scripted_greedy_ids_per_forward"]),
        trace["prompt_ids"],
    )
    one = model.forward

    def forward(params, config, tokens_BT, cache):  # the script's forward takes single tokens
        logits = []
        for t in range(tokens_BT.shape[1]):
            out, cache = one(params, config, tokens_BT[:, t : t + 1], cache)
            logits.append(out)
        return jnp.concatenate(logits, axis=1), cache

    monkeypatch.setattr(model, "forward", forward)
    tokenizer = Tokenizer.load(PARITY / "tokenizer.json")
    engine = Engine(
        *golden_like(engine),
        len(trace["generate_batch_rows"]),
        64,
        tokenizer,
        engine.tool,
        speculate=3,
    )
    stop = Sampling(
        trace["max_tokens"], temperature=0, stop=(tokenizer.special["<|assistant_end|>"],)
    )
    slots = engine.add_many([prompt] * engine.slots, [stop] * engine.slots)
    rows, _ = drain(engine)
    for row, slot in enumerate(slots):
        assert prompt + ids(rows[slot]) == trace["generate_batch_rows"][row]
        assert [0] * len(prompt) + [int(not t.forced) for t in rows[slot]] == trace[
            "generate_batch_masks"
        ][row]
    assert speculative.decode._cache_size() and engine.accepted > 0


def golden_like(engine):
    """(parameters, config) of a scripted engine, to build a speculating one from."""
    return engine.params[0], engine.config


def test_look_up_prefers_long_then_late_matches():
    history = jnp.array(
        [[1, 2, 3, 7, 9, 3, 8, 1, 2, 3, 0, 0], [5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0]]
    )
    got = look_up(history, jnp.array([9, 3]), jnp.array([3, 5]), 2)
    assert got[0].tolist() == [7, 9], "after 1 2 3, not after the later 9 3"
    assert got[1, 0] == 5


STANDS = [
    ([5, 6, 7, 8], {}, 4),
    ([5, 9, 7, 8], {}, 2),  # behind a wrong draft nothing stands, however right
    ([9, 6, 7, 8], {}, 1),
    ([5, 6, 7, 8], dict(stop=6), 2),
    ([5, 6, 7, 8], dict(stop=6, forced=6), 4),  # a tool's answer ends no row
    ([5, 6, 7, 8], dict(pause=7), 3),
    ([5, 6, 7, 8], dict(left=3), 3),
    ([5, 6, 7, 8], dict(room=2), 2),
]


@pytest.mark.parametrize("choices, settings, kept", STANDS, ids=str)
def test_what_stands_of_a_round_by_hand(choices, settings, kept):
    """The drafts are 5 6 7."""
    given = dict(stop=-1, forced=-1, pause=-1, left=9, room=9) | settings
    rows = dict(left=jnp.array([given["left"]]), stop=jnp.array([[given["stop"]]]))
    state = State(None, None, None, rows, None)
    drafts, choices = jnp.array([[5, 6, 7]]), jnp.array([choices])
    forced = jnp.array([[-1, given["forced"], -1, -1]])
    room = jnp.array([given["room"]])
    assert accept(state, drafts, choices, forced, given["pause"], room).tolist() == [kept]


@pytest.mark.slow
def test_generate_and_stream_speculate_too():
    config, params, draft = golden()
    greedy = Sampling(24, temperature=0)
    plain = generate(params, config, PROMPTS, greedy)
    assert plain == generate(params, config, PROMPTS, greedy, speculate=3)
    pieces = list(stream(params, config, PROMPTS[:1], greedy, speculate=3, draft=(draft, config)))
    assert [id for (new,) in pieces for id in new] == plain[0] and len(pieces) > 1


def test_bad_drafts_get_one_sentence():
    config, params, _ = golden()
    with pytest.raises(UserError, match="speculate >= 1"):
        Engine(params, config, 1, 16, draft=(params, config))
    with pytest.raises(UserError, match="vocabulary of 500"):
        Engine(params, config, 1, 16, speculate=2, draft=(params, config.replace(vocab_size=499)))
