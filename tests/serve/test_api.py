"""What a request may hold, by hand: every bound on both its sides, and what is made of it."""

import pytest

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.runs import Model
from lib.serve.api import Api, ApiError, _check_fields, _flag, _number, _stops, _up_to
from lib.serve.settings import ServeSettings
from tests.helpers.golden import PARITY

TOKENIZER = Tokenizer.load(PARITY / "tokenizer.json")
USER = [{"role": "user", "content": "hm"}]
MOST = 2**31 - 1


def served(stage="sft", path="runs/nest/sft/000007", **settings) -> Api:
    """The API of a model that was never made: requests are checked without its weights."""
    config = Config(vocab_size=500, sequence_len=64)
    model = Model({}, config, TOKENIZER, {"step": 7}, stage, path)
    return Api(model, ServeSettings(**settings))


def refused(match, check, *args) -> dict:
    """What is told of a request that must be refused with 400."""
    with pytest.raises(ApiError, match=match) as e:
        check(*args)
    assert e.value.status == 400
    return e.value.body["error"]


# ---- errors and fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (499, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_error_has_the_type_of_its_status(status, kind):
    error = ApiError(status, "why", "where", "which", {"a": "b"})
    assert error.body == {
        "error": {"message": "why", "type": kind, "param": "where", "code": "which"}
    }
    assert (error.status, error.headers, str(error)) == (status, {"a": "b"}, "why")
    assert ApiError(status, "why").headers == {}


# name: least, most, what stands for a missing one, a step beyond the bounds
NUMBERS = {
    "max_tokens": (1, MOST, None, 1),
    "max_completion_tokens": (1, MOST, None, 1),
    "temperature": (0, 2, 1.0, 0.001),
    "top_p": (0, 1, 1.0, 0.001),
    "top_k": (0, MOST, 0, 1),
    "min_p": (0, 1, 0.0, 0.001),
    "repetition_penalty": (0.01, 100, 1.0, 0.001),
    "seed": (-(2**63), 2**63 - 1, None, 1),
    "n": (1, 128, 1, 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_bounds(name):
    low, high, default, step = NUMBERS[name]
    for given, value in ((low, low), (high, high), (None, default)):
        assert _number({name: given}, name) == value
    assert _number({}, name) == default
    told = refused(f"{name} must be", _number, {name: low - step}, name)
    assert (told["param"], told["code"]) == (name, "out_of_range")
    if high == MOST:
        # a count without end is cut, and its bound never spoken of
        assert _number({name: 2**40}, name) == MOST
        assert told["message"] == f"{name} must be at least {low}"
    else:
        refused(f"from {low} to {high}", _number, {name: high + step}, name)


def test_flags_are_true_or_false():
    assert _flag({"echo": True}, "echo") is True
    for body in ({}, {"echo": None}, {"echo": False}):
        assert _flag(body, "echo") is False
    for value in (1, 0, "true", []):
        assert refused("true or false", _flag, {"echo": value}, "echo")["param"] == "echo"


def test_small_numbers_and_their_ends():
    assert [_up_to({"k": k}, "k", 5) for k in (None, 0, 5)] == [None, 0, 5]
    assert _up_to({}, "k", 5) is None
    for value in (-1, 6, True, 2.0, "2"):
        assert refused("integer from 0 to 5", _up_to, {"k": value}, "k", 5)["param"] == "k"


def test_texts_that_end_an_answer():
    assert _stops({}) == _stops({"stop": None}) == ()
    assert _stops({"stop": "a"}) == ("a",)
    assert _stops({"stop": list("abcd")}) == tuple("abcd")
    assert _stops({"stop": "a" * 200}) == ("a" * 200,)
    assert _stops({"stop": "\ud800."}) == ("?.",)
    for stop in (list("abcde"), "", [""], "a" * 201, ["a", 1], 1, {"a": 1}):
        assert refused("at most 4 texts, of 1 to 200", _stops, {"stop": stop})["param"] == "stop"


# field: what it may say, which asks for nothing, and what it may not
NEUTRAL = {
    "presence_penalty": ([None, 0], 1),
    "frequency_penalty": ([None, 0], -1),
    "logit_bias": ([None, {}], {"1": 2}),
    "suffix": ([None, ""], "."),
    "tools": ([None, []], [{}]),
    "functions": ([None, []], [{}]),
    "tool_choice": ([None, "none", "auto"], "required"),
    "function_call": ([None, "none", "auto"], {"name": "f"}),
    "response_format": ([None, {"type": "text"}], {"type": "json_object"}),
    "modalities": ([None, ["text"]], ["audio"]),
    "audio": ([None], {}),
    "prediction": ([None], {}),
    "web_search_options": ([None], {}),
    "reasoning_effort": ([None, "none"], "high"),
    "verbosity": ([None, "medium"], "low"),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_not_done_may_only_ask_for_nothing(name):
    allowed, wrong = NEUTRAL[name]
    for value in allowed:
        _check_fields({name: value}, {name, "model"}, "me")
    # false equals 0 in Python
    for value in (wrong, False):
        told = refused(f"{name} is not supported", _check_fields, {name: value}, {name}, "me")
        assert (told["param"], told["code"]) == (name, "unsupported_parameter")


def test_unknown_fields_and_other_models():
    api = served(run="nest")
    told = refused("unknown field 'colour'", api.chat, {"messages": USER, "colour": 1})
    assert (told["param"], told["code"]) == ("colour", "unknown_parameter")
    refused("must be a JSON object", api.chat, [])
    refused("model must be a string", api.chat, {"messages": USER, "model": 1})
    with pytest.raises(ApiError, match="'other' does not exist here: this server has 'nest-sft'"):
        api.completion({"model": "other"})
    # which field belongs where, and what is for the provider's own books
    chat_only = dict(top_logprobs=0, truncation="auto", max_completion_tokens=1)
    refused("unknown field 'prompt'", api.chat, {"messages": USER, "prompt": "a"})
    refused("unknown field 'echo'", api.chat, {"messages": USER, "echo": False})
    for name, value in chat_only.items():
        api.chat({"messages": USER, name: value})
        refused(f"unknown field '{name}'", api.completion, {name: value})
    for name in ("user", "metadata", "store", "service_tier", "safety_identifier"):
        assert api.chat({"messages": USER, name: "x"}) and api.completion({name: "x"})
    for name in ("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"):
        assert api.chat({"messages": USER, name: "x"}) and api.completion({name: "x"})


def test_counts_at_the_end_of_streams_only():
    api = served()
    for options, wanted in ((None, False), ({}, False), ({"include_usage": True}, True)):
        body = {"messages": USER, "stream": True, "stream_options": options}
        assert api.chat(body).usage_wanted is wanted
        body = {"stream": True, "stream_options": options}
        assert api.completion(body).usage_wanted is wanted
    for stream, options in ((False, {}), (True, []), (True, {"include_usage": 1})):
        body = {"messages": USER, "stream": stream, "stream_options": options}
        refused("stream_options|include_usage", api.chat, body)


# ---- what is made of a request -------------------------------------------------------------------


def test_the_name_of_a_model():
    assert served(run="runs/my run").id == "my-run-sft"
    assert served(stage="base", path="a/nest/checkpoints/000007").id == "nest-base"
    api = served(run="nest", context=33, max_tokens=9)
    card = api.card()
    assert abs(card.pop("created") - api.created) == 0
    assert card == {
        "id": "nest-sft",
        "object": "model",
        "owned_by": "rawchat",
        "stage": "sft",
        "step": 7,
        "context_length": 33,
        "max_tokens": 9,
    }
    assert served().context == 64


def test_settings_reach_the_row():
    given = dict(temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, repetition_penalty=2, seed=-4)
    api = served()
    for asked in (api.chat({"messages": USER} | given), api.completion({"prompt": "a"} | given)):
        for name, value in given.items():
            assert getattr(asked.sampling, name) == value
        assert (asked.n, asked.stream, asked.usage_wanted, asked.logprobs) == (
            1,
            False,
            False,
            False,
        )
        assert asked.echo == [] and asked.dropped == 0 and asked.sampling.logprobs == 0
    asked = api.chat({"messages": USER, "stop": ["x", "y"], "n": 3, "stream": True})
    assert asked.sampling.stop_strings == ("x", "y") and asked.n == 3 and asked.stream
    seeds = {api.chat({"messages": USER}).sampling.seed for _ in range(4)}
    assert len(seeds) > 1 and min(seeds) >= 0 and max(seeds) < 2**31
    assert api.chat({"messages": USER, "seed": 0}).sampling.seed == 0


def test_an_answer_ends_at_the_tokens_that_end_a_turn():
    api, special = served(), TOKENIZER.special
    inside = {f"<|{kind}_{end}|>" for kind in ("python", "output") for end in ("start", "end")}
    asked = api.chat({"messages": USER})
    assert set(asked.sampling.stop) == {special[name] for name in set(special) - inside}
    assert asked.prompts == [TOKENIZER.render_for_completion(USER)]
    assert api.completion({"prompt": "a"}).sampling.stop == (TOKENIZER.bos,)


def test_probabilities_and_alternatives():
    api = served()
    told = refused("needs logprobs", api.chat, {"messages": USER, "top_logprobs": 1})
    assert told["param"] == "top_logprobs"
    for body, alternatives in (({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 20}, 20)):
        asked = api.chat({"messages": USER, "logprobs": True} | body)
        assert asked.logprobs is True and asked.sampling.logprobs == alternatives
    body = {"messages": USER, "logprobs": True, "top_logprobs": 21}
    refused("from 0 to 20", api.chat, body)
    # of a completion, 0 asks for those of the tokens alone
    for logprobs, wanted in ((None, False), (0, True), (5, True)):
        asked = api.completion({"prompt": "a", "logprobs": logprobs})
        assert (asked.logprobs, asked.sampling.logprobs) == (wanted, logprobs or 0)
    refused("from 0 to 5", api.completion, {"prompt": "a", "logprobs": 6})
    for logprobs in (0, 1):
        refused("echo together", api.completion, {"echo": True, "logprobs": logprobs})


def test_the_room_for_an_answer_at_its_ends():
    api = served(max_tokens=20)
    ids = list(range(60))
    for length, wanted, room in (
        (63, None, 1),
        (60, 9, 4),
        (10, None, 20),
        (10, 7, 7),
        (10, 99, 20),
    ):
        prompt = (ids + ids)[:length]
        asked = api.completion({"prompt": prompt, "max_tokens": wanted})
        assert asked.sampling.max_tokens == min(room, wanted or 16)
        assert api._room(prompt, wanted, "prompt") == room
    told = refused(
        "length is 64 tokens and your prompt has 64", api.completion, {"prompt": [1] * 64}
    )
    assert (told["param"], told["code"]) == ("prompt", "context_length_exceeded")
    refused("and your x has 64", api._room, [1] * 64, 1, "x")
    # all prompts get the room of the longest
    assert api.completion({"prompt": [[1] * 9, [1] * 60, [1] * 50]}).sampling.max_tokens == 4
    # the new name of a field that has two, where both are given
    for body, most in (
        ({}, 20),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
    ):
        assert api.chat({"messages": USER} | body).sampling.max_tokens == most


def test_what_cannot_fit_is_refused_before_it_is_encoded():
    api = served()
    most = 64 * max(map(len, TOKENIZER.tokens))
    assert api.longest == max(map(len, TOKENIZER.tokens))
    api._check_size(["a" * (most - 1), "b"], "x")
    refused("your x has more than 64: shorten", api._check_size, ["a" * most, "b"], "x")
    refused("your prompt has more than 64", api.completion, {"prompt": "a" * (most + 1)})
    chat = [{"role": "user", "content": "a" * (most + 1)}]
    refused("your messages has more than 64", api.chat, {"messages": chat})


def test_prompts_in_all_their_forms():
    api = served(queue=3)
    one, two = TOKENIZER.encode("a", bos=True), TOKENIZER.encode("bc", bos=True)
    for prompt, ids, texts in (
        ("a", [one], ["a"]),
        (["a", "bc"], [one, two], ["a", "bc"]),
        ([65, 66], [[65, 66]], ["AB"]),
        ([[65], "a"], [[65], one], ["A", "a"]),
        ([0, 499], [[0, 499]], None),
        (["a"] * 3, [one] * 3, ["a"] * 3),
    ):
        asked = api.completion({"prompt": prompt, "echo": True})
        assert asked.prompts == ids and (texts is None or asked.echo == texts)
        assert api.completion({"prompt": prompt}).echo == []
    assert api.completion({}).prompts == [[TOKENIZER.bos]]
    for prompt in (["a"] * 4, [], None, {"a": 1}, 3):
        refused("list of 1 to 3 of these", api.completion, {"prompt": prompt})
    for prompt in ([500], [-1], [[True]], [[1, "a"]], [[]], ["a", 1], [["a"]]):
        told = refused("ids within the vocabulary", api.completion, {"prompt": prompt})
        assert (told["param"], told["code"]) == ("prompt", "invalid_type")


def test_of_several_answers_all_are_given_back():
    api = served()
    assert api.completion({"n": 2, "best_of": 2}).n == 2
    assert api.completion({"best_of": 1}).n == api.completion({"best_of": None}).n == 1
    assert refused("best_of", api.completion, {"n": 2, "best_of": 3})["param"] == "best_of"


def test_messages_end_with_the_user_and_errors_say_where():
    api = served()
    for messages, match, param in (
        ([], "at least one message", "messages"),
        ("hm", "at least one message", "messages"),
        ([*USER, {"role": "assistant", "content": "a"}], "last message must be", "messages"),
        ([*USER, {"role": "nobody", "content": "a"}], "role", "messages.1.role"),
        ([*USER, 3], "message", "messages.1"),
    ):
        assert refused(match, api.chat, {"messages": messages})["param"] == param


def test_the_oldest_messages_make_room_only_where_that_is_asked_for():
    api = served(max_tokens=20)
    pair = [{"role": "user", "content": "word"}, {"role": "assistant", "content": "word"}]
    messages = pair * 6 + USER
    length = lambda messages: len(TOKENIZER.render_for_completion(messages))
    assert length(messages) > 64
    told = refused("64", api.chat, {"messages": messages})
    assert told["code"] == "context_length_exceeded"
    dropped = {}
    for wanted in (None, 1, 20, 30):
        asked = api.chat({"messages": messages, "truncation": "auto", "max_tokens": wanted})
        room = 64 - min(wanted or 20, 20)
        dropped[wanted] = asked.dropped
        assert asked.prompts == [TOKENIZER.render_for_completion(messages[asked.dropped :])]
        assert length(messages[asked.dropped :]) <= room < length(messages[asked.dropped - 2 :])
    assert dropped[1] < dropped[20] == dropped[None] == dropped[30]
    assert api.chat({"messages": USER, "truncation": "auto"}).dropped == 0
    assert api.chat({"messages": USER, "truncation": "disabled"}).dropped == 0
    refused("disabled or auto", api.chat, {"messages": USER, "truncation": "yes"})
    # what is left out may be as long as it likes
    longest = [{"role": "user", "content": "a" * (64 * api.longest + 1)}, pair[1], *USER]
    assert api.chat({"messages": longest, "truncation": "auto"}).dropped == 2
    refused("more than 64", api.chat, {"messages": longest})
    # what cannot be left out is too long by itself
    long = [{"role": "user", "content": "word " * 40}]
    told = refused("context", api.chat, {"messages": long, "truncation": "auto"})
    assert told["code"] == "context_length_exceeded" and told["param"] == "messages"


def test_a_model_that_has_not_learnt_to_chat():
    told = refused("has not learnt to chat", served(stage="base").chat, {"messages": USER})
    assert told["code"] == "not_a_chat_model"
