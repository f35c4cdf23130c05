"""Counts steps until it is told to stop, and saves the one that it has come to.

Argument: folder.
"""

import sys
import time

import numpy as np

from lib.interrupts import interruptible
from lib.train.checkpoint import Saver

with interruptible() as flag, Saver(sys.argv[1]) as saver:
    for step in range(1, 10**6):
        if step == 3:
            print("running", flush=True)
        time.sleep(0.005)
        if flag.stop:
            saver.save(step, {"w": np.full(3, step)})
            break
