"""A model for transformers: a class that it knows where the config fits one, else our own file.

A folder holds config.json, model.safetensors, generation_config.json and the tokenizer's files;
`AutoModelForCausalLM.from_pretrained(FOLDER)` opens it, for the whole model with
`trust_remote_code=True`.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lib.config import Config
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, first_line, save_tensors, to_json
from lib.interop import proof
from lib.interop.families import FAMILIES, fitting, has_short_windows
from lib.interop.folding import as_linear, fold, normed_rows, swap_halves
from lib.interop.packages import optional
from lib.interop.tokenizer_files import write_tokenizer
from lib.params import unstack

FORMAT = "transformers"
EXTRA = "hf"
CUSTOM = Path(__file__).with_name("modeling_rawchat.py")
ACTIVATIONS = {"swiglu": "silu", "relu2": "relu2", "gelu": "gelu_pytorch_tanh"}


def export(params, config: Config, tokenizer: Tokenizer, folder) -> proof.Proof:
    """Write a folder for transformers, prove it with transformers, and only then put it in place.

    UserError where torch or transformers is missing, and where the two models disagree.
    """
    # a missing package is told before anything is written
    optional(EXTRA, "torch", "transformers")
    family = fitting(config)
    return proof.proved(
        folder,
        lambda draft: write(params, config, tokenizer, draft, family),
        lambda draft: prove(params, config, tokenizer, draft, family),
    )


def write(params, config: Config, tokenizer: Tokenizer, folder: Path, family: str):
    """The folder's files; family: of FAMILIES, or "" for our own modelling file."""
    if family:
        tensors = family_tensors(params, config, family)
        settings = family_config(config, family)
    else:
        tensors = whole_tensors(params, config)
        settings = whole_config(config)
        shutil.copyfile(CUSTOM, folder / CUSTOM.name)

    special = dict(
        bos_token_id=tokenizer.bos,
        # a document ends where the next begins, an answer with its own mark
        eos_token_id=[tokenizer.special["<|assistant_end|>"], tokenizer.bos],
        pad_token_id=tokenizer.special["<|assistant_end|>"],
    )
    (folder / "config.json").write_text(to_json(settings | special))
    (folder / "generation_config.json").write_text(to_json(special))
    save_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(tokenizer, folder, config.sequence_len)


# ---- configs -------------------------------------------------------------------------------------


def _sizes(config: Config) -> dict[str, Any]:
    """What all of their configs have."""
    return dict(
        dtype="float32",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        head_dim=config.head_dim,
        max_position_embeddings=config.sequence_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=False,
    )


def _layer_types(config: Config) -> dict[str, Any]:
    """Which layers have a short window, and how many keys those see, the query's own included."""
    types = [
        "sliding_attention" if window < config.sequence_len else "full_attention"
        for window in config.windows
    ]
    return dict(layer_types=types, sliding_window=min(config.windows) + 1)


def family_config(config: Config, family: str) -> dict[str, Any]:
    """config.json of a class that transformers has."""
    settings = _sizes(config) | dict(
        architectures=[FAMILIES[family].class_name],
        model_type=FAMILIES[family].model_type,
        hidden_act=ACTIVATIONS[config.mlp],
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
    )
    # windows are told only where there are any
    if FAMILIES[family].short_windows and has_short_windows(config):
        settings |= _layer_types(config) | dict(use_sliding_window=True)
    if family == "nanochat":
        settings["final_logit_softcapping"] = config.softcap or None
    return settings


def whole_config(config: Config) -> dict[str, Any]:
    """config.json of our own class."""
    fields = (
        "rope_base",
        "mlp",
        "qk_norm",
        "qk_scale",
        "softcap",
        "smear",
        "backout",
        "embed_norm",
    )
    ours = {field: getattr(config, field) for field in fields}
    name = CUSTOM.stem
    # where transformers finds our classes
    auto_map = {
        "AutoConfig": f"{name}.RawchatConfig",
        "AutoModelForCausalLM": f"{name}.RawchatForCausalLM",
    }
    return (
        _sizes(config)
        | _layer_types(config)
        | ours
        | dict(
            architectures=["RawchatForCausalLM"],
            model_type="rawchat",
            auto_map=auto_map,
            value_layers=list(config.value_layers),
        )
    )


# ---- weights -------------------------------------------------------------------------------------


def family_tensors(params, config: Config, family: str) -> dict[str, np.ndarray]:
    """The state dict of a class that transformers has, with everything else folded in."""
    plain = fold(params, config)
    theirs = family == "nanochat"  # it norms embeddings and turns by minus the angle, as we do
    # the others turn heads by plus the angle
    turned = (lambda w: w) if theirs else swap_halves
    # and call an mlp's matrices otherwise
    mlp = {"w_in": "up_proj", "w_gate": "gate_proj", "w_out": "down_proj"}
    if theirs:
        mlp = {"w_in": "fc1", "w_out": "fc2"}

    # the norm of an embedding goes into its rows where there is no such norm
    embed = plain.embed
    if config.embed_norm and not theirs:
        embed = normed_rows(embed, config.norm_eps)
    tensors = {"model.embed_tokens.weight": embed, "lm_head.weight": as_linear(plain.head)}
    for i, layer in enumerate(plain.layers):
        attn, block = f"model.layers.{i}.self_attn", f"model.layers.{i}"
        tensors[f"{attn}.q_proj.weight"] = as_linear(turned(layer["wq"]))
        tensors[f"{attn}.k_proj.weight"] = as_linear(turned(layer["wk"]))
        tensors[f"{attn}.v_proj.weight"] = as_linear(layer["wv"])
        tensors[f"{attn}.o_proj.weight"] = as_linear(layer["wo"], n_in=2)
        for ours, name in mlp.items():
            if ours in layer:
                tensors[f"{block}.mlp.{name}.weight"] = as_linear(layer[ours])
        if theirs:
            continue
        # norms have weights there: ones, and our scale of queries and keys
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = np.ones(config.n_embd, np.float32)
        if config.qk_norm:
            scale = np.full(config.head_dim, config.qk_scale, np.float32)
            tensors[f"{attn}.q_norm.weight"] = scale
            tensors[f"{attn}.k_norm.weight"] = scale.copy()
    if not theirs:
        tensors["model.norm.weight"] = np.ones(config.n_embd, np.float32)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def whole_tensors(params, config: Config) -> dict[str, np.ndarray]:
    """The state dict of our own class: nothing folded, the vocabulary's padding left off."""
    # a head of its own, also where ours is tied: one form for all
    V = config.vocab_size
    weights = unstack(params, config)
    table = np.asarray(params["embed"])[:V]
    head = table.T if config.tied_head else np.asarray(params["head"])[:, :V]
    tensors: dict[str, Any] = {"embed.weight": table, "head.weight": as_linear(head)}

    for i, layer in enumerate(weights["blocks"]):
        block = f"blocks.{i}"
        for name in ("wq", "wk", "wv", "wo"):
            n_in = 2 if name == "wo" else 1
            tensors[f"{block}.attn.{name}.weight"] = as_linear(np.asarray(layer[name]), n_in)
        for name in ("w_in", "w_gate", "w_out"):
            if name in layer:
                tensors[f"{block}.mlp.{name}.weight"] = as_linear(np.asarray(layer[name]))
        if "value_gate" in layer:
            tensors[f"{block}.attn.value_gate.weight"] = as_linear(np.asarray(layer["value_gate"]))
        # scales that were not trained are the ones that change nothing
        tensors[f"{block}.resid_scale"] = layer.get("resid_scale", 1.0)
        tensors[f"{block}.x0_scale"] = layer.get("x0_scale", 0.0)

    # the parts that stand outside the layers
    for i, value_table in weights["value_embeds"].items():
        tensors[f"value_embeds.{i}.weight"] = np.asarray(value_table)[:V].reshape(V, -1)
    if config.smear:
        tensors["smear_gate.weight"] = np.asarray(params["smear"]["gate"])[None]
        tensors["smear_scale"] = params["smear"]["scale"]
    if config.backout:
        tensors["backout"] = params["backout"]
    return {name: np.array(tensor, np.float32, order="C") for name, tensor in tensors.items()}


# ---- the proof -----------------------------------------------------------------------------------


def load(folder):
    """(model, tokenizer) as transformers opens an export."""
    (transformers,) = optional(EXTRA, "transformers")
    # its bars and its advice are not for whoever exports
    logging = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options = dict(trust_remote_code=(Path(folder) / CUSTOM.name).exists())
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        return model.eval(), tokenizer
    except Exception as e:
        raise UserError(f"transformers cannot open {folder}: {first_line(e)}") from e


def prove(params, config: Config, tokenizer: Tokenizer, folder, family: str) -> proof.Proof:
    """Open a folder with transformers and compare logits, greedy tokens and ids of texts."""
    (torch,) = optional(EXTRA, "torch")
    model, theirs = load(folder)

    # their logits of random tokens, and what they write after a prompt
    tokens_BT = proof.probe_tokens(config)
    prompt, count = proof.greedy_prompt(config)
    with torch.no_grad():
        logits = model(torch.as_tensor(tokens_BT)).logits.numpy()
        written = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=tokenizer.bos,
        )[0].tolist()
    difference, bound = proof.apart(proof.our_logits(params, config, tokens_BT), logits)

    # compared with ours
    lost = []
    if not family:
        lost.append("nothing, by our own file: load it with trust_remote_code=True")
    ours = proof.our_greedy(params, config)
    return proof.Proof(
        format=f"{FORMAT} ({FAMILIES[family].class_name if family else 'RawchatForCausalLM'})",
        path=Path(folder),
        bytes=proof.folder_size(folder),
        seconds=0.0,
        difference=difference,
        bound=bound,
        greedy=proof.agreeing(ours, written[len(prompt) :]),
        texts=proof.agreeing_texts(tokenizer, lambda text: theirs(text)["input_ids"]),
        lost=tuple(lost),
    )
