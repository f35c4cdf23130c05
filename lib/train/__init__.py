"""From a loss to a trained model.

`step` is one optimizer step, compiled; `loop` repeats it and never lets the device wait; `run` is a
training run as every stage has it: opened or resumed, measured, saved, stopped. `optim` holds
optimizers and schedules, `checkpoint` what is written and read back bit for bit, `metrics` what is
logged, `finetune` what the stages after pretraining add.
"""

from lib.train.loop import Step, Watch, lr_at, steps
from lib.train.step import (
    TrainState,
    init_state,
    make_train_step,
    state_template,
    token_losses_on,
    train_step,
)

__all__ = [
    "Step",
    "TrainState",
    "Watch",
    "init_state",
    "lr_at",
    "make_train_step",
    "state_template",
    "steps",
    "token_losses_on",
    "train_step",
]
