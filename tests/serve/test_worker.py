"""The engine's thread turned by hand, with an engine that only notes what it is asked."""

import types

import pytest

from lib.files import UserError
from lib.generate import Sampling
from lib.generate.engine import NARROWEST
from lib.serve import worker
from lib.serve.api import ApiError
from lib.serve.counters import Counters
from lib.serve.worker import EngineThread, Job

FOREVER = float("inf")


class Paper:
    """An engine of so many slots; `next` is what its next step hands out, `log` what it was
    asked.
    """

    def __init__(self, slots=3, length=64):
        self.slots = slots
        self.length = length
        self.parts = [types.SimpleNamespace(slots=slots, narrowest=NARROWEST)]
        self.taken = {}
        self.next = {}
        self.log = []

    @property
    def free(self):
        return self.slots - len(self.taken)

    def add_many(self, prompts, samplings):
        free = [slot for slot in range(self.slots) if slot not in self.taken]
        slots = free[: len(prompts)]
        self.taken |= dict(zip(slots, prompts))
        narrowest = self.parts[0].narrowest
        self.log.append(("add", prompts, [s.max_tokens for s in samplings], narrowest))
        return slots

    def cancel(self, slot):
        self.taken.pop(slot)
        self.log.append(("cancel", slot))

    def step(self):
        written, self.next = self.next, {}
        for slot, (_, reason) in written.items():
            if reason:
                self.taken.pop(slot)
        return written


def thread_of(engine=None, queue=4) -> EngineThread:
    """A warm engine thread that never ran."""
    thread = EngineThread(engine or Paper(), queue, Counters())
    thread.cold = []
    return thread


def job(number=1, deadline=FOREVER):
    """A job that notes in `news` what it is handed."""
    news = []
    new = Job([number], Sampling(number), lambda *what: news.append(what), deadline)
    new.news = news
    return new


@pytest.fixture
def clock(monkeypatch):
    """The time that the worker sees, to be set."""
    time = types.SimpleNamespace(now=100.0, monotonic=lambda: time.now)
    monkeypatch.setattr(worker, "time", time)
    return time


# ---- the line ------------------------------------------------------------------------------------


def test_the_line_takes_all_of_a_request_or_nothing():
    thread = thread_of(queue=3)
    first, *rest = [job() for _ in range(4)]
    with pytest.raises(ApiError, match="asks for 4 answers at once and the server takes 3") as e:
        thread.submit([first, *rest])
    assert (e.value.status, e.value.body["error"]["code"]) == (400, "too_many_answers")
    thread.submit([first])
    with pytest.raises(ApiError, match=r"people are waiting \(1 answers\)") as e:
        thread.submit(rest)
    assert (e.value.status, e.value.body["error"]["code"]) == (429, "queue_full")
    assert e.value.headers == {"Retry-After": "2"}
    assert list(thread.waiting) == [first]
    thread.submit(rest[:2])
    assert list(thread.waiting) == [first, *rest[:2]], "as many as may wait"


@pytest.mark.parametrize(
    "error, told",
    [
        (UserError("the weights are gone"), "the weights are gone"),
        (KeyError("secret"), "the model failed; the server's log says how"),
    ],
)
def test_nothing_is_lined_up_where_nothing_is_written_any_more(error, told, capsys):
    thread = thread_of()
    thread.failed = error
    with pytest.raises(ApiError, match=told) as e:
        thread.submit([job()])
    assert e.value.status == 503 and e.value.body["error"]["code"] == "unavailable"
    # who runs the server is told with a traceback, unless a sentence says all
    worker._log(error)
    log = capsys.readouterr().err
    assert ("Traceback" in log or "KeyError" in log) == isinstance(error, KeyError)
    assert ("Error: the weights are gone\n" == log) == isinstance(error, UserError)

    thread = thread_of()
    thread.end()
    with pytest.raises(ApiError, match="shutting down") as e:
        thread.submit([job()])
    assert e.value.status == 503 and not thread.waiting
    assert thread._turn() is False
    thread.close()


def test_who_waits_is_woken():
    thread = thread_of()
    thread.thread.start()
    first = job()
    thread.submit([first])
    while not thread.busy:
        pass
    thread.close()
    [(tokens, error)] = first.news
    assert tokens == [] and "the server was stopped" in str(error) and error.status == 503
    assert not thread.thread.is_alive() and not thread.busy and not thread.waiting
    assert thread.failed is None


def test_jobs_leave_the_line_when_they_are_forgotten():
    thread = thread_of()
    first, second, third = jobs = [job() for _ in range(3)]
    thread.submit(jobs)
    thread.cancel([second, job()])
    assert list(thread.waiting) == [first, third]
    assert [j.cancelled for j in jobs] == [False, True, False]


def test_who_has_waited_too_long_is_told_when_to_come_again(clock):
    thread = thread_of(Paper(slots=1), queue=8)
    late = [job(deadline=99.9), job(deadline=99.0)]
    in_time = job(deadline=100.0)
    thread.submit([late[0], in_time, late[1]])
    assert thread._turn() is True
    for one in late:
        [(tokens, error)] = one.news
        assert tokens == [] and error.status == 503 and error.headers == {"Retry-After": "10"}
        assert error.body["error"]["code"] == "timeout"
        assert "no slot became free in time" in str(error)
    assert thread.busy == {0: in_time} and not thread.waiting and in_time.news == []


# ---- answers that are written --------------------------------------------------------------------


def test_answers_are_begun_together_as_far_as_there_is_room():
    engine = Paper(slots=6)
    thread = thread_of(engine, queue=9)
    jobs = [job(n) for n in range(1, 8)]
    thread.submit(jobs)
    thread._turn()
    assert engine.log == [("add", [[1], [2], [3], [4]], [1, 2, 3, 4], NARROWEST)]
    assert thread.busy == dict(enumerate(jobs[:4]))
    thread._turn()
    assert engine.log[1:] == [("add", [[5], [6]], [5, 6], NARROWEST)]
    assert list(thread.waiting) == jobs[6:]
    # whoever ends makes room for the next
    engine.next = {2: (["a"], "stop")}
    thread._turn()
    assert jobs[2].news == [(["a"], "stop")] and 2 not in thread.busy
    thread._turn()
    assert thread.busy[2] is jobs[6] and not thread.waiting


def test_before_all_is_compiled_answers_are_begun_one_by_one_in_the_widest_shape():
    engine = Paper(slots=3, length=200)
    thread = thread_of(engine)
    thread.cold = [(1, 16)]
    thread.submit([job(1), job(2)])
    thread._turn()
    assert [entry[1] for entry in engine.log] == [[[1]], [[2]]]
    assert {entry[3] for entry in engine.log} == {128}
    assert thread.cold == [(1, 16)], "nothing is compiled while somebody waits"


def test_what_is_written_goes_to_whom_it_belongs():
    engine = Paper()
    thread = thread_of(engine)
    jobs = [job(n) for n in range(1, 4)]
    thread.submit(jobs)
    thread._turn()
    jobs[2].cancelled = True
    engine.next = {0: (["a", "b"], None), 1: ([], None), 2: (["c"], None)}
    thread._write()
    # what nobody hears was written all the same
    assert [j.news for j in jobs] == [[(["a", "b"], None)], [], []]
    assert thread.metrics.counters["rawchat_completion_tokens_total", ()] == 3
    engine.next = {0: ([], "length"), 1: (["d"], "stop")}
    thread._write()
    assert jobs[0].news[1:] == [([], "length")] and jobs[1].news == [(["d"], "stop")]
    assert thread.busy == {2: jobs[2]}


def test_slots_of_those_who_left_or_took_too_long_are_free_again(clock):
    engine = Paper(slots=4)
    thread = thread_of(engine)
    stays, left, late, both = jobs = [job(1), job(2), job(3, 104.0), job(4, 104.0)]
    stays.deadline = 105.0
    thread.submit(jobs)
    thread._turn()
    clock.now = 105.0
    thread.cancel([left, both])
    thread._turn()
    assert engine.log[1:] == [("cancel", 1), ("cancel", 2), ("cancel", 3)]
    assert thread.busy == {0: stays}
    assert late.news == [([], "time")]
    assert left.news == both.news == stays.news == []
    # none of them is dropped again
    thread._turn()
    assert len(engine.log) == 4


def test_a_failure_is_told_to_all_who_wait_and_to_the_owner(capsys):
    engine, failed = Paper(slots=1), []
    thread = EngineThread(engine, 4, Counters(), lambda: failed.append(thread.failed))
    thread.cold = []
    jobs = [job(1), job(2)]
    thread.submit(jobs)

    def step():
        raise RuntimeError("no more memory")

    engine.step = step
    thread._run()
    for one in jobs:
        [(tokens, error)] = one.news
        assert tokens == [] and error.status == 500
        assert error.body["error"]["code"] == "engine_failed"
    assert [str(e) for e in failed] == ["no more memory"]
    assert not thread.busy and not thread.waiting
    assert "no more memory" in capsys.readouterr().err


# ---- warming up ----------------------------------------------------------------------------------


def test_shapes_by_hand():
    """Rows 1, 2, 3, 4, as many as begin together; tokens 16, 24, 32 ... as far as there is room."""
    lengths = [16, 24, 32, 48, 64, 96, 128]
    assert worker.shapes(Paper(slots=9, length=500)) == [
        (rows, length) for rows in (1, 2, 3, 4) for length in lengths
    ]
    # 48 tokens and the last, which is not prefilled, leave one for the answer
    assert worker.shapes(Paper(slots=2, length=50)) == [
        (rows, length) for rows in (1, 2) for length in lengths[:4]
    ]
    assert worker.shapes(Paper(slots=1, length=49)) == [(1, 16), (1, 24), (1, 32)]
    assert worker.widest(Paper(slots=3, length=50)) == 48
    assert worker.widest(Paper(slots=3, length=9)) == 16
    assert EngineThread(Paper(slots=1, length=49), 1, Counters()).cold[-1] == (1, 16)


class Part(Paper):
    """An engine that is the part of one."""

    def __init__(self, slots=3, length=64):
        super().__init__(slots, length)
        self.parts = [self]
        self.narrowest = NARROWEST
        self.steps = 0

    def step(self):
        self.steps += 1
        return {}


def test_each_shape_is_met_once_and_nothing_is_left():
    engine = Part(slots=3, length=50)
    worker.warm_up(engine, (2, 24))
    [(_, prompts, most, narrowest), *ends] = engine.log
    assert prompts == [[0] * 25, [1] * 25], "other prompts, or they were prefilled only once"
    assert most == [1, 1] and narrowest == NARROWEST and engine.steps == 1
    assert ends == [("cancel", 0), ("cancel", 1)] and engine.free == 3
    # before the others are compiled, the one shape that serves all prompts
    worker.warm_up(engine)
    assert engine.log[3] == ("add", [[0]], [1], 48) and engine.free == 3


def test_copies_are_warmed_up_where_there_is_room_for_two():
    for slots, rows in ((1, []), (2, [[0], [0]])):
        engine = Part(slots=slots)
        worker.warm_up_copies(engine)
        assert [prompt for entry in engine.log[:1] for prompt in entry[1]] == rows
        assert engine.free == slots


def test_in_idle_time_one_shape_after_the_other_is_compiled(monkeypatch):
    engine = Part(slots=1, length=49)
    thread = EngineThread(engine, 1, Counters())
    copies = []
    monkeypatch.setattr(worker, "warm_up_copies", lambda engine: copies.append(len(thread.cold)))
    lengths = []
    while thread.cold:
        assert thread._turn() is True
        lengths.append(len(engine.log[-2][1][0]))
    assert lengths == [17, 25, 33] and copies == [1]
