"""When something is due in a training run: every so many steps, and at least every so many minutes.

Steps alone are a bad clock: on a runtime that may vanish, a quarter of the run can be an hour.
"""

import time
from collections.abc import Callable

# a save and a validation come at least this often, in seconds
AT_LEAST_EVERY = 600.0

# samples of a young model change fast, so they are taken at these steps too
SAMPLED_STEPS = (1, 10, 100, 1000)


class Due:
    """Tells whether a step is one at which something is to be done.

    every: steps between two; `last`: the last step, at which it is due always. seconds: it is due
    too when so much time has passed since it was last done (0: the clock doesn't matter, as on
    several hosts, which must agree). steps: single steps more.
    """

    def __init__(
        self,
        every: int,
        last: int,
        seconds: float = 0,
        steps: tuple[int, ...] = (),
        now: Callable[[], float] = time.monotonic,
    ):
        self.every = every
        self.last = last
        self.seconds = seconds
        self.steps = steps
        self.now = now
        self.done_at = now()

    def __call__(self, step: int) -> bool:
        """Whether it is due after `step`; it counts as done then."""
        late = self.seconds > 0 and self.now() - self.done_at >= self.seconds
        regular = self.every > 0 and step % self.every == 0
        if regular or late or step == self.last or step in self.steps:
            self.done_at = self.now()
            return True
        return False
