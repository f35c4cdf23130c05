"""Compiles, for TPUs that aren't there, the programs that the notebooks compile on them.

A replica's Python runs it in the folder that the notebooks fetched, after their set-up:

    python tests/colab/steps.py v5e-1 --layers 1

Each program is the notebook's own function at the sizes that the notebook picks for that chip.
--layers cuts only the number of layers (0: all of them), for one is compiled like the next. With
one layer only pretraining and decoding are compiled: a minute and a half of one core. Prints a line
of JSON for each: notebook, program, chip, preset, attention, kernels, seconds, peak (GiB).
"""

import argparse
import json
import math

import jax

from lib import model
from lib.chips import tpu_slice
from lib.config import Config
from lib.generate import engine
from lib.generate.decode import decode as decode_rows
from lib.generate.decode import prefill as prefill_rows
from lib.generate.sampling import empty_rows
from lib.model.kernels import compiled_kernels
from lib.parallel.layout import make_layout
from lib.preflight import compile as deviceless
from lib.recipes import pick_preset
from lib.sweeps import presets, space
from lib.train.finetune import phase_config
from lib.train.optim import compile_key
from lib.train.step import state_template

ROWS = 8  # decoded together
LENGTH = 1024  # tokens that their caches hold
GIB = 2**30


def sized(config: Config, layers: int) -> Config:
    """`config` with only so many layers, and with auto named for a TPU."""
    if layers:
        config = config.replace(n_layer=min(layers, config.n_layer))
    return deviceless.as_compiled(config)


def pretraining(config: Config, devices):
    """02's step; over several chips in the layout that it takes there."""
    if len(devices) == 1:
        return deviceless.lower_step(config, devices[0])
    config = config.replace(microbatch=config.microbatch * len(devices))
    return deviceless.lower_step(config, make_layout("zero", config, devices))


def trial(layers: int, device):
    """03's step of its default sweep on an accelerator: the first trial's."""
    sweep = presets.preset("search", "chip")
    config = space.config_of(space.constants(sweep) | {"vocab_size": 32768})
    return deviceless.lower_step(sized(config, layers), device)


def decoding(config: Config, device):
    """(prefill, decode): what 02's samples, 04's answers, the chat and the server run."""
    params = jax.eval_shape(
        lambda p: model.decoding_params(p, config), state_template(config).params
    )
    cache = jax.eval_shape(lambda: model.init_cache(config, ROWS, LENGTH))
    rows = jax.eval_shape(lambda: empty_rows(ROWS, config.vocab_size))
    numbers = jax.ShapeDtypeStruct((ROWS,), "int32")
    prompts = jax.ShapeDtypeStruct((ROWS, engine.PREFILL), "int32")
    forced = jax.ShapeDtypeStruct((ROWS, engine.WHOLE_CHUNK), "int32")
    scalar = jax.ShapeDtypeStruct((), "int32")

    placed = deviceless._on(device, (params, cache, rows, numbers, prompts, forced, scalar))
    params, cache, rows, numbers, prompts, forced, scalar = placed
    prefill = prefill_rows.lower(params, config, cache, numbers, prompts, True)
    decode = decode_rows.lower(params, config, cache, rows, forced, scalar, pause=-1)
    return prefill, decode


def measuring(config: Config, device):
    """The losses of held-out tokens: 04's bits per byte and CORE, 02's validation."""
    params = state_template(config).params
    tokens = jax.ShapeDtypeStruct((config.microbatch, config.sequence_len), "int32")
    params, tokens = deviceless._on(device, (params, tokens))
    losses = jax.jit(model.token_losses, static_argnames="config")
    with compiled_kernels():
        return losses.lower(params, config, tokens, tokens)


def programs(chip: str, layers: int):
    """(notebook, program, config, what was lowered) of all that run on `chip`."""
    devices = deviceless.tpu_devices(tpu_slice(chip).topology)
    device = dict(platform="tpu", kind=devices[0].device_kind, count=len(devices))
    preset = pick_preset(device).name
    config = sized(Config.preset(preset), layers)
    yield "02", "train", preset, config, pretraining(config, devices)

    # fine-tuning changes rates and horizon alone, so it runs the very program of pretraining
    # (on a CPU, as here, it leaves logits out as well)
    tuned = phase_config(config, num_steps=10, lr=0.3).replace(skip_ignored=False)
    assert compile_key(tuned) == compile_key(config)
    prefill, decode = decoding(config, devices[0])
    yield "04", "prefill", preset, config, prefill
    yield "04", "decode", preset, config, decode
    if layers == 1:
        return

    # what is too slow to be compiled each time
    yield "04", "measure", preset, config, measuring(config, devices[0])
    yield "03", "train", "search", config, trial(layers, devices[0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("chip")
    parser.add_argument("--layers", type=int, default=0)
    args = parser.parse_args()
    for notebook, program, preset, config, lowered in programs(args.chip, args.layers):
        compiled = deviceless.compile_lowered(lowered)
        peak = math.nan if compiled.program is None else compiled.peak / GIB
        line = dict(notebook=notebook, program=program, chip=args.chip, preset=preset)
        line |= dict(attention=config.attention, kernels=compiled.text.count("tpu_custom_call"))
        line |= dict(seconds=round(compiled.seconds, 1), peak=round(peak, 2))
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
