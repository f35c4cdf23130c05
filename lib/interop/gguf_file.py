"""A model as one GGUF file, for llama.cpp and what is built on it: Ollama, LM Studio, phones.

llama.cpp computes what its list of architectures says, so only plain models fit: `llama`, `qwen3`
and `arcee`. It splits text into words by patterns of its own list too; where none makes our ids of
a text, the export says so. The proof runs llama.cpp itself, which the package xllamacpp brings.
"""

import errno
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.nn
import numpy as np

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.interop import proof
from lib.interop.families import FAMILIES, Family, fitting, refusal
from lib.interop.folding import as_linear, fold, interleave_halves, normed_rows, swap_halves
from lib.interop.packages import optional
from lib.interop.tokenizer_files import CHAT_TEMPLATE, merges, spelled
from lib.interop.tokenizer_import import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    LLAMA_PATTERN,
    QWEN_PATTERN,
)

FORMAT = "gguf"
EXTRA = "gguf"
SERVER = Path(__file__).with_name("gguf_serve.py")

# what llama.cpp has of them: no short windows, and squared ReLU alone in arcee
_arcee = FAMILIES["arcee"]
ARCHITECTURES: dict[str, Family] = {
    "llama": FAMILIES["llama"],
    "qwen3": FAMILIES["qwen3"]._replace(short_windows=False),
    "arcee": _arcee._replace(holds=_arcee.holds | dict(mlp=("relu2",))),
}
# those whose rotations turn neighbours; the others' turn halves, as ours do
NEIGHBOURS = ("llama", "arcee")

# how llama.cpp splits text into words: the name in its list, and the pattern behind it
SPLITTERS = {
    "llama-bpe": LLAMA_PATTERN,
    "qwen2": QWEN_PATTERN,
    "smollm": DIGITS_PATTERN,
    "gpt-2": GPT2_PATTERN,
}

# token types of GGUF
NORMAL, CONTROL = 1, 3
# of llama.cpp's log-probabilities so many are compared at each place, the likeliest
LIKELIEST = 50
SECONDS = 120  # that the runtime has for an answer


def export(params, config: Config, tokenizer: Tokenizer, path) -> proof.Proof:
    """Write MODEL.gguf in float32 into a folder, prove it with llama.cpp, then put it in place.

    UserError where no architecture of llama.cpp holds the config, naming the fields against it.
    """
    optional(EXTRA, "gguf", "xllamacpp")
    architecture = fitting(config, ARCHITECTURES)
    if not architecture:
        raise refusal(config, ARCHITECTURES, "llama.cpp")
    shown = proof.proved(
        path,
        lambda draft: write(params, config, tokenizer, draft / "model.gguf", architecture),
        lambda draft: prove(params, config, tokenizer, draft / "model.gguf", architecture),
    )
    return replace(shown, path=Path(path) / "model.gguf")


# ---- the file ------------------------------------------------------------------------------------


def write(params, config: Config, tokenizer: Tokenizer, path: Path, architecture: str):
    """The GGUF file: sizes, tokenizer, tensors."""
    (gguf,) = optional(EXTRA, "gguf")
    writer = gguf.GGUFWriter(str(path), architecture)

    # sizes
    writer.add_name("rawchat")
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    # rotations and norms
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    # text and weights
    _add_tokenizer(writer, tokenizer)
    for name, tensor in tensors(params, config, architecture).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    # its three parts, in this order
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as e:
        # numpy tells how much it wrote, not that the disk is full
        raise e if e.errno else OSError(errno.ENOSPC, str(e)) from e


def _add_tokenizer(writer, tokenizer: Tokenizer):
    special = tokenizer.special
    ordinary = [spelled(token) for token in tokenizer.tokens]
    # byte-level BPE goes by GPT-2's name there
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(best_splitter(tokenizer)[0])
    writer.add_token_list([*ordinary, *special])
    writer.add_token_types([NORMAL] * len(ordinary) + [CONTROL] * len(special))
    writer.add_token_merges([f"{spelled(a)} {spelled(b)}" for a, b in merges(tokenizer)])
    # what begins a document, what ends an answer, and how a chat is written
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(special["<|assistant_end|>"])
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def best_splitter(tokenizer: Tokenizer) -> tuple[str, int]:
    """(the name in SPLITTERS that makes our ids of the most texts, of how many of TEXTS)."""
    # our own merges behind another pattern: no other difference counts
    texts = proof.probe_texts()
    ours = [tokenizer.encode(text) for text in texts]

    def agreeing(name):
        other = Tokenizer(SPLITTERS[name], tokenizer.tokens)
        return sum(other.encode(text) == ids for text, ids in zip(texts, ours))

    equal = {name: agreeing(name) for name in SPLITTERS}
    best = max(equal, key=lambda name: equal[name])
    return best, equal[best]


def tensors(params, config: Config, architecture: str) -> dict[str, np.ndarray]:
    """The weights in llama.cpp's names, everything of ours alone folded in."""
    plain = fold(params, config)
    embed = normed_rows(plain.embed, config.norm_eps) if config.embed_norm else plain.embed

    def turned(w_DNH):
        """Heads for rotations by plus the angle, in the order that the architecture turns."""
        w_DNH = swap_halves(w_DNH)
        return interleave_halves(w_DNH) if architecture in NEIGHBOURS else w_DNH

    # norms have weights there
    ones = np.ones(config.n_embd, np.float32)
    named = {
        "token_embd.weight": embed,
        "output.weight": as_linear(plain.head),
        "output_norm.weight": ones,
    }
    for i, layer in enumerate(plain.layers):
        block = {
            "attn_q": as_linear(turned(layer["wq"])),
            "attn_k": as_linear(turned(layer["wk"])),
            "attn_v": as_linear(layer["wv"]),
            "attn_output": as_linear(layer["wo"], n_in=2),
            "ffn_up": as_linear(layer["w_in"]),
            "ffn_down": as_linear(layer["w_out"]),
            "attn_norm": ones,
            "ffn_norm": ones,
        }
        if "w_gate" in layer:
            block["ffn_gate"] = as_linear(layer["w_gate"])
        if config.qk_norm:
            scale = np.full(config.head_dim, config.qk_scale, np.float32)
            block |= {"attn_q_norm": scale, "attn_k_norm": scale}
        named |= {f"blk.{i}.{name}.weight": tensor for name, tensor in block.items()}
    return named


# ---- the proof -----------------------------------------------------------------------------------


@contextmanager
def serving(path, config: Config):
    """llama.cpp with the model of a file, in a process: yields ask(endpoint, **json) -> json."""
    # -P: none of our files is taken for a package
    command = [sys.executable, "-P", str(SERVER), str(path), str(config.sequence_len)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True) as server,
    ):
        try:
            yield _asking(_address(server, path, log))
        finally:
            server.kill()


def _address(server: subprocess.Popen, path, log) -> str:
    """Where a process of `gguf_serve.py` listens; UserError where it ended before it did."""
    assert server.stdout
    for line in server.stdout:
        if line.startswith("http"):
            return line.strip()
    # it went away: what it said last
    log.seek(0)
    lines = log.read().strip().splitlines() or ["it did not say why"]
    raise UserError(f"llama.cpp cannot open {path}: {lines[-1]}")


def _asking(address: str) -> Callable[..., Any]:
    """ask(endpoint, **json) -> json of a server."""

    def ask(endpoint: str, **body) -> Any:
        request = urllib.request.Request(
            f"{address}/{endpoint}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)

    return ask


def greedy(ask, prompt: list[int], count: int, tokenizer: Tokenizer) -> tuple[list, dict]:
    """(the likeliest tokens that follow, {place among them: the likeliest with log-probabilities}).

    One by one: of longer answers llama.cpp leaves out the log-probabilities of tokens that end
    within a character, and it stops at the mark that ends an answer, where we go on.
    """
    written: list[int] = []
    likeliest: dict[int, list] = {}
    for place in range(count):
        answer = ask(
            "completion",
            prompt=[*prompt, *written],
            n_predict=1,
            temperature=0,
            n_probs=LIKELIEST,
            return_tokens=True,
        )
        # of one that ends within a character it tells no log-probabilities
        for step in answer.get("completion_probabilities", []):
            likeliest[place] = step["top_logprobs"]
        # nor does it name the token at which it stops
        if answer["tokens"]:
            written.append(answer["tokens"][0])
        else:
            written.append(tokenizer.special["<|assistant_end|>"])
    return written, likeliest


def ids_of(ask, text: str) -> list[int]:
    """What llama.cpp makes of a text, names of special tokens in it read as text."""
    return ask("tokenize", content=text, add_special=True, parse_special=False)["tokens"]


def prove(params, config: Config, tokenizer: Tokenizer, path, architecture: str) -> proof.Proof:
    """Run the file by llama.cpp and compare log-probabilities, greedy tokens and ids of texts."""
    prompt, count = proof.greedy_prompt(config)
    with serving(path, config) as ask:
        written, likeliest = greedy(ask, prompt, count, tokenizer)
        equal, tried = proof.agreeing_texts(tokenizer, lambda text: ids_of(ask, text))

    # our log-probabilities at the places that it wrote from
    tokens_BT = np.array([[*prompt, *written[:-1]]])
    logits_TV = proof.our_logits(params, config, tokens_BT)[0, len(prompt) - 1 :]
    ours_TV = np.asarray(jax.nn.log_softmax(logits_TV, axis=-1))
    difference = 0.0
    for place, choices in likeliest.items():
        ids = [choice["id"] for choice in choices]
        theirs = np.array([choice["logprob"] for choice in choices])
        difference = max(difference, float(np.abs(ours_TV[place, ids] - theirs).max()))

    # what was not shown is not the same
    if 2 * len(likeliest) < count:
        difference = float("inf")

    lost = []
    if equal < tried:
        lost.append(
            f"text: llama.cpp has no splitter like ours, its {best_splitter(tokenizer)[0]} makes "
            f"our ids of {equal} of {tried} texts; give it ids where that matters"
        )
    return proof.Proof(
        format=f"{FORMAT} ({architecture}, float32)",
        path=Path(path),
        bytes=proof.folder_size(path),
        seconds=0.0,
        difference=difference,
        bound=proof.CLOSE * max(1.0, float(np.abs(logits_TV).max())),
        greedy=proof.agreeing(proof.our_greedy(params, config), written),
        texts=(equal, tried) if equal == tried else None,
        lost=tuple(lost),
    )
