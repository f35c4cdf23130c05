"""Sweeps that several test files start from."""

import math

import numpy as np

from lib.sweeps import scaling, space
from lib.sweeps.journal import Trial

LR = {"distribution": "log_uniform_values", "min": 0.01, "max": 1.0}


def sweep(method="grid", parameters=None, **more):
    return space.check(
        dict(
            method=method,
            parameters=parameters or {"depth": {"values": [1, 2, 3]}, "seed": {"values": [1, 2]}},
            **more,
        )
    )


CHINCHILLA = dict(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)


def synthetic(noise=0.001, seed=0):
    rng = np.random.default_rng(seed)
    return [
        dict(
            N=float(N),
            D=C / 6 / N,
            C=C,
            target_flops=C,
            L=float(scaling.predict(CHINCHILLA, N, C / 6 / N) * np.exp(rng.normal(0, noise))),
        )
        for C in (1e19, 3e19, 1e20, 3e20)
        for N in np.geomspace(0.25, 4, 7) * 7e8 * (C / 1e20) ** 0.45
    ]


def ablation_trials():
    effects = {"": 0.0, "smear": 0.05, "backout": 0.0001, "muon": 0.2}
    return [
        Trial(
            f"{part}{seed}",
            i,
            dict(without=part, seed=seed),
            "done",
            value=1 + 0.3 * seed + effect + 0.002 * math.sin(i * i),
            facts=dict(steps=9, seconds=1.0),
            reports={"3": 2.0, "9": 1.5},
            curve=[[1, 3.0], [9, 1.5]],
            ended=float(i),
        )
        for i, ((part, effect), seed) in enumerate(
            (item, seed) for item in effects.items() for seed in (1, 2, 3)
        )
    ]
