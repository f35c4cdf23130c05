"""Optimizers and schedules: Muon or AdamW on the block matrices, AdamW on everything else.

Rates and schedule parameters live in the optimizer state, not in the compiled program, so runs of
equal shapes that differ only in those (`compile_key`) can share one compiled train step.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lib.config import Config
from lib.parallel.collectives import each_layer
from lib.params import is_spec, param_specs, path_name

# beta1, beta2 and weight decay of the groups that always get AdamW (nanochat's)
ADAMW_GROUPS = {
    "embed": (0.8, 0.995, 0.001),
    "value_embed": (0.8, 0.995, 0.01),
    "head": (0.8, 0.96, 0.01),
    "resid": (0.8, 0.95, 0.05),
    "x0": (0.96, 0.95, 0.0),
    "smear": (0.8, 0.95, 0.0),
}
# quintics whose composition sends singular values to about 1 (Polar Express, arXiv:2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


MOMENTUM_STEPS = 400  # over which Muon's momentum rises


# ---- schedules: of a step in 0..num_steps; float64 for plain numbers, float32 for traced ones ----


def _library(*numbers):
    """jax.numpy if one of them is traced, else numpy."""
    if any(isinstance(number, jax.Array) for number in numbers):
        return jnp
    return np


def _left(xp, step, num_steps, warmdown_ratio):
    """How much of the way down is left: 1 where it begins, 0 at its end, above 1 before."""
    warmdown_steps = xp.maximum(xp.round(warmdown_ratio * num_steps), 1)
    return (num_steps - step) / warmdown_steps


def lr_multiplier(step, num_steps, warmup_steps, warmdown_ratio, final_lr_frac):
    """What multiplies every learning rate: up, level, and down.

    Linear up to 1 over `warmup_steps`, 1, then linear to `final_lr_frac` over the last
    `warmdown_ratio` of all.
    """
    xp = _library(step, num_steps, warmup_steps, warmdown_ratio, final_lr_frac)
    up = (step + 1) / xp.maximum(warmup_steps, 1)
    # whatever comes behind the end goes on as it, and never up the loss
    left = xp.maximum(_left(xp, step, num_steps, warmdown_ratio), 0)
    down = left + (1 - left) * final_lr_frac
    after = xp.where(left >= 1, 1.0, down)
    return xp.where(step < warmup_steps, up, after)


def muon_momentum(step, num_steps, warmdown_ratio):
    """0.85 to 0.97 over the first 400 steps, back to 0.90 while the learning rate goes down."""
    xp = _library(step, num_steps, warmdown_ratio)
    up = 0.85 + 0.12 * step / MOMENTUM_STEPS
    left = _left(xp, step, num_steps, warmdown_ratio)
    down = 0.90 + 0.07 * xp.minimum(left, 1)
    return xp.where(step < MOMENTUM_STEPS, up, down)


def muon_weight_decay(step, num_steps, weight_decay):
    """Half a cosine from `weight_decay` to 0."""
    xp = _library(step, num_steps, weight_decay)
    return weight_decay * 0.5 * (1 + xp.cos(xp.pi * step / num_steps))


def group_lrs(config: Config) -> dict[str, float]:
    """The learning rate of each group before the schedule, scaled by width and by batch.

    By width as (D/768)^-0.5. Matrices and scalars do not scale with width under Muon; smear and
    backout never scale with the batch.
    """
    width = math.sqrt(768 / config.n_embd)
    batch = config.batch_lr_scale
    matrix_lr = config.matrix_lr
    if config.optimizer != "muon":
        matrix_lr = config.adamw_lr * width
    return {
        "matrix": matrix_lr * batch,
        "embed": config.embedding_lr * width * batch,
        "value_embed": config.embedding_lr * width * batch / 2,
        "head": config.unembedding_lr * width * batch,
        "resid": config.scalar_lr / 100 * batch,
        "x0": config.scalar_lr * batch,
        "smear": 0.2,
    }


# ---- updates of one weight -----------------------------------------------------------------------

# (gradient, momentum, second moment, weight) -> (what to add, momentum, second moment)


def adamw_update(g, m, v, p, *, step, lr, b1, b2, weight_decay):  # noqa: PLR0913
    """AdamW with decoupled decay; `step` counts from 1. eps 1e-10 outside the root."""
    # running means of the gradient and of its square
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * jnp.square(g)

    # They began at zero, which is corrected by 1 / (1 - b^step). Through expm1: the plain float32
    # difference loses four digits at step 1 with b2 = 0.995.
    def debias(b):
        return -1 / jnp.expm1(step * math.log(b))

    mean = debias(b1) * m
    deviation = jnp.sqrt(debias(b2) * v)
    u = mean / (deviation + 1e-10)
    return -lr * (u + weight_decay * p), m, v


def polar_express(x_LIO):
    """Nearly orthogonal matrices with the singular vectors of `x_LIO`.

    Their spectral norms must be at most 1. Each step is x <- q x with q = a + b A + c A^2 and
    A = x x^T, taken over the short side.
    """
    _, I, O = x_LIO.shape
    tall, short = I > O, min(I, O)
    exact = x_LIO.dtype == jnp.float32
    dot = functools.partial(jnp.matmul, precision="highest" if exact else None)

    def apply(q, x):
        return dot(x, q) if tall else dot(q, x)

    def gram(x):
        return dot(x.mT, x) if tall else dot(x, x.mT)

    # Where x is long it is cheaper to carry A and the product of the q's, and to touch x only
    # twice. Not in bfloat16: squared, small singular values drown in its rounding and then blow up.
    if exact and max(I, O) >= 2 * short:
        A, product = gram(x_LIO), None
        for a, b, c in POLAR_EXPRESS:
            q = a * jnp.eye(short) + b * A + c * dot(A, A)
            product = q if product is None else dot(q, product)
            A = dot(dot(A, q), q)
        return apply(product, x_LIO)

    def step(x, abc):
        a, b, c = abc
        A = gram(x)
        q = b * A + c * dot(A, A)
        return a * x + apply(q, x), None

    # a loop, not five copies, which took twice as long to compile for TPU and ran no faster on CPU
    coefficients = jnp.asarray(POLAR_EXPRESS, x_LIO.dtype)
    return jax.lax.scan(step, x_LIO, coefficients)[0]


def muon_second_moment(shape_LIO):
    """Shape of NorMuon's state: a number per output feature, or per input where those are more."""
    L, I, O = shape_LIO
    if O >= I:
        return L, 1, O
    return L, I, 1


def muon_update(g_LIO, m, v, p, *, lr, momentum, weight_decay, dtype=jnp.float32):
    """Muon for a stack of matrices, inputs by outputs, each on its own.

    Nesterov momentum, output features made equally long, orthogonalised in `dtype`, NorMuon's
    variance reduction, cautious decay, and a rate of lr * sqrt(outputs / inputs) where that is
    above lr. Zero gradients only decay. arXiv:2502.16982 (Muon), arXiv:2510.05491 (NorMuon),
    arXiv:2510.12402 (cautious decay).
    """
    _, I, O = g_LIO.shape

    # Nesterov: the momentum as it will be after one more step of this gradient
    m = momentum * m + (1 - momentum) * g_LIO
    u = (1 - momentum) * g_LIO + momentum * m

    # output features made equally long, the whole a little shorter than 1 (Frobenius)
    row_sq = jnp.sum(jnp.square(u), axis=1, keepdims=True)
    mean_row = jnp.sqrt(jnp.sum(row_sq, axis=2, keepdims=True) / O)
    scale = mean_row / jnp.maximum(jnp.sqrt(row_sq), 1e-6)
    norm = jnp.sqrt(jnp.sum(row_sq * jnp.square(scale), axis=2, keepdims=True))
    short = u * (scale / (1.01 * norm + 1e-6))

    # orthogonalised: all singular values near 1
    x = each_layer(polar_express, short.astype(dtype)).astype(jnp.float32)

    # the running mean of each line's square, had the matrix the Frobenius norm `target`
    axis = 1 if O >= I else 2
    line_sq = jnp.sum(jnp.square(x), axis=axis, keepdims=True)
    norm = jnp.sqrt(jnp.sum(line_sq, axis=(1, 2), keepdims=True))
    target = math.sqrt(min(I, O))
    line_sq = line_sq * jnp.square(target / jnp.maximum(norm, 1e-6))
    v = 0.9 * v + 0.1 * line_sq / g_LIO.shape[axis]

    # lines of large variance made smaller; this and both rescalings to `target`, before it and
    # after it, in one factor
    scale = jax.lax.rsqrt(jnp.maximum(v, 1e-10))
    restored = jnp.sqrt(jnp.sum(line_sq * jnp.square(scale), axis=(1, 2), keepdims=True))
    u = x * (scale * jnp.square(target) / jnp.maximum(norm, 1e-6) / jnp.maximum(restored, 1e-6))

    # a weight decays only where that goes the way of its update
    u += weight_decay * jnp.where(u * p >= 0, p, 0)
    rate = lr * max(1.0, math.sqrt(O / I))
    return -rate * u, m, v


# ---- the optimizers: what a weight of group "matrix" gets; all other groups get AdamW ------------


def _matrix_shape(spec):
    """(layers, inputs, outputs) of a stacked matrix.

    Which axes are inputs is the spec's to say, not the shape's.
    """
    layers, *axes = spec.shape
    inputs, outputs = axes[: spec.n_in], axes[spec.n_in :]
    return layers, math.prod(inputs), math.prod(outputs)


def _muon(spec, g, m, v, p, *, step, **now):
    """`muon_update` of a weight in its own shape."""
    shape = _matrix_shape(spec)
    u, m, v = muon_update(g.reshape(shape), m.reshape(shape), v, p.reshape(shape), **now)
    return u.reshape(p.shape), m.reshape(p.shape), v


def _adamw(spec, g, m, v, p, *, step, lr, weight_decay, momentum, dtype):  # noqa: PLR0913
    """`adamw_update` of a matrix; Muon's momentum and dtype are not for it."""
    return adamw_update(g, m, v, p, step=step, lr=lr, b1=0.9, b2=0.95, weight_decay=weight_decay)


# name: (shape of the second moment from a Spec, update as above but with the Spec before it).
# "adamw" follows the same weight decay as "muon" (config.scaled_weight_decay, down to 0 by half a
# cosine), times its own smaller learning rate.
OPTIMIZERS = {
    "muon": (lambda spec: muon_second_moment(_matrix_shape(spec)), _muon),
    "adamw": (lambda spec: spec.shape, _adamw),
}


class OptState(NamedTuple):
    """`hyper` holds float32 scalars: all that `update` knows of rates and schedules. `m` has the
    shapes of the parameters; so has `v`, but for Muon's reduced second moments.
    """

    step: jax.Array  # updates made
    hyper: dict
    m: dict
    v: dict


# fields that no compiled step knows: rates, schedules, seed
NOT_COMPILED = (
    "matrix_lr",
    "embedding_lr",
    "unembedding_lr",
    "scalar_lr",
    "adamw_lr",
    "weight_decay",
    "reference_tokens",
    "num_steps",
    "tokens_per_param",
    "warmup_steps",
    "warmdown_ratio",
    "final_lr_frac",
    "seed",
)


def hyper(config: Config, num_steps: int) -> dict:
    """The `hyper` of a fresh state.

    Put it into an old state to go on with other rates or another horizon.
    """
    values = dict(
        lr=group_lrs(config),
        weight_decay=config.scaled_weight_decay,
        num_steps=num_steps,
        warmup_steps=config.warmup_steps,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)


def compile_key(config: Config) -> Config:
    """`config` with defaults for what a compiled train step finds in its state, or not at all.

    Configs with equal keys can share one compiled step.
    """
    return config.replace(**{name: getattr(Config, name) for name in NOT_COMPILED})


def make_optimizer(config: Config, num_steps: int) -> optax.GradientTransformation:
    """The optimizer that config.optimizer names, for a horizon of `num_steps`.

    `update` needs the parameters; it returns what to add to them (optax.apply_updates) and the new
    OptState.
    """
    specs = param_specs(config)
    second_moment, matrix_update = OPTIMIZERS[config.optimizer]

    def zeros(spec):
        """The second moment of a weight that has seen no gradient."""
        shape = second_moment(spec) if spec.group == "matrix" else spec.shape
        return jnp.zeros(shape)

    def init(params):
        m = jax.tree.map(jnp.zeros_like, params)
        v = jax.tree.map(zeros, specs, is_leaf=is_spec)
        return OptState(jnp.zeros((), jnp.int32), hyper(config, num_steps), m, v)

    def update(grads, state, params):
        h, step = state.hyper, state.step

        # what the schedules say at this step
        num_steps, warmdown_ratio = h["num_steps"], h["warmdown_ratio"]
        schedule = h["warmup_steps"], warmdown_ratio, h["final_lr_frac"]
        scale = lr_multiplier(step, num_steps, *schedule)
        now = dict(
            momentum=muon_momentum(step, num_steps, warmdown_ratio),
            dtype=config.dtype,
            weight_decay=muon_weight_decay(step, num_steps, h["weight_decay"]),
        )

        def update_weight(path, spec, *arrays):
            at = dict(step=step + 1, lr=h["lr"][spec.group] * scale)
            with jax.named_scope(path_name(path)):
                if spec.group == "matrix":
                    return matrix_update(spec, *arrays, **at, **now)
                b1, b2, weight_decay = ADAMW_GROUPS[spec.group]
                return adamw_update(*arrays, **at, b1=b1, b2=b2, weight_decay=weight_decay)

        trees = specs, grads, state.m, state.v, params
        results = jax.tree_util.tree_map_with_path(update_weight, *trees, is_leaf=is_spec)

        # a tree of triples turned into three trees
        triple = jax.tree.structure((0, 0, 0))
        updates, m, v = jax.tree.transpose(jax.tree.structure(params), triple, results)
        return updates, OptState(step + 1, h, m, v)

    # optax calls it by position, and always with the parameters, which optax's type lets be None
    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
