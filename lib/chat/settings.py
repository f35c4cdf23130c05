"""The settings that every way of talking shares, and the model that they name."""

from dataclasses import dataclass
from pathlib import Path

from lib.files import local_path
from lib.model import quantized
from lib.runs import Model, load_model, open_run


@dataclass(frozen=True)
class Which:
    """Which model."""

    run: str = ""
    """run folder, runs/NAME or a path; empty for the newest"""
    stage: str = ""
    """base, mid, sft or rl; empty for the furthest that the run has"""
    ckpt: str = ""
    """empty for the newest checkpoint, best, or a checkpoint's path or address"""

    def folder(self) -> Path:
        """The run folder; UserError where there is none."""
        if "/" in self.run or self.run == "~":
            return local_path(self.run)
        return open_run(self.run, needs="tokenizer.json")

    def load(self) -> Model:
        """The model, its parameters on the device."""
        return load_model(self.folder(), self.ckpt, self.stage)


@dataclass(frozen=True)
class Writing:
    """How it writes."""

    int8: bool = False
    """decode with the matrices as 8-bit integers; `python -m benchmarks.decode --run RUN` measures
    what that costs and brings here"""
    speculate: int = 0
    """tokens to draft ahead from what was said before, checked all at once: the same text, faster
    where it repeats itself; 0 for none"""

    def weights(self, model: Model):
        """The model's parameters in the form that it writes with."""
        return quantized(model.params, model.config) if self.int8 else model.params
