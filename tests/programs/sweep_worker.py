"""A worker of a sweep whose trials only wait a little. Arguments: the sweep's folder, a seed.

While the folder has a file named hold, no trial comes to its end.
"""

import random
import sys
import time
from pathlib import Path

from lib.sweeps import drivers, journal

folder, seed = sys.argv[1], int(sys.argv[2])
journal.TRIES, drivers.POLL = 1000, 0.05
rng = random.Random(seed)


def train(boss, trial):
    for step in (1, 2, 3):
        time.sleep(0.3 * rng.random())
        if boss.report(trial, step, {"val_bpb": trial.assignment["depth"] + 1 / step}):
            return boss.drop(trial)
    while (Path(folder) / "hold").exists():
        time.sleep(0.01)
    boss.end(trial, "done", float(trial.assignment["depth"]), steps=3)


with journal.Journal(folder) as book:
    boss = drivers.Local(book, journal.read(folder), say=lambda text: None)
    while taken := boss.take():
        for trial in taken:
            print(trial.id, flush=True)
            train(boss, trial)
