"""From a loss to a trained model.

`step` is one optimizer step, compiled; `loop` repeats it and never lets the device wait; `run` is
all of a training that can be left and taken up again: `due` says when it measures and saves,
`changes` what may change when it goes on. `optim` holds
optimizers and schedules, `checkpoint` what is written and read back bit for bit, `metrics` what is
logged, `finetune` what the stages after pretraining add. `rl` lets a model learn from rewards:
`rollouts` are its answers and what they were worth, `policy` is the loss.
"""

from lib.train.loop import LossWatch, Step, lr_at, steps
from lib.train.run import (
    Measurement,
    Past,
    Saving,
    TrainingRun,
    find_past,
    portable,
    saved_every,
)
from lib.train.step import (
    TrainState,
    computed_in,
    for_training,
    init_state,
    make_train_step,
    state_template,
    token_losses_on,
    train_step,
    with_rates,
)

__all__ = [
    "Measurement",
    "Past",
    "Saving",
    "Step",
    "TrainState",
    "TrainingRun",
    "LossWatch",
    "find_past",
    "computed_in",
    "for_training",
    "init_state",
    "lr_at",
    "make_train_step",
    "portable",
    "saved_every",
    "state_template",
    "steps",
    "token_losses_on",
    "train_step",
    "with_rates",
]
