"""What a training run needs, before it is paid for: will it fit, how fast can it be, what will it
cost.

From shapes alone (`estimate`, `memory`, `roofline`), or from the real step compiled for a TPU that
isn't there (`compile`, `hlo`). `search` looks for the fastest step that fits, `plan` turns it into
hours and money, `table` shows what fits where; `python -m lib.preflight --help` asks all of them.

Nothing is imported here, so that the command can choose JAX's platform before JAX starts.
"""
