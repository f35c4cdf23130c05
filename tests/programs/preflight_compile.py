"""Compile small steps for TPUs that aren't there; prints JSON, a line for each answer.

Called with one argument, JSON: {"config": fields, "ask": [[kind, ...], ...]}. In a process of its
own because libtpu's topologies must be the first thing that JAX meets.
"""

import json
import math
import re
import sys
from functools import partial

import jax
from jax.sharding import SingleDeviceSharding

from lib.chips import tpu_slice
from lib.config import Config
from lib.files import UserError
from lib.model.cache import write_ring
from lib.model.head import summed_loss
from lib.model.transformer import mlp
from lib.parallel.layout import make_layout
from lib.preflight.compile import (
    compile_decode,
    compile_lowered,
    inspect,
    lower_step,
    tpu_device,
    tpu_devices,
)
from lib.preflight.hlo import analyse


def refused(config, topology):
    """What is said of a topology that does not exist."""
    try:
        tpu_device(topology)
    except UserError as e:
        return str(e)


def step(config, name, strategy, microbatch):
    """The report of a step; microbatch: rows, one for each chip of the slice where 0."""
    rows = microbatch or tpu_slice(name).chips
    batch = max(rows * config.sequence_len, config.total_batch_size if microbatch else 0)
    changed = config.replace(microbatch=rows, total_batch_size=batch)
    return inspect(changed, name, strategy, cache=None).to_dict()


def copied(config, topology, strategy):
    """Numbers of the largest array that a step copies as it comes."""
    layout = make_layout(strategy, config, tpu_devices(topology))
    text = compile_lowered(lower_step(config, layout)).text
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* copy\(%param", text)
    return max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def turned(config):
    """Which of the state's value embeddings and their moments a step on one chip copies whole."""
    text = compile_lowered(lower_step(config, tpu_device("v6e:1x1"))).text
    return re.findall(r"= f32\[\S+ copy\(%(state_\w*value_embeds)", text)


def logits(config):
    """How each array of a chunk's tokens by vocabulary was written that a loss has, by dtype."""
    device = SingleDeviceSharding(tpu_device("v6e:1x1"))
    # a loop over two chunks
    width, vocabulary, rows = config.n_embd, config.padded_vocab, (2, config.loss_chunk)
    shapes = [
        jax.ShapeDtypeStruct((*rows, width), config.dtype),
        jax.ShapeDtypeStruct((width, vocabulary), "float32"),
        jax.ShapeDtypeStruct(rows, "int32"),
    ]
    losses = jax.value_and_grad(partial(summed_loss, config=config), (0, 1))
    text = compile_lowered(jax.jit(losses, in_shardings=device).lower(*shapes)).text
    # what is inside a fusion is not written
    text = re.sub(r"(?ms)^%fused_computation.*?^}", "", text)
    fusions = re.findall(r"= (.*) fusion\(", text)
    arrays = rf"(\w+)\[{config.loss_chunk},(?:{vocabulary}|{config.vocab_size})\]"
    return sorted(dtype for written in fusions for dtype in re.findall(arrays, written))


def activated(config):
    """How often a gated mlp's activation is computed, forward and backward."""
    device = SingleDeviceSharding(tpu_device("v6e:1x1"))
    width, wide = config.n_embd, config.mlp_dim
    shapes = {"w_in": (width, wide), "w_gate": (width, wide), "w_out": (wide, width)}
    weights = {name: jax.ShapeDtypeStruct(shape, config.dtype) for name, shape in shapes.items()}
    rows = jax.ShapeDtypeStruct((1, 1024, width), config.dtype)

    def total(x_BTD, w):
        return mlp(x_BTD, w, config).astype("float32").sum()

    gradients = jax.jit(jax.value_and_grad(total, (0, 1)), in_shardings=device)
    return compile_lowered(gradients.lower(rows, weights)).text.count(" exponential(")


def decode(config, rows, length):
    """The decoding of a token."""
    return compile_decode(config, tpu_device("v6e:1x1"), rows, length)


def write(config, rows, slots, heads):
    """(bytes moved by writing one key a row into a ring that is given away, bytes of the ring)."""
    shapes = [
        jax.ShapeDtypeStruct((rows * heads, slots, config.head_dim), config.dtype),
        jax.ShapeDtypeStruct((rows, 1, heads, config.head_dim), config.dtype),
        jax.ShapeDtypeStruct((rows, 1), "int32"),
        jax.ShapeDtypeStruct((rows,), "int32"),
    ]
    device = SingleDeviceSharding(tpu_device("v6e:1x1"))
    written = jax.jit(write_ring, donate_argnums=0, in_shardings=device, out_shardings=device)
    text = compile_lowered(written.lower(*shapes)).text
    moved = sum(work.bytes for work in analyse(text).components.values())
    return [moved, shapes[0].size * shapes[0].dtype.itemsize]


def cores(config, topology):
    """(cores of a device, devices) of a topology."""
    devices = tpu_devices(topology)
    return [getattr(devices[0], "num_cores", 1), len(devices)]


KINDS = dict(
    refused=refused,
    step=step,
    copied=copied,
    turned=turned,
    logits=logits,
    activated=activated,
    decode=decode,
    cores=cores,
    write=write,
)
request = json.loads(sys.argv[1])
for kind, *arguments in request["ask"]:
    print(json.dumps(KINDS[kind](Config(**request["config"]), *arguments)), flush=True)
