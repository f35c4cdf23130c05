"""Greedy text is the reference's, sampling is reproducible and obeys its settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load, parity_model

from lib import generate, model
from lib.files import UserError


def test_greedy_tokens_match_the_reference_beyond_the_context():
    config, params = parity_model("A")
    io = load("model_A_io.safetensors")
    assert generate.generate(params, config, [io["gen_prompt"].tolist()], 32, temperature=0) == [io["gen_tokens"].tolist()]


def test_greedy_logits_match_the_reference():
    config, params = parity_model("A")
    io = load("model_A_io.safetensors")
    prompt = io["gen_prompt"]
    cache = model.init_cache(config, 1, 256)
    logits, cache = jax.jit(model.forward, static_argnums=1)(params, config, np.concatenate([prompt, io["gen_tokens"][:-1]])[None], cache)
    np.testing.assert_allclose(logits[0, len(prompt) - 1:], io["gen_logits"], atol=2e-4)


def test_trained_model_writes_the_references_text():
    config, params = parity_model("T")
    cases = load("generation_T.json")["greedy"]
    new = generate.generate(params, config, [c["prompt_ids"] for c in cases], 32, temperature=0)
    for got, case in zip(new, cases):
        n = min(len(got), len(case["stream_tokens"]))
        assert n and got[:n] == case["stream_tokens"][:n]


def test_a_row_does_not_depend_on_its_batch_and_seeds_repeat():
    config, params = parity_model("T")
    prompts = [[491, 275], [491, 327, 270, 32, 73], list(range(40, 60)), [491]]
    together = generate.generate(params, config, prompts, 20, temperature=1.0, top_k=40, seed=5)
    alone = [generate.generate(params, config, [p], 20, temperature=1.0, top_k=40, seed=5 + i)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together != generate.generate(params, config, prompts, 20, temperature=1.0, top_k=40, seed=6)
    same_prompt = generate.generate(params, config, [[491]] * 6, 20, temperature=1.5, seed=0)
    assert len({row[0] for row in same_prompt}) > 1, "every row draws its own first token"


def test_stops_at_a_token_and_streams_what_generate_returns():
    config, params = parity_model("T")
    prompt = [491, 275, 327]
    free = generate.generate(params, config, [prompt], 30, temperature=0)[0]
    assert len(free) == 30
    stop = free[12]
    cut = generate.generate(params, config, [prompt], 30, temperature=0, stop=(stop,))[0]
    assert cut == free[: free.index(stop)]
    streamed = list(generate.stream(params, config, [prompt], 30, temperature=0))
    assert len(streamed) > 2 and sum((rows[0] for rows in streamed), []) == free


@pytest.mark.parametrize("top_k,top_p,allowed", [(0, 1.0, {0, 1, 2, 3}), (2, 1.0, {0, 1}), (0, 0.6, {0, 1}), (0, 0.1, {0}), (1, 1.0, {0}),
                                                 (99, 1.0, {0, 1, 2, 3}), (3, 0.95, {0, 1, 2})])
def test_sampling_draws_from_the_right_set_in_the_right_shares(top_k, top_p, allowed):
    p = np.array([0.5, 0.3, 0.15, 0.05])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = generate.sample(jnp.log(jnp.tile(p, (4000, 1))), keys, 1.0, top_k, top_p)
    shares = np.bincount(drawn, minlength=4) / 4000
    want = np.where([i in allowed for i in range(4)], p, 0)
    np.testing.assert_allclose(shares, want / want.sum(), atol=0.03)
    assert set(np.flatnonzero(shares)) == allowed


BAD = {"empty prompt": (dict(prompts=[[]]), "no tokens"), "foreign token": (dict(prompts=[[500]]), "outside the model's vocabulary"),
       "no room": (dict(max_tokens=0), "max_tokens >= 1"), "temperature": (dict(temperature=-1), "temperature >= 0"),
       "top_p": (dict(top_p=0), "top_p")}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_get_one_sentence(case):
    config, params = parity_model("T")
    given, sentence = BAD[case]
    with pytest.raises(UserError, match=sentence):
        generate.generate(params, config, **dict(prompts=[[1]], max_tokens=4) | given)
