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
from lib.generate import Engine, Sampling, generate, sampling, speculative, stream
from lib.generate.decode import empty_chunk
from lib.generate.speculative import State, Verified, accept, look_up
from lib.model.cache import Cache
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


# ---- a round by hand -----------------------------------------------------------------------------


def test_drafts_are_looked_up_behind_the_longest_then_latest_match():
    text = jnp.array([[1, 2, 3, 4, 9, 2, 3, 5, 8, 3, 6, 1, 2, 0, 0, 0]])
    drafts = lambda length, newest, count=2: look_up(
        text, jnp.array([length]), jnp.array([newest]), count
    )[0].tolist()
    # behind 1 2 3 at the front, though 3 stands later; behind 9 2 the next; behind 3 the last
    assert drafts(13, 3) == [4, 9]
    assert look_up(text.at[0, 11].set(9), jnp.array([13]), jnp.array([3]), 3)[0].tolist() == [
        5,
        8,
        3,
    ]
    assert look_up(text.at[0, 12].set(7), jnp.array([13]), jnp.array([3]), 1)[0].tolist() == [6]
    # one that stands nowhere but at the end, and what stands beyond the text, count for nothing
    assert drafts(2, 3) == drafts(0, 9) == [2, 3]
    # at the end of the history there is nothing more, and still they are tokens
    full = jnp.array([[7, 7, 7, 5, 5]])
    assert look_up(full, jnp.array([4]), jnp.array([5]), 4)[0].tolist() == [5, 5, 5, 5]
    # a match of two cannot begin before the text
    edge = jnp.array([[4, 1, 4, 6, 8, 8, 6]])
    assert look_up(edge, jnp.array([6]), jnp.array([4]), 1)[0].tolist() == [6]


def round_of(kept=(2, 0, 3), forced=None):
    """A state of three rows, the choices of a round, what a tool forces, and how many stand."""
    row = sampling.new_row([0], Sampling(5, stop=(8,)), 10)
    rows = {name: jnp.stack([jnp.asarray(value)] * 3) for name, value in row.items()}
    rows["history"] = jnp.zeros((3, 8), jnp.int32)
    rows["alive"] = jnp.array([True, False, True])
    cache = Cache(None, None, jnp.array([1, 4, 5]), jnp.array([7, 7, 7]))
    state = State(jnp.array([0, 0, 2]), None, [cache], rows, empty_chunk(3, 5))
    choices = jnp.array([[3, 4, 5], [1, 1, 1], [6, 7, 8]])
    forced = jnp.full((3, 3), -1) if forced is None else jnp.array(forced)
    return state, choices, forced, jnp.array(kept)


def commit(state, choices, forced, kept):
    newest = jnp.array([4, 1, 8])
    return speculative.commit_rows(state, choices, forced, kept, newest)


def test_rows_after_a_round_are_as_if_one_by_one():
    state, choices, forced, kept = round_of()
    rows = commit(state, choices, forced, kept)
    assert rows["made"].tolist() == [2, 0, 3] and rows["left"].tolist() == [3, 5, 2]
    assert rows["token"].tolist() == [4, 0, 8]
    assert rows["alive"].tolist() == [True, False, False], "the last one is a stop"
    seen = [np.flatnonzero(seen).tolist() for seen in rows["seen"]]
    assert seen == [[0, 3, 4], [0], [0, 6, 7, 8]]
    # behind what was there and the token that was fed
    history = rows["history"].tolist()
    assert history == [[0, 0, 3, 4, 0, 0, 0, 0], [0] * 8, [0] * 6 + [6, 7]]
    # one that a tool has said stops nothing, whichever id it has
    for id in (8, 0):
        state, choices, forced, kept = round_of(forced=[[-1] * 3, [-1] * 3, [-1, -1, id]])
        assert commit(state, choices, forced, kept)["alive"].tolist() == [True, False, True]


def test_a_chunk_after_a_round_by_hand():
    state, choices, _, kept = round_of()
    logits = jnp.broadcast_to(jnp.log(jnp.arange(1, 11) / 55.0), (3, 3, 10)) + 1.0
    verified = Verified(choices, logits, None)
    active = jnp.array([True, False, True])
    state.rows["top"] = jnp.array([False, True, False])
    chunk = speculative.commit_chunk(state, verified, kept, active)
    assert chunk.id.tolist() == [[3, 4, -1, -1, -1], [-1] * 5, [-1, -1, 6, 7, 8]]
    shares = np.array([4, 5, 7, 8, 9]) / 55.0
    written = np.asarray(chunk.logprob)[chunk.id >= 0]
    np.testing.assert_allclose(written, np.log(shares), rtol=1e-5)
    assert not np.asarray(chunk.logprob)[chunk.id < 0].any()
    # nobody who writes has asked for alternatives
    assert not np.asarray(chunk.top_id).any()
    # two drafts for each of two rows, of which one and two were right
    assert (int(chunk.drafted), int(chunk.accepted)) == (4, 3)
    state.rows["top"] = jnp.array([False, True, True])
    chunk = speculative.commit_chunk(state, verified, kept, active)
    assert chunk.top_id[2, 2:, 0].tolist() == [9, 9, 9]
    np.testing.assert_allclose(chunk.top_logprob[2, 2, :2], np.log([10 / 55, 9 / 55]), rtol=1e-5)


def test_what_was_read_in_vain_is_forgotten_by_hand():
    state, choices, _, kept = round_of()
    before = state.caches[0]
    after = before._replace(length=before.length + 3, last=jnp.array([1, 1, 1]))
    cut = speculative.cut_back(after, before, choices, kept)
    assert cut.length.tolist() == [3, 4, 8] and cut.last.tolist() == [4, 7, 8]


def test_what_a_tool_forces_is_drafted():
    state, *_ = round_of()
    state.rows["history"] = jnp.array([[3, 1, 2, 3, 0, 0, 0, 0]] * 3)
    state.rows["token"] = jnp.array([3, 3, 3])
    cache = state.caches[0]._replace(length=jnp.array([3, 3, 3]))
    state = state._replace(caches=[cache])
    forced = jnp.array([[-1, -1, -1], [0, -1, 5], [-1, 9, 9]])
    drafts, caches = speculative.propose(None, [None], state, None, forced)
    assert drafts.tolist() == [[1, 2], [0, 2], [1, 9]] and caches == []
