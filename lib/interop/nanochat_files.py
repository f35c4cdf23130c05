"""nanochat's checkpoints: model_STEP.pt, meta_STEP.json and tokenizer.pkl, as a model of ours."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import Config
from lib.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from lib.files import UserError, read_bytes, read_json
from lib.interop.nanochat import from_nanochat, read_config
from lib.interop.torch_file import read_torch, unpickle

MODEL = re.compile(r"model_(\d+)\.pt")
TOKENIZER = "tokenizer.pkl"

# its folders of models, and which stage of ours each is
FOLDERS = {
    "base_checkpoints": "base",
    "mid_checkpoints": "mid",
    "chatsft_checkpoints": "sft",
    "chatrl_checkpoints": "rl",
}


class Nanochat(NamedTuple):
    """A model of nanochat's in our terms."""

    params: dict
    config: Config
    tokenizer: Tokenizer
    step: int
    stage: str
    val_bpb: float | None


class Encoding:
    """What a pickle of tiktoken's Encoding becomes: its state, and nothing that runs."""

    state: Any = None

    def __setstate__(self, state):
        self.state = state


def _bytes(text: str, encoding: str) -> bytes:
    """How old pickles spell bytes."""
    return text.encode("latin-1")


NAMES = {
    ("tiktoken.core", "Encoding"): Encoding,
    ("tiktoken", "Encoding"): Encoding,
    ("_codecs", "encode"): _bytes,
}


def is_nanochat(folder: Path) -> bool:
    """Whether a folder holds a model as nanochat saves them."""
    return bool(_steps(folder))


def _steps(folder: Path) -> dict[int, str]:
    """{step: file} of the models in a folder."""
    matches = [MODEL.fullmatch(path.name) for path in folder.glob("model_*.pt")]
    return {int(match[1]): match[0] for match in matches if match}


def read_nanochat(folder: Path, source: str, stage: str = "") -> Nanochat:
    """The newest model in a folder, and the tokenizer that stands there or where nanochat keeps it.

    stage: which of ours it is; by default what the folder's name or its metadata say. UserError
    where a part is missing, damaged, of a form that we have not, or runs programs.
    """
    steps = _steps(folder)
    step = max(steps)
    meta = read_json(folder / f"meta_{steps[step][6:-3]}.json", cure="get all files of the model")
    settings = meta.get("model_config")
    if not isinstance(settings, dict):
        raise UserError(f"the meta of {source} at step {step} tells no model_config: get it again")

    # weights say which of nanochat's forms they are
    tensors = read_torch(folder / steps[step])
    config = read_config(settings, tensors)
    tokenizer = read_pickled(_tokenizer_file(folder, source))
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} ids, its model "
            f"{config.vocab_size}: they do not belong together"
        )
    loss = meta.get("val_bpb")
    return Nanochat(
        params=from_nanochat(tensors, config),
        config=config,
        tokenizer=tokenizer,
        step=step,
        stage=stage or _stage(folder, meta),
        val_bpb=loss if isinstance(loss, float) else None,
    )


def _stage(folder: Path, meta: dict) -> str:
    """The stage that a model is of: by its folder, else by what only pretraining notes."""
    named = FOLDERS.get(folder.resolve().parent.name)
    return named or ("base" if "max_seq_len" in meta else "sft")


def _tokenizer_file(folder: Path, source: str) -> Path:
    """tokenizer.pkl beside the model, or in the folder where nanochat keeps it."""
    beside = folder / TOKENIZER
    kept = folder.resolve().parents[1] / "tokenizer" / TOKENIZER
    for path in (beside, kept):
        if path.exists():
            return path
    raise UserError(
        f"{source} has no {TOKENIZER}, beside the model or in ../../tokenizer: copy it there"
    )


def read_pickled(path: Path) -> Tokenizer:
    """The Tokenizer in a pickle of tiktoken's Encoding."""
    held = unpickle(read_bytes(path), NAMES, path)
    state = held.state if isinstance(held, Encoding) else None
    if isinstance(state, str):
        raise UserError(f"{path} only names the tokenizer {state}: train with tiktoken:{state}")
    keys = ("pat_str", "mergeable_ranks", "special_tokens")
    if not isinstance(state, dict) or not all(key in state for key in keys):
        raise UserError(f"{path} holds no tokenizer of nanochat's: get it again")

    # ranks are ids, and special tokens stand behind them in our order
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    ours = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    if special != ours or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path} orders its tokens otherwise than nanochat does, or has other special tokens: "
            "it cannot come in"
        )
    tokens = tuple(sorted(ranks, key=lambda token: ranks[token]))
    made = Tokenizer(state["pat_str"], tokens, {"source": "nanochat"})
    # read back as a stranger's: it must hold all bytes and give texts back in time
    return Tokenizer.from_json(made.to_json(), path)
