"""Hyper-parameter sweeps by any number of workers, and what can be learnt from them.

space      the sweep as a dict or YAML in wandb's schema: checked, drawn from, turned into Configs,
hyperband's rule journal    one folder per sweep: every worker appends to a file of its own, what
all of them say together is the state drivers    who says what to train next: the journal's folder
(no account), or a wandb server trials     training one trial, or several at once under vmap, with
the steps of 02_train presets    search, miniseries, isoflop, ablate scaling    parabolas, power
laws, the parametric loss, paired differences; with bootstrap intervals pictures   tables, CSV files
and plots
"""
