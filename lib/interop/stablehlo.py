"""A model as StableHLO, the compiler's own language: it runs where XLA does, without our code.

A folder holds three functions, each for cpu, cuda and tpu in one file, the weights beside them, and
a program of fifty lines that runs them:

- forward(weights, tokens (b, T)) -> logits (b, T, V), for any number of rows b
- start() -> cache, empty
- step(weights, cache, token) -> (logits (V,), cache), for one row

With the weights inside, forward and step take none, and each file is a whole model.
"""

import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from lib import model
from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, save_tensors, to_json
from lib.interop import proof
from lib.interop.packages import optional
from lib.interop.plain import check_size
from lib.params import path_name

FORMAT = "stablehlo"
EXTRA = "stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")
RUNNER = Path(__file__).with_name("stablehlo_run.py")


def export(params, config: Config, tokenizer: Tokenizer, folder) -> proof.Proof:
    """Write the folder, prove it in a process that knows nothing of us, then put it in place."""
    return _export(params, config, tokenizer, folder, inside=False)


def export_inside(params, config: Config, tokenizer: Tokenizer, folder) -> proof.Proof:
    """The same with the weights inside each file; UserError where they are too large for one."""
    check_size(params, config, "StableHLO")
    return _export(params, config, tokenizer, folder, inside=True)


def _export(params, config: Config, tokenizer: Tokenizer, folder, inside: bool) -> proof.Proof:
    optional(EXTRA, "flatbuffers")
    return proof.proved(
        folder,
        lambda draft: write(params, config, tokenizer, draft, inside),
        lambda draft: prove(params, config, draft, inside),
    )


def write(params, config: Config, tokenizer: Tokenizer, folder: Path, inside: bool = False):
    """The functions, the weights, our config and tokenizer, and the program that runs them."""
    # what is computed, once for all platforms
    named, tree = named_weights(params)
    for name, exported in functions(config, named, tree, inside).items():
        (folder / f"{name}.stablehlo").write_bytes(exported.serialize())
    # what it is computed with
    if not inside:
        arrays = {name: np.asarray(leaf) for name, leaf in named.items()}
        save_tensors(arrays, folder / "weights.safetensors")
    (folder / "config.json").write_text(to_json(config.to_dict()))
    tokenizer.save(folder / "tokenizer.json")
    shutil.copyfile(RUNNER, folder / "run.py")


def named_weights(params) -> tuple[dict, Any]:
    """(the leaves by path, such as blocks.wq; how to put them together again)."""
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    return {path_name(path): leaf for path, leaf in flat}, tree


def functions(
    config: Config, named: dict, tree, inside: bool = False
) -> dict[str, jax_export.Exported]:
    """The exported functions by name; what they compute is float32 on every platform.

    inside: the weights are constants of theirs, not their first argument.
    """
    config = proof.exact(config)
    order = list(named)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in named.items()}

    def together(weights):
        return jax.tree.unflatten(tree, [weights[name] for name in order])

    def forward(weights, tokens_BT):
        return model.forward(together(weights), config, tokens_BT)[0]

    # a cache as a plain dict: a file knows no types of ours
    def start():
        return model.init_cache(config, 1, config.sequence_len)._asdict()

    def step(weights, cache, token):
        tokens_BT = token[None, None]
        cache = model.Cache(**cache)
        logits_BTV, cache = model.forward(together(weights), config, tokens_BT, cache)
        return logits_BTV[0, 0], cache._asdict()

    # the number of rows stays open; a row is as long as the context
    rows = jax_export.symbolic_shape(f"b, {config.sequence_len}")
    tokens = jax.ShapeDtypeStruct(rows, jnp.int32)
    token = jax.ShapeDtypeStruct((), jnp.int32)

    def exported(function, *inputs):
        return jax_export.export(jax.jit(function), platforms=PLATFORMS)(*inputs)

    def with_weights(function, *inputs):
        if inside:
            constants = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in named.items()}
            return exported(functools.partial(function, constants), *inputs)
        return exported(function, shapes, *inputs)

    return {
        "forward": with_weights(forward, tokens),
        "start": exported(start),
        "step": with_weights(step, jax.eval_shape(start), token),
    }


# ---- the proof -----------------------------------------------------------------------------------

# runs in a process of its own, which may import run.py and nothing of ours
PROGRAM = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import run
inputs = np.load(sys.argv[2])
logits = run.function("forward")(*run.weights(), inputs["tokens"])
written = run.write(inputs["prompt"].tolist(), int(inputs["count"]))
assert not any(name == "lib" or name.startswith("lib.") for name in sys.modules)
np.savez(sys.argv[3], logits=np.asarray(logits), written=written)
"""


def prove(params, config: Config, folder: Path, inside: bool = False) -> proof.Proof:
    """Run the files in a fresh process and compare logits and greedy tokens."""
    tokens_BT = np.random.default_rng(0).integers(config.vocab_size, size=(2, config.sequence_len))
    prompt, count = proof.greedy_prompt(config)
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        np.savez(inputs, tokens=tokens_BT.astype(np.int32), prompt=prompt, count=count)
        words = [sys.executable, "-c", PROGRAM, str(folder.resolve()), str(inputs), str(outputs)]
        done = subprocess.run(words, cwd=scratch, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "it did not say why").splitlines()[-1]
            raise UserError(f"the {FORMAT} export was not kept: it does not run ({last})")
        results = np.load(outputs)
        logits, written = results["logits"], results["written"].tolist()

    # what running it has left there
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    ours = proof.our_logits(params, config, tokens_BT)
    difference, bound = proof.apart(ours, logits)
    where = "inside" if inside else "beside"
    return proof.Proof(
        format=f"{FORMAT} (for {', '.join(PLATFORMS)}; float32, weights {where})",
        path=folder,
        bytes=proof.folder_size(folder),
        seconds=0.0,
        difference=difference,
        bound=bound,
        greedy=proof.agreeing(proof.our_greedy(params, config), written),
        lost=(f"seen running on {jax.default_backend()} alone; for the others it is only lowered",),
    )
