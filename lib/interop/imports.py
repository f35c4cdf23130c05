"""Open weights become a run: a tokenizer, a config and a base checkpoint, as if trained here."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib import hub
from lib.config import Config
from lib.data.tokenizer import FILE, Tokenizer
from lib.files import UserError, choose, first_line, local_path, read_json, writing
from lib.interop import proof
from lib.interop.llama import config_from_llama, from_llama, revocabulary
from lib.interop.nanochat_files import Nanochat, is_nanochat, read_nanochat
from lib.interop.packages import optional
from lib.interop.tokenizer_import import RANKS, read_tokenizer
from lib.runs import STAGES
from lib.train import checkpoint

CONFIG = "config.json"
# what a model's repository holds that is read here
WANTED = (
    CONFIG,
    "tokenizer.json",
    *RANKS,
    "tokenizer_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    # nanochat's
    "model_*.pt",
    "meta_*.json",
    "tokenizer.pkl",
)

# what 04 teaches with: tokens of a step, for its mixtures are small beside a large model's text,
# and AdamW's rate of a Llama, which takes one for all its weights
TEACHING_BATCH = 2**14
TEACHING_RATE = 3e-4


class Imported(NamedTuple):
    """A model that came in; theirs[i] is the old id of its id i, lost what is not as it was."""

    params: dict
    config: Config
    tokenizer: Tokenizer
    theirs: np.ndarray
    lost: tuple[str, ...]


def import_run(source: str, run, sequence_len: int = 0, prove: bool = True, stage: str = "") -> str:
    """Make a run folder of somebody's model; what came in and how it was compared, as text.

    source: a folder, or hf:USER/NAME (hf:USER/NAME@REVISION), of a Llama or of nanochat's.
    sequence_len: as in `config_from_llama`. prove: compare logits with transformers (extra hf)
    before anything is kept. stage: of nanochat's. UserError where the model is of a kind that we
    have not, and where the run has a model already.
    """
    run = Path(run)
    taken = [name for name in (FILE, *STAGES.values()) if (run / name).exists()]
    if taken:
        raise UserError(f"{run} has a {taken[0]} already: choose another --run")
    if stage:
        choose("stage", stage, STAGES)

    # everything is read and compared before a file is written
    folder = fetch(source)
    if is_nanochat(folder):
        return _import_nanochat(read_nanochat(folder, source, stage), source, run)
    model = read_model(folder, source, sequence_len)
    lines = [f"imported {source}: {model.config.n_layer} layers, {model.config.n_embd} wide"]
    if prove:
        lines.append(compared(model, folder))
    lines += [f"not as it was: {sentence}" for sentence in model.lost]

    kept = Kept(model.params, teachable(model.config), model.tokenizer)
    path = keep(run, kept, source)
    return "\n".join([*lines, f"kept as {path}"])


def teachable(config: Config) -> Config:
    """The config with a batch, and for AdamW with rates, by which 04's mixtures teach a model."""
    rows = max(1, TEACHING_BATCH // config.sequence_len // config.microbatch) * config.microbatch
    config = config.replace(total_batch_size=rows * config.sequence_len)
    if config.optimizer != "adamw":
        return config
    # our own tables are normed and bear large steps, theirs are destroyed by them
    scale = config.batch_lr_scale * math.sqrt(768 / config.n_embd)
    rate = TEACHING_RATE / scale
    return config.replace(adamw_lr=rate, embedding_lr=rate, unembedding_lr=rate)


class Kept(NamedTuple):
    """A model as it goes into a run folder; stages: it is put down as each of them."""

    params: dict
    config: Config
    tokenizer: Tokenizer
    step: int = 0
    stages: tuple[str, ...] = ("base",)


def keep(run: Path, model: Kept, source: str) -> Path:
    """Write a run like any other; the path of its first checkpoint.

    All of it is there in the end, or nothing: a disk may be full in the middle.
    """
    # beside its place first, so that what stands in the folder already stays
    draft = run.with_name(f".{run.name}.import")
    try:
        with writing(run):
            shutil.rmtree(draft, ignore_errors=True)
            _write(draft, model, source)
            run.mkdir(parents=True, exist_ok=True)
            # the config comes last, for it is what a run is found by
            parts = sorted(draft.iterdir(), key=lambda part: part.name == CONFIG)
            for part in parts:
                os.replace(part, run / part.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Path(checkpoint.path_of(run / STAGES[model.stages[0]], model.step))


def _write(run: Path, model: Kept, source: str):
    """The files of a run: tokenizer, checkpoints, config."""
    model.tokenizer.save(run / FILE)
    meta = dict(
        config=model.config.to_dict(),
        tokenizer=model.tokenizer.fingerprint,
        # the text that measurements and mixtures of text take where none is named
        settings=dict(source="stdlib", packing="bestfit", shards=8),
        imported=source,
    )
    for stage in model.stages:
        checkpoint.save(run / STAGES[stage], model.step, {"params": model.params}, meta)
    model.config.save(run / CONFIG)


def _import_nanochat(model: Nanochat, source: str, run: Path) -> str:
    """Keep a model of nanochat's: as base, where 04 begins, and as what it was trained to be."""
    stages = tuple(dict.fromkeys(["base", model.stage]))
    config = teachable(model.config)
    kept = Kept(model.params, config, model.tokenizer, model.step, stages)
    path = keep(run, kept, source)
    lines = [
        f"imported {source}, nanochat's model at step {model.step}: {config.n_layer} layers, "
        f"{config.n_embd} wide, as {' and '.join(stages)}"
    ]
    if model.val_bpb is not None:
        lines.append(f"nanochat measured {model.val_bpb:.4f} bits per byte on its own text")
    return "\n".join([*lines, f"kept as {path}"])


def fetch(source: str) -> Path:
    """The folder of a model, downloaded from the Hub where `source` is hf:USER/NAME."""
    if not source.startswith("hf:"):
        folder = local_path(source)
        if not (folder / CONFIG).exists() and not is_nanochat(folder):
            raise UserError(
                f"{folder} holds no config.json and no model_STEP.pt: give the folder of one model "
                "(of nanochat's such as base_checkpoints/d20), or hf:USER/NAME"
            )
        return folder

    import huggingface_hub

    repo, revision = hub.parse(source)
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision or None, allow_patterns=list(WANTED)
        )
    except Exception as e:
        raise UserError(
            f"cannot fetch {source} ({first_line(e)}): check its name, the network and, for a "
            "model behind a licence, your token"
        ) from e
    folder = Path(folder)
    if not (folder / CONFIG).exists() and not is_nanochat(folder):
        raise UserError(f"{source} holds no model of a kind that comes in here: check its name")
    return folder


def read_model(folder: Path, source: str, sequence_len: int = 0) -> Imported:
    """The model in a folder as transformers writes it: weights, config and tokenizer."""
    settings = read_json(folder / CONFIG, cure="get it again")
    config = config_from_llama(settings, sequence_len)
    # some begin documents with what ends them
    bos = settings.get("bos_token_id")
    if bos is None:
        bos = settings.get("eos_token_id")
    bos = bos[0] if isinstance(bos, list) else bos
    vocabulary = read_tokenizer(folder, bos, source, settings["model_type"])
    if vocabulary.theirs.max() >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has the id {vocabulary.theirs.max()}, its tables only "
            f"{config.vocab_size} rows: they do not belong together"
        )
    # in their order of ids first, then in ours
    params, config = from_llama(read_tensors(folder), config)
    params, config = revocabulary(params, config, vocabulary.theirs)
    return Imported(params, config, *vocabulary)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder's safetensors files as float32, whatever they are stored in."""
    from safetensors import SafetensorError, safe_open

    # large models come in several files, and an index says in which
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index, cure="get it again").get("weight_map", {}).values()))
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        path = folder / name
        # an index of a stranger's may point anywhere
        if Path(name).name != name or not path.exists():
            raise UserError(f"{folder} lacks {name}: get all files of the model")
        try:
            # numpy has no bfloat16, jax has
            file: Any
            with safe_open(path, framework="flax") as file:
                for key in file.keys():
                    tensors[key] = np.asarray(file.get_tensor(key), np.float32)
        except SafetensorError as e:
            raise UserError(f"{path} is damaged ({first_line(e)}): get it again") from e
    return tensors


def compared(model: Imported, folder: Path) -> str:
    """How transformers' logits and ids agree with ours; UserError where the logits do not."""
    try:
        torch, transformers = optional("hf", "torch", "transformers")
    except UserError as e:
        raise UserError(f"{e}, or pass --no-prove to import it without a comparison") from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as e:
        raise UserError(f"transformers cannot open {folder}: {first_line(e)}") from e

    # ids that both have, each in its own numbering
    known = np.flatnonzero(model.theirs >= 0)
    picks = np.random.default_rng(0).integers(len(known), size=(2, 64))
    tokens_BT = known[picks][:, : model.config.sequence_len]
    with torch.no_grad():
        output = network.eval()(torch.as_tensor(model.theirs[tokens_BT])).logits.numpy()
    # the same tokens, and of their logits those of the tokens that we have
    ours = proof.our_logits(model.params, model.config, tokens_BT)[..., known]
    difference, bound = proof.apart(ours, output[..., model.theirs[known]])
    if difference > bound:
        raise UserError(
            f"{folder} was not imported: its logits are up to {difference:.1e} from ours "
            f"(allowed {bound:.1e})"
        )

    # the tokenizer is compared too, and how far it agrees is only told
    texts = proof.probe_texts()
    equal = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        equal += list(ids) == model.theirs[model.tokenizer.encode(text)].tolist()
    return (
        f"compared with transformers: largest logit difference {difference:.1e} (may be "
        f"{bound:.1e}), {equal} of {len(texts)} texts of equal ids"
    )
