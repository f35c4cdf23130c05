"""What the products of one token cost by how they are written: `python -m benchmarks.one_token`.

A token reads every matrix once, so memory's speed is the bound. Layers of nothing but norms, the
four products and residual sums, in a loop like that of decoding; each way of writing a product is
compiled twice, without and with the whole loop as a CUDA graph.
"""

import time
from dataclasses import dataclass
from functools import partial

import tyro

# what of a program becomes CUDA graphs: the default, or loops and conditions too
LOOPS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
GRAPHS = {"parts": {}, "loops": {"xla_gpu_enable_command_buffer": LOOPS}}


@dataclass
class Args:
    layers: int = 20
    """Layers, each with weights of its own"""
    width: int = 1280
    """Of the residual stream; the mlp is four times as wide"""
    rows: int = 1
    """Rows that are decoded together"""
    tokens: int = 64
    """Turns of the loop"""


def weights_of(args: Args) -> tuple[list, list]:
    """Each layer's matrices as (outputs, inputs), and the same as (inputs, outputs)."""
    import jax
    import jax.numpy as jnp

    D = args.width
    shapes = dict(qkv=(3 * D, D), wo=(D, D), w_in=(4 * D, D), w_out=(D, 4 * D))
    keys = iter(jax.random.split(jax.random.key(0), args.layers * len(shapes)))
    by_output, by_input = [], []
    for _ in range(args.layers):
        w, turned = {}, {}
        for name, shape in shapes.items():
            w[name] = jax.random.normal(next(keys), shape, jnp.bfloat16) * shape[1] ** -0.5
            turned[name] = jnp.array(w[name].T)
        by_output.append(w)
        by_input.append(turned)
    return by_output, by_input


def decode(x_BD, layers: list, product, tokens: int):
    """Some tokens' way through the layers, each beginning with what came out of the one before."""
    import jax
    import jax.numpy as jnp

    def norm(x):
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
        return (x32 * scale).astype(x.dtype)

    def one(_, x):
        for w in layers:
            # in place of attention something that needs all of q, k and v
            q, k, v = jnp.split(product(norm(x), w["qkv"]), 3, axis=-1)
            x = x + product(q * k + v, w["wo"])
            a = jnp.square(jax.nn.relu(product(norm(x), w["w_in"])))
            x = x + product(a, w["w_out"])
        return norm(x)

    return jax.lax.fori_loop(0, tokens, one, x_BD)


def as_sums(x_BI, w_OI):
    """A product without a product."""
    import jax.numpy as jnp

    rows = [(w_OI.astype(jnp.float32) * x_I.astype(jnp.float32)).sum(-1) for x_I in x_BI]
    return jnp.stack(rows).astype(x_BI.dtype)


def seconds(compiled, *args) -> list[float]:
    """Of five calls, after one that doesn't count."""
    import jax

    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - begun)
    return times


def main(args: Args):
    import jax
    import jax.numpy as jnp

    by_output, by_input = weights_of(args)
    ways = {
        "inputs first": (by_input, jnp.matmul),
        "outputs first": (by_output, lambda x, w: jnp.einsum("BI,OI->BO", x, w)),
        "outputs first, sums": (by_output, as_sums),
    }
    read = sum(a.nbytes for a in jax.tree.leaves(by_output))
    x_BD = jax.random.normal(jax.random.key(1), (args.rows, args.width), jnp.bfloat16)
    print(f"{jax.devices()[0].device_kind}, {args.rows} rows, {read / 1e6:.0f} MB a token")
    for name, (layers, product) in ways.items():
        # the weights are arguments: as constants they would be turned when compiling
        run = partial(decode, product=product, tokens=args.tokens)
        for graphs, options in GRAPHS.items():
            times = seconds(jax.jit(run, compiler_options=options), x_BD, layers)
            best, worst = min(times) / args.tokens, max(times) / args.tokens
            took = f"{1e6 * best:8.1f} us a token (worst {1e6 * worst:.1f})"
            print(f"{name:20} graphs of {graphs}{took}, {read / best / 1e9:6.0f} GB/s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
