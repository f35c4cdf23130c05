"""A wandb sweep of two trials with wandb's own client, one of which fails.

Argument: the folder of the journal.
"""

import sys

from lib.sweeps import drivers, journal, space
from lib.sweeps.server import create_sweep, fetch_runs, wandb_login

folder = sys.argv[1]
spec = space.check(dict(method="grid", parameters={"depth": {"values": [1, 2]}}))
server = wandb_login()
path = create_sweep(server, spec, "proj")
journal.create(folder, spec)
with journal.Journal(folder) as book:
    boss = drivers.Wandb(book, spec, server, path, drivers.wandb_runs(path), poll=0.05)
    while taken := boss.take():
        [trial] = taken
        boss.report(trial, 3, {"val_bpb": 1.0 * trial.assignment["depth"], "loss": 2.5})
        if trial.assignment["depth"] == 1:
            boss.end(trial, "done", 1.0, params=7)
        else:
            boss.end(trial, "failed", reason="out of memory: 99 bytes")
    boss.close()
for t in fetch_runs(server, path, spec):
    print(t.id, t.state, t.assignment, t.value, t.reports, t.reason)
