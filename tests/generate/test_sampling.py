"""Noise is new for every token, penalties fall on the right side, sets are cut after tempering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import model
from lib.files import UserError
from lib.generate import Engine, Sampling, generate, sampling, stream
from lib.generate.decode import set_rows
from tests.helpers.engines import PROMPTS, drain, golden, greedy, ids, scripted


def draw(logits_BV, seen=None, **settings):
    """`sampling.sample` with the same settings in every row, each with its own seed."""
    B, V = logits_BV.shape
    row = sampling.new_row([0], Sampling(1, **settings), V)
    row["seen"] = np.zeros(V, bool) if seen is None else np.array(seen)
    rows = {name: jnp.broadcast_to(value, (B, *np.shape(value))) for name, value in row.items()}
    rows["seed"] = jnp.arange(B, dtype=jnp.uint32)
    return np.asarray(jax.jit(sampling.sample)(jnp.asarray(logits_BV), rows))


@pytest.fixture
def indifferent(monkeypatch):
    """The golden model with logits that are all zero: every token is drawn by noise alone."""
    config, params, _ = golden()

    def forward(params, config, tokens_BT, cache):
        length = cache.length + (tokens_BT >= 0).sum(1)
        return jnp.zeros((*tokens_BT.shape, config.vocab_size)), cache._replace(length=length)

    monkeypatch.setattr(model, "forward", forward)
    # traced anew, whatever other tests have compiled
    return config.replace(seed=config.seed + 1), params


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculate", [0, 3])
def test_every_token_of_a_row_has_noise_of_its_own(indifferent, speculate):
    """200 tokens out of 500 equally likely ones: about 165 distinct."""
    config, params = indifferent
    settings = Sampling(200, seed=1)
    [text] = generate(params, config, [[491]], settings, speculate=speculate)
    V, n = config.vocab_size, len(text)
    distinct = V * (1 - (1 - 1 / V) ** n)
    assert abs(len(set(text)) - distinct) < 4 * np.sqrt(distinct * (1 - distinct / V))
    # a token equals the one before it once in V
    repeats = sum(a == b for a, b in zip(text, text[1:]))
    assert repeats <= n / V + 4 * np.sqrt(n / V)


def test_rows_of_one_prompt_and_neighbouring_seeds_share_no_noise(indifferent):
    config, params = indifferent
    rows = generate(params, config, [[491]] * 4, Sampling(50, seed=7))
    others = generate(params, config, [[491]] * 4, Sampling(50, seed=8))
    assert others[:3] == rows[1:], "row b draws from seed + b"
    # the higher bits of a seed count, too
    for bit in (8, 31):
        rows += generate(params, config, [[491]] * 4, Sampling(50, seed=7 + (1 << bit)))[:1]
    for a in range(len(rows)):
        for b in range(a):
            equal = sum(x == y for x, y in zip(rows[a], rows[b]))
            assert equal <= 3, "independent rows agree at 0.1 of 50 places"


# ---- what a step changes -------------------------------------------------------------------------


def test_a_step_changes_the_rows_that_took_a_token_and_no_others():
    """One row takes its last two tokens, one waits for its tool, one has ended."""
    rows = sampling.empty_rows(3, 5)
    rows |= dict(alive=jnp.array([True, True, False]), left=jnp.array([2, 2, 0]))
    token, took = jnp.array([4, 4, 4]), jnp.array([True, False, False])
    for made, alive in ((1, [True, True, False]), (2, [False, True, False])):
        rows = sampling.step_rows(rows, token, took, took)
        assert rows["made"].tolist() == [made, 0, 0]
        assert rows["left"].tolist() == [2 - made, 2, 0]
        assert rows["token"].tolist() == [4, 0, 0]
        assert rows["seen"].sum(1).tolist() == [1, 0, 0]
        assert rows["alive"].tolist() == alive


def test_a_row_that_is_not_there_is_not_written():
    """Groups are filled up with rows that do not exist, lest each size be compiled anew."""
    rows = dict(left=jnp.array([1, 2]))
    new = dict(left=jnp.array([5, 7, 9]))
    assert set_rows(rows, jnp.array([0, 2, 9]), new)["left"].tolist() == [5, 2]


# ---- the repetition penalty ----------------------------------------------------------------------


def test_the_penalty_makes_negative_logits_more_negative():
    seen = [True, False]
    logits = jnp.array([[-1.0, -1.1]])
    assert draw(logits, seen, temperature=0) == [0]
    assert draw(logits, seen, temperature=0, repetition_penalty=2.0) == [1]
    assert draw(-logits, seen[::-1], temperature=0, repetition_penalty=2.0) == [0]
    # one between 0 and 1 is made smaller, too
    assert draw(0.5 * -logits, seen[::-1], temperature=0, repetition_penalty=2.0) == [0]


def test_the_penalty_knows_the_prompt(monkeypatch):
    favourite = 70
    engine = scripted(monkeypatch, [[favourite] * 3])
    engine.tool, engine.pause = None, -1
    engine.add([491, favourite, 71], greedy(1))
    assert ids(drain(engine)[0][0]) == [favourite]
    # and where another comes near, the favourite gives way
    row = sampling.new_row([491, favourite, 71], greedy(1, repetition_penalty=3.0), 500)
    assert row["seen"].sum() == 3 and row["seen"][[491, favourite, 71]].all()
    logits = np.zeros((1, 500), np.float32)
    logits[0, favourite], logits[0, 72] = 9.0, 4.0
    assert draw(logits, row["seen"], temperature=0, repetition_penalty=3.0) == [72]


@pytest.mark.parametrize("kind", ["look-up", "itself"])
def test_the_penalty_counts_tokens_that_were_drafted_in_the_same_round(kind):
    """A penalty so high that nothing is said twice: with drafts the text must be the same."""
    config, params, _ = golden()
    settings = greedy(40, repetition_penalty=50.0)
    plain = generate(params, config, PROMPTS, settings)
    draft = (params, config) if kind == "itself" else None
    assert generate(params, config, PROMPTS, settings, speculate=4, draft=draft) == plain
    for prompt, text in zip(PROMPTS, plain):
        assert len(set(text)) > 30 and not set(text[:10]) & set(prompt)


# ---- sets and temperature ------------------------------------------------------------------------

P = np.array([0.5, 0.3, 0.15, 0.05])
CUT = [
    # at half the temperature the shares are 0.685, 0.247, 0.062, 0.007
    (dict(temperature=0.5, top_p=0.6), {0}),
    (dict(temperature=2.0, top_p=0.0), {0}),
    (dict(temperature=0.5, top_p=0.9), {0, 1}),
    (dict(temperature=0.5, min_p=0.25), {0, 1}),
    (dict(temperature=0.5, min_p=0.5), {0}),
    # at twice the temperature 0.379, 0.294, 0.208, 0.120
    (dict(temperature=2.0, top_p=0.6), {0, 1}),
    (dict(temperature=2.0, top_p=0.7), {0, 1, 2}),
    (dict(temperature=2.0, min_p=0.5), {0, 1, 2}),
    (dict(temperature=2.0, min_p=0.6), {0, 1}),
]


@pytest.mark.parametrize("settings,allowed", CUT, ids=str)
def test_sets_are_cut_after_the_temperature(settings, allowed):
    drawn = draw(jnp.log(jnp.tile(P, (1500, 1))), **settings)
    assert set(drawn.tolist()) == allowed


# ---- stops ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("speculate", [0, 3])
def test_a_forced_token_that_is_a_stop_does_not_end_the_row(monkeypatch, count, speculate):
    tokenizer = golden()[2]
    special = tokenizer.special
    call = [special["<|python_start|>"], 50, special["<|python_end|>"]]
    engine = scripted(monkeypatch, [call + [65] * 10 + [speculate + 1]])
    if speculate:
        engine = speculating(monkeypatch, engine, speculate)
    engine.tool = lambda text: "7"
    seven = tokenizer.encode("7")
    engine.add([491, 70, 71], greedy(20, stop=tuple(seven)))
    rows, why = drain(engine, count=count)
    assert [t.id for t in rows[0] if t.forced][1:-1] == seven
    assert len(rows[0]) == 20 and why[0] == "length"


def speculating(monkeypatch, engine, speculate):
    """A scripted engine again, drafting ahead; the script's forward takes single tokens."""
    one = model.forward

    def forward(params, config, tokens_BT, cache):
        logits = []
        for t in range(tokens_BT.shape[1]):
            out, cache = one(params, config, tokens_BT[:, t : t + 1], cache)
            logits.append(out)
        return jnp.concatenate(logits, axis=1), cache

    monkeypatch.setattr(model, "forward", forward)
    tokenizer, tool = engine.tokenizer, engine.tool
    return Engine(engine.params[0], engine.config, 1, 64, tokenizer, tool, speculate=speculate)


@pytest.mark.parametrize("speculate", [0, 4])
def test_the_stop_token_can_be_kept_with_its_logprob(speculate):
    config, params, tokenizer = golden()
    prompt = [491, 275, 327]
    [free] = generate(params, config, [prompt], greedy(20))
    stop = free[12]
    place = free.index(stop)
    # what stands before it is held back, as the beginning of a text that would end the row too
    never = tokenizer.decode([free[place - 1]]) + "\0never"
    settings = greedy(20, stop=(stop,), keep_stop=True, stop_strings=(never,))
    engine = Engine(params, config, 1, 64, tokenizer, speculate=speculate)
    engine.add(prompt, settings)
    rows, why = drain(engine)
    assert ids(rows[0]) == free[: place + 1] and why == {0: "stop"}
    logits, _ = model.forward(params, config, np.array([prompt + free[:place]]))
    want = jax.nn.log_softmax(logits[0, -1])[stop]
    assert rows[0][-1].logprob == pytest.approx(float(want), abs=1e-4)
    [cut] = generate(params, config, [prompt], greedy(20, stop=(stop,)))
    assert cut == free[:place], "not kept unless asked for"


# ---- a model that computes no numbers ------------------------------------------------------------


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("part", ["head", "embed"])
def test_a_model_of_nan_says_so(part, speculate):
    config, params, _ = golden()
    broken = params | {part: params[part].at[3].set(jnp.nan)}
    if part == "embed":
        broken[part] = jnp.full_like(params[part], jnp.nan)
    for write in (generate, lambda *args, **options: list(stream(*args, **options))):
        with pytest.raises(UserError, match="computes no numbers .NaN"):
            write(broken, config, [[491]], Sampling(4), speculate=speculate)


@pytest.mark.parametrize("alternatives", [0, 1, 2])
def test_a_row_asks_for_as_many_alternatives_as_it_wants(alternatives):
    row = sampling.new_row([1], Sampling(4, logprobs=alternatives), 9)
    assert row["top"] == (alternatives > 0)
