"""A GPU's kernels, tried beside the formulas they stand for before a model takes them."""

import warnings

import jax
import numpy as np

from lib.files import first_line


def told_fault(what: str, by_kernels, by_formulas, shapes) -> str:
    """Why `what` is done by XLA on this GPU, told in a warning; "" where the kernels compile and
    give the formulas' numbers, of drawn arrays with these shapes.
    """
    rng = np.random.default_rng(0)
    numbers = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def differ(dtype: str, by: float) -> bool:
        arrays = [a.astype(dtype) for a in numbers]
        given = {by_kernels: arrays, by_formulas: [a.astype("float32") for a in arrays]}
        # compiled and called with numbers, as all may be happening while a program is traced
        got, want = (jax.jit(f).lower(*a).compile()(*a) for f, a in given.items())
        pairs = zip(map(np.asarray, got), map(np.asarray, want))
        return not all(np.allclose(a.astype("float32"), b, atol=by) for a, b in pairs)

    try:
        wrong = differ("float32", 1e-4) or differ("bfloat16", 0.05)
        found = "they give other numbers than XLA" if wrong else ""
    except Exception as e:  # whatever Triton says on a card that nobody tried
        found = first_line(e)
    if found:
        warnings.warn(f"{what} by XLA, not by our kernels: {found}", stacklevel=3)
    return found
