"""The chat in the terminal with an engine that takes a tenth of a second for each chunk.

Arguments: those of lib.chat.
"""

import runpy
import time

from lib.generate import Engine

step = Engine.step


def slow_step(self):
    time.sleep(0.1)
    return step(self)


Engine.step = slow_step
runpy.run_module("lib.chat", run_name="__main__")
