"""Every picture is drawn and every number is in a CSV."""

import csv
import math

import numpy as np
import pytest

from lib.sweeps import (
    pictures,
    scaling,
    suggest,
    tables,
)
from lib.sweeps.journal import Trial
from tests.helpers.sweeps import LR, ablation_trials, sweep, synthetic


def search_trials(n=24):
    spec, rng = (
        sweep(
            "random",
            {
                "matrix_lr": LR,
                "mlp": {"values": ["relu2", "gelu"]},
                "warmup_steps": {"min": 1, "max": 9},
            },
        ),
        np.random.default_rng(0),
    )
    found = []
    for i in range(n):
        a = suggest.ask(spec, found, 0)
        value = (math.log(a["matrix_lr"]) + 2) ** 2 + 0.01 * rng.normal()
        state = "failed" if i == 3 else "pruned" if i % 4 == 1 else "done"
        found.append(
            Trial(
                f"t{i}",
                i,
                a,
                state,
                value=value if state == "done" else None,
                ended=float(i),
                facts=dict(seconds=1.0),
                reason="diverged" * (i == 3),
                reports={s: value + 5 / s for s in ((2, 4) if state == "pruned" else (2, 4, 6))},
                curve=[[s, value + 6 / s] for s in range(1, 7)],
            )
        )
    return spec, found


@pytest.mark.slow
def test_every_picture_is_drawn_and_every_number_is_in_a_csv(tmp_path):
    spec, found = search_trials()
    shares = suggest.importance(spec, found)
    assert max(shares, key=shares.get) == "matrix_lr" and sum(shares.values()) == pytest.approx(1)
    runs = synthetic()
    law, whole = scaling.isoflop(runs, draws=20), scaling.parametric(runs, draws=4)
    rows = scaling.held_out(runs, draws=4)
    growing = [
        dict(N=n, D=12 * n, C=72 * n * n, L=0.8 + 5 * (72 * n * n) ** -0.15)
        for n in np.geomspace(1e5, 1e7, 6)
    ]
    table = scaling.paired(ablation_trials())
    figures = [
        pictures.best_so_far(found, spec),
        pictures.curves(found, spec),
        pictures.parallel(found, spec),
        pictures.importance(shares),
        pictures.isoflop(law, "val_bpb"),
        pictures.frontier(law, whole),
        pictures.frontier(law),
        pictures.predicted(rows, "val_bpb"),
        pictures.series(growing, scaling.series(growing), "val_bpb"),
        pictures.ablation(table, "val_bpb"),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").stat().st_size > 5000
    tables.write_csv(tmp_path / "trials.csv", tables.trial_rows(found))
    back = list(csv.DictReader(open(tmp_path / "trials.csv")))
    assert (
        len(back) == 24
        and float(back[0]["value"]) == found[0].value
        and back[3]["reason"] == "diverged"
    )
    assert len(tables.curve_rows(found)) == sum(len(t.reports) + len(t.curve) for t in found)
    assert "without muon" in tables.ablation_table(table) and "+0.2" in tables.ablation_table(table)
    assert tables.leaders(found).splitlines()[1].split()[0] == str(tables.best_of(found).number)
