"""Hyper-parameter sweeps by any number of workers, and what can be learnt from them.

A sweep is a dict in wandb's schema (space, with hyperband and what to suggest next); presets make
some. Workers meet in a folder (journal) or on a wandb server, take trials from there (drivers), and
train them one by one (trials) or several at once (population), with the steps of 02_train. What
they found is told as tables, pictures and laws (scaling: parabolas, power laws, paired differences,
with intervals).
"""
