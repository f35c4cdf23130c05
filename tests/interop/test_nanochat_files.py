"""nanochat's folders come in: .pt files and pickled tokenizers, none of which may run anything."""

import json
import os
import pickle

import jax
import ml_dtypes
import numpy as np
import pytest

from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.interop.imports import import_run
from lib.interop.nanochat import from_nanochat
from lib.interop.torch_file import read_torch
from lib.runs import load_model, stages
from lib.teach import check_stages
from lib.train.finetune import Phase
from tests.helpers.golden import PARITY, load, parity_model
from tests.helpers.torch_files import Storage, Tensor, save_torch

FIRST = ("transformer.wte", "lm_head", "attn.c_", "mlp.")


@pytest.fixture(scope="module")
def golden():
    """(nanochat's own state dict, its GPTConfig, its tokenizer)."""
    settings = load("model_T_config.json")["GPTConfig"]
    return load("model_T_state.safetensors"), settings, Tokenizer.load(PARITY / "tokenizer.json")


def write(folder, state, settings, tokenizer, monkeypatch, step=7, **meta):
    """A folder as nanochat leaves it."""
    folder.mkdir(parents=True)
    save_torch(state, folder / f"model_{step:06d}.pt", monkeypatch)
    (folder / f"meta_{step:06d}.json").write_text(
        json.dumps(dict(step=step, val_bpb=1.5, model_config=settings) | meta)
    )
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(tokenizer.encoding))
    return folder


@pytest.fixture
def folder(tmp_path, golden, monkeypatch):
    return write(tmp_path / "chatsft_checkpoints" / "d2", *golden, monkeypatch)


def test_a_model_comes_in_and_is_the_same(folder, golden, tmp_path):
    told = import_run(str(folder), tmp_path / "run")
    assert "nanochat's model at step 7" in told and "1.5000 bits per byte" in told
    # 04 begins at base; chat and serve take the furthest stage
    assert stages(tmp_path / "run") == ["base", "sft"]
    model = load_model(tmp_path / "run")
    config, params = parity_model("T")
    assert model.config.n_layer == config.n_layer and model.meta["step"] == 7
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    texts = ["Hello, wörld! 123", "def f(x):\n\treturn x"]
    assert [model.tokenizer.encode(text) for text in texts] == list(map(golden[2].encode, texts))


def test_a_stage_that_came_in_is_not_trained_over(folder, tmp_path):
    """04 says so before its first phase computes."""
    run = tmp_path / "run"
    import_run(str(folder), run)
    phases = [Phase("mid", {}), Phase("sft", {})]
    with pytest.raises(UserError, match="sft of .* is an imported model: pass --mid none"):
        check_stages(run, phases, "continue")
    check_stages(run, phases, "fresh")
    check_stages(run, phases[:1], "continue")


def test_the_newest_of_several_and_bfloat16(folder, golden, tmp_path, monkeypatch):
    state = {f"_orig_mod.{name}": a.astype(ml_dtypes.bfloat16) for name, a in golden[0].items()}
    save_torch(state, folder / "model_000012.pt", monkeypatch)
    meta = json.loads((folder / "meta_000007.json").read_text())
    (folder / "meta_000012.json").write_text(json.dumps(meta | dict(max_seq_len=64)))
    import_run(str(folder), tmp_path / "run", stage="base")
    model = load_model(tmp_path / "run")
    assert model.meta["step"] == 12 and model.stage == "base"
    want = golden[0]["transformer.wte.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(model.params["embed"], want)


@pytest.mark.parametrize("scales", [False, True])
def test_the_first_form(golden, tmp_path, monkeypatch, scales):
    """Published as d20 and d32: plain layers, no word for windows, and a table without padding."""
    state, settings, tokenizer = golden
    names = FIRST + (("resid_lambdas", "x0_lambdas") if scales else ())
    state = {name: a for name, a in state.items() if any(part in name for part in names)}
    state = {name: a for name, a in state.items() if "ve_gate" not in name}
    V = settings["vocab_size"]
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state[name] = np.ascontiguousarray(state[name][:V])
    old = {key: value for key, value in settings.items() if key != "window_pattern"}
    folder = write(tmp_path / "d20", state, old, tokenizer, monkeypatch, max_seq_len=64)
    import_run(str(folder), tmp_path / "run")
    model = load_model(tmp_path / "run")
    config = model.config
    assert (config.rope_base, config.qk_scale, config.window_pattern) == (10_000.0, 1.0, "L")
    assert config.resid_scales == config.x0_scales == scales
    assert not (config.value_embeds or config.smear or config.backout)
    np.testing.assert_array_equal(model.params["embed"][:V], state["transformer.wte.weight"])
    assert not np.asarray(model.params["embed"][V:]).any()


def test_forms_between_are_refused_by_name(golden, tmp_path, monkeypatch):
    state, settings, tokenizer = golden
    between = {name: a for name, a in state.items() if "smear" not in name}
    folder = write(tmp_path / "d4", between, settings, tokenizer, monkeypatch)
    with pytest.raises(UserError, match="of January to March 2026"):
        import_run(str(folder), tmp_path / "run")
    first = {name: a for name, a in between.items() if name.startswith(("trans", "lm", "resid"))}
    first = {name: a for name, a in first.items() if "ve_gate" not in name}
    folder = write(tmp_path / "d5", first, settings, tokenizer, monkeypatch)
    with pytest.raises(UserError, match="short windows are half of the context"):
        import_run(str(folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Runs:
    """What a hostile pickle holds: a program."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["model_000007.pt", "tokenizer.pkl"])
def test_no_pickle_runs_anything(folder, golden, tmp_path, monkeypatch, where):
    hostile = pickle.dumps(Runs(tmp_path / "was_run"))
    if where == "tokenizer.pkl":
        (folder / where).write_bytes(hostile)
    else:
        save_torch(golden[0], folder / where, monkeypatch, **{"data.pkl": hostile})
    with pytest.raises(UserError, match=f"{where} asks for posix.mkdir, .* was not read"):
        import_run(str(folder), tmp_path / "run")
    assert not (tmp_path / "was_run").exists() and not (tmp_path / "run").exists()


def tensor(count=6, offset=0, shape=(2, 3), strides=(3, 1)):
    return {"w": Tensor(Storage("0", np.arange(count, dtype=np.float32)), offset, shape, strides)}


def test_tensors_that_lie_otherwise(tmp_path, monkeypatch):
    path = tmp_path / "t.pt"
    save_torch(tensor(7, 1, (3, 2), (1, 3)), path, monkeypatch)
    np.testing.assert_array_equal(read_torch(path)["w"], [[1, 4], [2, 5], [3, 6]])
    save_torch(tensor(1, 0, (), ()), path, monkeypatch)
    assert read_torch(path)["w"] == 0


@pytest.mark.parametrize(
    "kind",
    [
        dict(count=5),
        dict(offset=1),
        dict(offset=-1),
        dict(strides=(100, 1)),
        dict(strides=(-3, 1)),
        dict(shape=(1000, 1000), strides=(0, 0)),
        dict(shape=(2, 3), strides=(3,)),
        dict(shape=(2.0, 3)),
    ],
)
def test_tensors_that_reach_outside_are_refused(tmp_path, monkeypatch, kind):
    save_torch(tensor(**kind), tmp_path / "t.pt", monkeypatch)
    with pytest.raises(UserError, match="t.pt is damaged"):
        read_torch(tmp_path / "t.pt")


@pytest.mark.parametrize(
    "records, message",
    [
        ({"data/0": b"1234"}, "is damaged .storage 0 has 4 bytes for 6 numbers"),
        ({"data.pkl": b"\x80\x02}q\x00."}, None),
        ({"data.pkl": pickle.dumps([1, 2])}, "holds no state dict"),
        ({"data.pkl": b"no pickle"}, "is damaged"),
        ({"byteorder": b"big"}, "other byte order"),
    ],
)
def test_damaged_files(tmp_path, monkeypatch, records, message):
    save_torch(tensor(), tmp_path / "t.pt", monkeypatch, **records)
    if message is None:
        assert read_torch(tmp_path / "t.pt") == {}
        return
    with pytest.raises(UserError, match=message):
        read_torch(tmp_path / "t.pt")


def test_what_is_no_archive(tmp_path):
    (tmp_path / "t.pt").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(UserError, match="is no file that torch saves since"):
        read_torch(tmp_path / "t.pt")
    with pytest.raises(UserError, match="cannot read"):
        read_torch(tmp_path / "missing.pt")


def test_parts_that_are_missing_or_do_not_belong(folder, golden, tmp_path):
    run = tmp_path / "run"
    (folder / "tokenizer.pkl").rename(folder / "kept")
    with pytest.raises(UserError, match="has no tokenizer.pkl, beside the model or in"):
        import_run(str(folder), run)
    # where nanochat keeps it
    place = folder.parents[1] / "tokenizer"
    place.mkdir()
    other = Tokenizer(golden[2].pattern, golden[2].tokens[:-1])
    (place / "tokenizer.pkl").write_bytes(pickle.dumps(other.encoding))
    with pytest.raises(UserError, match="they do not belong together"):
        import_run(str(folder), run)
    (place / "tokenizer.pkl").write_bytes(pickle.dumps({"no": "tokenizer"}))
    with pytest.raises(UserError, match="holds no tokenizer of nanochat's"):
        import_run(str(folder), run)
    (folder / "meta_000007.json").unlink()
    with pytest.raises(UserError, match="meta_000007.json"):
        import_run(str(folder), run)
    with pytest.raises(UserError, match="give the folder of one model .of nanochat's such as"):
        import_run(str(folder.parent), run)
    assert not run.exists()


def test_from_a_repository(folder, golden, tmp_path, model_hub):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = model_hub.put_commit("me/nano", files)
    model_hub.put_commit("me/nano", {"README.md": b"gone"})
    import_run(f"hf:me/nano@{commit}", tmp_path / "run")
    # a flat repository's folder has no name: what it was trained to be is in its metadata
    model = load_model(tmp_path / "run")
    assert model.stage == "sft" and model.meta["imported"] == f"hf:me/nano@{commit}"
    with pytest.raises(UserError, match="holds no model of a kind that comes in here"):
        import_run("hf:me/nano", tmp_path / "other")


@pytest.mark.slow
def test_files_of_torch_itself(golden, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install -e '.[hf]'")
    tensors = {name: torch.tensor(array) for name, array in golden[0].items()}
    tensors["half"] = torch.arange(6.0).reshape(2, 3).T.to(torch.bfloat16)
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3))
    torch.save(tensors, tmp_path / "t.pt")
    back = read_torch(tmp_path / "t.pt")
    for name, array in tensors.items():
        want = array.detach().float().numpy()
        np.testing.assert_array_equal(back[name].astype(np.float32), want, err_msg=name)
    config, params = parity_model("T")
    state = {name: back[name] for name in golden[0]}
    jax.tree.map(np.testing.assert_array_equal, from_nanochat(state, config), params)
