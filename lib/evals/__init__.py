"""Measurements of a trained model, each with its error: what it foresees, knows and answers.

`bits` per byte of text, `likelihood` of given continuations, `questions` of tasks put to it, `core`
(DCLM's benchmark), `contamination` of tests by training text, `stats` that say how sure all that
is, and `harness`, which lends the model to lm-evaluation-harness.
"""

from lib.evals.bits import Bits, bits_by_kind, bits_per_byte, token_losses

__all__ = ["Bits", "bits_by_kind", "bits_per_byte", "token_losses"]
