"""Parts of the server by themselves: who is next, and which numbers a request may hold."""

import collections
import types

import pytest

from lib.serve import api, worker


def test_who_came_first_is_next():
    server = types.SimpleNamespace(
        engine=types.SimpleNamespace(free=2),
        waiting=collections.deque(["first", "second", "third"]),
    )
    assert worker.EngineThread._take_next(server) == ["first", "second"]
    assert list(server.waiting) == ["third"]
    server.engine.free = 0
    assert worker.EngineThread._take_next(server) == []


def test_a_whole_number_does_for_a_real_one_and_not_the_other_way_round():
    temperature = api._number(dict(temperature=1), "temperature")
    assert temperature == 1.0 and type(temperature) is float
    assert api._number(dict(n=2), "n") == 2
    assert api._number({}, "n") == api._number(dict(n=None), "n") == 1
    for value in (1.5, 2.0, True, "2"):
        with pytest.raises(api.ApiError, match="n must be an integer"):
            api._number(dict(n=value), "n")
    with pytest.raises(api.ApiError, match="temperature must be a number"):
        api._number(dict(temperature=True), "temperature")
