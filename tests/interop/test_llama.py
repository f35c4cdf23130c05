"""Open weights come in: names, foldings, vocabulary; and what is refused, by name."""

import base64
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lib.files import UserError
from lib.interop.huggingface import write
from lib.interop.imports import import_run, read_model
from lib.interop.llama import config_from_llama
from lib.interop.proof import apart, our_logits, probe_texts
from lib.interop.tokenizer_import import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    LLAMA_PATTERN,
    in_merge_order,
    pattern_of,
)
from lib.runs import load_model
from lib.train.optim import group_lrs
from tests.helpers.hub_stand_in import COMMIT
from tests.helpers.models import config_of, random_params, tokenizer

TOKENS = np.random.default_rng(5).integers(700, size=(2, 40))


@pytest.fixture
def folder(tmp_path):
    """write_model(kind, **changes): a folder as transformers has it, written without it."""

    def write_model(kind="llama", **changes):
        config = config_of(kind, **changes)
        params = random_params(config)
        path = tmp_path / "model"
        path.mkdir()
        write(params, config, tokenizer(), path, "qwen3" if config.qk_norm else "llama")
        return path, params, config

    return write_model


def change(path, **settings):
    """Write other settings into a folder's config.json."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("kind", ["llama", "llama, scaled", "qwen3"])
def test_what_leaves_comes_back_the_same(folder, kind):
    path, params, config = folder(kind, window_pattern="L")
    back = read_model(path, "it")
    assert back.config.embed_norm is False and back.config.norm_eps == config.norm_eps
    assert back.tokenizer.fingerprint == tokenizer().fingerprint
    assert back.theirs.tolist() == list(range(700)) and back.lost == ()
    ours = our_logits(params, config, TOKENS)
    difference, bound = apart(ours, our_logits(back.params, back.config, TOKENS))
    assert difference < bound


def test_an_imported_run_opens_like_any_other(folder, tmp_path):
    path, params, config = folder("llama")
    text = import_run(str(path), tmp_path / "run", prove=False)
    assert "4 layers, 64 wide" in text
    model = load_model(tmp_path / "run")
    assert model.stage == "base" and model.meta["imported"] == str(path)
    theirs = our_logits(model.params, model.config, TOKENS)
    assert apart(our_logits(params, config, TOKENS), theirs)[0] < 1e-3
    # all weights learn by one rate, in batches that small mixtures fill
    assert model.config.total_batch_size == 2**14
    rates = group_lrs(model.config)
    np.testing.assert_allclose([rates["matrix"], rates["embed"], rates["head"]], 3e-4)
    with pytest.raises(UserError, match="has a tokenizer.json already: choose another --run"):
        import_run(str(path), tmp_path / "run", prove=False)


def test_other_ids_find_their_rows(folder):
    """A tokenizer whose special tokens come first and bear other names, as SmolLM's do."""
    path, params, config = folder("llama")
    data = json.loads((path / "tokenizer.json").read_text("utf-8"))
    size = len(data["model"]["vocab"])
    data["model"]["vocab"] = {text: i + 2 for text, i in data["model"]["vocab"].items()}
    names = ["<|endoftext|>", "<|im_start|>"]
    data["added_tokens"] = [dict(content=name, id=i) for i, name in enumerate(names)]
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    (path / "tokenizer.json").write_text(json.dumps(data))
    change(path, bos_token_id=0, eos_token_id=0)
    back = read_model(path, "it")
    assert back.theirs.tolist() == [*range(2, size + 2), 0, *[-1] * 8]
    assert "<|im_start|>" in back.lost[0] and "fine-tune" in back.lost[1]

    # token i of ours is i + 2 of theirs, whose logits the folder's own model gives
    known = back.theirs[:size]
    ours = our_logits(back.params, back.config, TOKENS % size)[..., :size]
    theirs = our_logits(params, config, known[TOKENS % size])[..., known]
    difference, bound = apart(theirs, ours)
    assert difference < bound
    # what the model never met begins as the mean
    embed = np.asarray(back.params["embed"])
    np.testing.assert_allclose(embed[size + 1], embed[: size + 1].mean(axis=0), atol=1e-5)


def test_tied_heads_stay_tied_where_they_can(folder):
    path, _, _ = folder("llama")
    tensors = dict(read_tensors_numpy(path))
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    change(path, tie_word_embeddings=True)
    assert read_model(path, "it").config.tied_head and "head" not in read_model(path, "it").params

    # weights of the last norm part the head from the embedding
    tensors["model.norm.weight"] = np.linspace(0.5, 2, 64).astype(np.float32)
    save_file(tensors, path / "model.safetensors")
    untied = read_model(path, "it")
    assert not untied.config.tied_head
    V = untied.config.vocab_size
    expected = np.asarray(untied.params["embed"])[:V] * tensors["model.norm.weight"]
    np.testing.assert_allclose(np.asarray(untied.params["head"]).T[:V], expected, atol=1e-6)


def read_tensors_numpy(path):
    from safetensors.numpy import load_file

    return load_file(path / "model.safetensors")


def test_shards_and_bfloat16_are_read(folder):
    import ml_dtypes

    path, params, config = folder("llama")
    tensors = read_tensors_numpy(path)
    (path / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(tensors):
        file = f"model-{i % 2}.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file({k: a.astype(ml_dtypes.bfloat16) for k, a in part.items()}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    back = read_model(path, "it")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(back.params))
    np.testing.assert_allclose(
        np.asarray(back.params["blocks"]["wo"]), np.asarray(params["blocks"]["wo"]), rtol=1e-2
    )


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(model_type="gpt2"), "learned positions and LayerNorm"),
        (dict(model_type="mamba"), "of type 'mamba': its type must be one of llama, qwen3"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(hidden_act="gelu"), "hidden_act=gelu"),
        (dict(use_sliding_window=True), "use_sliding_window=True"),
        (dict(rope_parameters=None, rope_scaling={"rope_type": "llama3"}), "rope_type=llama3"),
        (dict(rope_parameters={"rope_type": "yarn", "factor": 4}), "rope_type=yarn"),
        (dict(hidden_size=72), "has shape .* where its config.json asks for"),
        (dict(num_hidden_layers=5), "the weights lack layers.4"),
        (dict(num_hidden_layers=3), "hold layers.3"),
        (dict(vocab_size=600), "do not belong together"),
        (dict(vocab_size=699), "do not belong together"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(folder, tmp_path, settings, words):
    path, _, _ = folder("llama")
    change(path, **settings)
    with pytest.raises(UserError, match=words):
        import_run(str(path), tmp_path / "run", prove=False)
    assert not (tmp_path / "run").exists()


def test_norms_before_a_matrix_are_folded_into_it(folder):
    """What a norm gives twice or four times as large, its readers take half or a quarter of."""
    path, params, config = folder("llama", window_pattern="L")
    tensors = dict(read_tensors_numpy(path))
    sizes = {"input_layernorm": 2, "post_attention_layernorm": 4}
    sizes |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), 1 / 2)
    sizes |= dict.fromkeys(("gate_proj", "up_proj"), 1 / 4)
    for name in tensors:
        tensors[name] = tensors[name] * np.float32(sizes.get(name.split(".")[-2], 1))
    save_file(tensors, path / "model.safetensors")
    back = read_model(path, "it")
    theirs = our_logits(back.params, back.config, TOKENS)
    difference, bound = apart(our_logits(params, config, TOKENS), theirs)
    assert difference < bound


def test_norms_of_their_own_are_refused(folder):
    path, _, _ = folder("qwen3", window_pattern="L")
    tensors = read_tensors_numpy(path)
    tensors["model.layers.2.self_attn.q_norm.weight"][3] += 0.5
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError, match="learned weights of their own"):
        read_model(path, "it")


def test_damaged_and_missing_files(folder, tmp_path):
    path, _, _ = folder("llama")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        read_model(path, "it")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model.safetensors"):
        read_model(path, "it")
    # an index that points out of the folder
    (tmp_path / "elsewhere.safetensors").write_bytes(whole)
    places = {"weight_map": {"lm_head.weight": str(tmp_path / "elsewhere.safetensors")}}
    (path / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(UserError, match="lacks .*elsewhere.safetensors"):
        read_model(path, "it")
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer.json"):
        read_model(path, "it")
    with pytest.raises(UserError, match="holds no config.json"):
        import_run(str(tmp_path), tmp_path / "run", prove=False)
    with pytest.raises(UserError, match="is no repository: write hf:USER/NAME"):
        import_run("hf:nobody", tmp_path / "run", prove=False)


def test_the_context_is_theirs_or_shorter():
    settings = dict(
        model_type="llama",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_theta=5000.0,
    )
    config = config_from_llama(settings)
    assert config.sequence_len == 512 and config.rope_base == 5000.0 and config.head_dim == 16
    assert config_from_llama(settings, 128).sequence_len == 128
    with pytest.raises(UserError, match="beyond the model's context of 512"):
        config_from_llama(settings, 1024)
    del settings["hidden_size"]
    with pytest.raises(UserError, match="lacks hidden_size"):
        config_from_llama(settings)


# ---- the Hub -------------------------------------------------------------------------------------


def publish(server, path, repo="someone/small"):
    """Serve a model's folder as the Hub would, with a picture that nobody asked for."""
    names = [file.name for file in path.iterdir()] + ["picture.png"]
    info = dict(id=repo, sha=COMMIT, siblings=[dict(rfilename=name) for name in names])
    # older clients read the names from there, newer ones from a listing
    files = [dict(type="file", path=name, size=1, oid="0" * 40) for name in names]
    for file, entry in zip(path.iterdir(), files):
        entry["size"] = file.stat().st_size
    server.files[f"/api/models/{repo}/tree/{COMMIT}"] = json.dumps(files).encode()
    for revision in ("main", COMMIT):
        server.files[f"/api/models/{repo}/revision/{revision}"] = json.dumps(info).encode()
    for file in path.iterdir():
        server.files[f"/{repo}/resolve/{COMMIT}/{file.name}"] = file.read_bytes()


def test_a_model_comes_from_the_hub(folder, tmp_path, hub_server):
    path, params, config = folder("llama")
    publish(hub_server, path)
    text = import_run("hf:someone/small@main", tmp_path / "run", prove=False)
    assert "imported hf:someone/small@main" in text
    model = load_model(tmp_path / "run")
    assert model.meta["imported"] == "hf:someone/small@main"
    theirs = our_logits(model.params, model.config, TOKENS)
    assert apart(our_logits(params, config, TOKENS), theirs)[0] < 1e-3
    assert not any("picture" in address for _, address, _ in hub_server.log)


def test_what_the_hub_refuses_is_one_sentence(tmp_path, hub_server):
    with pytest.raises(UserError, match="cannot fetch hf:someone/other .*check its name"):
        import_run("hf:someone/other", tmp_path / "run", prove=False)
    assert not (tmp_path / "run").exists()


# ---- tokenizers ----------------------------------------------------------------------------------


def test_patterns_by_their_steps():
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    split = {"type": "Split", "pattern": {"Regex": r"\s+|\S+"}}

    def steps(*parts):
        return {"type": "Sequence", "pretokenizers": list(parts)}

    assert pattern_of(as_bytes, "it") == GPT2_PATTERN
    assert pattern_of(steps(digits, as_bytes), "it") == DIGITS_PATTERN
    assert pattern_of(steps(split, as_bytes | {"use_regex": False}), "it") == r"\s+|\S+"
    for other in (None, split, as_bytes | {"add_prefix_space": True}, steps(split, digits)):
        with pytest.raises(UserError, match="splits text by"):
            pattern_of(other, "it")


@pytest.mark.parametrize("name", ["tokenizer.model", "small.tiktoken"])
def test_a_file_of_tiktokens_comes_along(folder, name):
    """A token in base64 and its rank a line; special tokens are named elsewhere, or nowhere."""
    path, _, _ = folder("llama")
    (path / "tokenizer.json").unlink()
    tokens = tokenizer().tokens
    lines = [base64.b64encode(token) + f" {i}\n".encode() for i, token in enumerate(tokens)]
    (path / name).write_bytes(b"".join(lines))
    back = read_model(path, "it")
    expected = type(tokenizer())(LLAMA_PATTERN, tokens)
    for text in probe_texts()[:20]:
        assert back.tokenizer.encode(text) == expected.encode(text)
    size = len(tokens)
    assert back.theirs.tolist() == [*range(size), size, *[-1] * 8]

    special = {str(i): {"content": name} for name, i in tokenizer().special.items()}
    named = json.dumps({"added_tokens_decoder": special})
    (path / "tokenizer_config.json").write_text(named)
    assert read_model(path, "it").theirs.tolist() == list(range(size + 9))

    # of SentencePiece, under the same name
    (path / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(UserError, match=f"{name} of it is none of tiktoken's files"):
        read_model(path, "it")


def test_patterns_keep_every_character():
    import regex

    for text in [*probe_texts(), "a  5 b", "  12", "x \n 7\n"]:
        assert "".join(regex.findall(GPT2_PATTERN, text)) == text
        assert "".join(regex.findall(DIGITS_PATTERN, text)) == text
    assert regex.findall(DIGITS_PATTERN, "a  15 b") == ["a", "  ", "1", "5", " b"]


def test_tokens_come_in_the_order_of_merges():
    ids = {"ab": 0, "a": 1, "b": 2, "abb": 3, "odd": 4}
    assert in_merge_order(ids, ["a b", ["ab", "b"]]) == ["a", "b", "ab", "abb", "odd"]
