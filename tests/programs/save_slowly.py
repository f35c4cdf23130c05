"""Saves one checkpoint, then stands still in the middle of the second, to be killed there.

Argument: folder.
"""

import sys
import time

import numpy as np
import safetensors.numpy

from lib.train.checkpoint import save

write = safetensors.numpy.save_file


def slow(arrays, path):
    write(arrays, path)
    print("writing", flush=True)
    time.sleep(60)


save(sys.argv[1], 1, {"params": {"w": np.ones(1000)}})
safetensors.numpy.save_file = slow
save(sys.argv[1], 2, {"params": {"w": np.ones(1000)}})
