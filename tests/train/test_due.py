"""lib/train/due.py: by steps, by the clock, and always at the end."""

from lib.train.due import Due


class Clock:
    time = 0.0

    def __call__(self):
        return self.time


def test_by_steps_and_at_the_end():
    due = Due(every=4, last=10)
    assert [n for n in range(1, 11) if due(n)] == [4, 8, 10]


def test_single_steps_are_due_too():
    due = Due(every=50, last=200, steps=(1, 10))
    assert [n for n in range(1, 201) if due(n)] == [1, 10, 50, 100, 150, 200]


def test_never_but_at_the_end():
    due = Due(every=0, last=5)
    assert [n for n in range(1, 6) if due(n)] == [5]


def test_by_the_clock_where_steps_are_slow():
    clock = Clock()
    due = Due(every=1000, last=1000, seconds=600, now=clock)
    done = []
    for step in range(1, 21):
        clock.time += 100
        if due(step):
            done.append(step)
    assert done == [6, 12, 18]


def test_what_was_done_by_steps_is_not_done_again_by_the_clock():
    clock = Clock()
    due = Due(every=5, last=1000, seconds=600, now=clock)
    done = []
    for step in range(1, 16):
        clock.time += 110
        if due(step):
            done.append(step)
    assert done == [5, 10, 15]
