"""The model card of what is pushed: the run's report, how to load it, what its data allows."""

from pathlib import Path
from typing import NamedTuple

from lib import report
from lib.files import UserError
from lib.report.blocks import Code, Items, Section, make_section
from lib.report.markdown import markdown
from lib.report.sections import sections
from lib.runs import STAGES, stages
from lib.train import checkpoint

# where the code is to be had
CODE = "https://github.com/rawchat/rawchat"

# source of text: under which terms its publishers give it away
LICENCES = {
    "stdlib": "the source code of Python's standard library, under the PSF licence",
    "climbmix": "karpathy/climbmix-400b-shuffle, cut from NVIDIA's ClimbMix (CC BY-NC 4.0)",
    "fineweb_edu": "karpathy/fineweb-edu-100b-shuffle, cut from FineWeb-Edu (ODC-By 1.0, and "
    "Common Crawl's terms of use)",
    "tinystories": "roneneldan/TinyStories (CDLA-Sharing 1.0)",
}
LICENCES["stdlib_with_tests"] = LICENCES["stdlib"]

# sections of the report that say nothing about the model
LEFT_OUT = ("For the log", "Beside others")


class Load(NamedTuple):
    """How to load what was pushed: some lines of a language, with REPO and NAME in them."""

    language: str
    lines: str


IN_A_CHAT = Load(
    "bash",
    f"git clone {CODE} rawchat && cd rawchat && pip install -e .\n"
    "python -m lib.interop pull --source hf:REPO --run NAME\n"
    "python -m lib.chat --run NAME",
)
LOAD = {
    "run": IN_A_CHAT,
    "model": Load(
        "python",
        f"from lib.runs import load_model  # in a clone of {CODE}\n"
        'model = load_model("", ckpt="hf://REPO")\n'
        "params, config, tokenizer = model.params, model.config, model.tokenizer",
    ),
    "tokenizer": Load(
        "python",
        f"from lib.data.tokenizer import Tokenizer  # in a clone of {CODE}\n"
        'tokenizer = Tokenizer.from_hub("REPO")\n'
        'ids = tokenizer.encode("Hello")',
    ),
    "transformers": Load(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'model = AutoModelForCausalLM.from_pretrained("REPO", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("REPO", trust_remote_code=True)',
    ),
    "gguf": Load(
        "bash",
        "hf download REPO model.gguf --local-dir .\n"
        "llama-cli -m model.gguf -p 'Once upon a time'\n"
        "printf 'FROM ./model.gguf' > Modelfile && ollama create NAME -f Modelfile",
    ),
    "onnx": Load(
        "python",
        "import huggingface_hub, onnxruntime\n"
        'path = huggingface_hub.hf_hub_download("REPO", "forward.onnx")\n'
        "session = onnxruntime.InferenceSession(path)",
    ),
    "litert": Load(
        "python",
        "import huggingface_hub\n"
        "from ai_edge_litert.interpreter import Interpreter\n"
        'path = huggingface_hub.hf_hub_download("REPO", "forward_int8.tflite")\n'
        "forward = Interpreter(path).get_signature_runner()  # forward(tokens=...)",
    ),
    "stablehlo": Load(
        "bash",
        "hf download REPO --local-dir NAME\npip install jax flatbuffers safetensors\n"
        "python NAME/run.py 12 7 99  # goes on from these ids",
    ),
}
LOAD["stablehlo_inside"] = LOAD["stablehlo"]


def card(run: Path, repo: str, kind: str, stage: str = "", proof: str = "") -> str:
    """README.md of what is pushed.

    kind: of LOAD. stage: the one that is pushed, "" for several. proof: the table of an export.
    """
    described = report.read(run)
    parts = [
        load_section(repo, kind, run.name),
        make_section("Proof of the export", Code(proof, "text")),
        make_section("Data and licence", Items(data_notes(run, stage))),
    ]
    # of the report all that is words: pictures stand in files of their own
    if kind != "tokenizer":
        parts += [_in_words(part) for part in sections(described)]
    shown = [part for part in parts if part.blocks and part.title not in LEFT_OUT]
    return front_matter(kind) + markdown(described, shown)


def front_matter(kind: str) -> str:
    """What the Hub reads of a card. The licence is the publisher's to choose."""
    library = kind if kind in ("transformers", "gguf", "onnx") else "rawchat"
    return (
        f"---\nlicense: other\nlibrary_name: {library}\npipeline_tag: text-generation\n"
        "tags:\n- rawchat\n- jax\n---\n\n"
    )


def load_section(repo: str, kind: str, name: str) -> Section:
    """The three lines that load it."""
    load = LOAD[kind]
    lines = load.lines.replace("REPO", repo).replace("NAME", name)
    return make_section("Load it", Code(lines, load.language))


def _in_words(section: Section) -> Section:
    """A section without its pictures, and without the text behind one, which explains it."""
    blocks = []
    before = ""
    for block in section.blocks:
        if block.kind != "charts" and (before, block.kind) != ("charts", "text"):
            blocks.append(block)
        before = block.kind
    return make_section(section.title, *blocks)


def data_notes(run: Path, stage: str = "") -> list[str]:
    """What each stage was trained on and what that text's licence is, a sentence each."""
    notes = []
    for name in [stage] if stage else _stages(run):
        path = checkpoint.latest(run / STAGES[name])
        meta = checkpoint.read_meta(path) if path else {}
        notes += _trained_on(name, meta)
    notes.append(
        "This card names no licence for the weights: that is for whoever publishes them, within "
        "what the licences of the data allow."
    )
    return notes


def _stages(run: Path) -> list[str]:
    """The stages of a run; none where its checkpoints can't be read."""
    try:
        return stages(run)
    except UserError:
        return []


def _trained_on(stage: str, meta: dict) -> list[str]:
    """What a checkpoint's metadata says of its data."""
    settings = meta.get("settings") or {}
    if meta.get("imported"):
        return [f"The weights of {stage} are those of {meta['imported']}: their licence holds."]
    if settings.get("mixture"):
        sets = ", ".join(settings["mixture"])
        return [
            f"{stage} was trained on {sets}: what came from the Hub is under the licence of its "
            "page, generated exercises are free."
        ]
    source = settings.get("source")
    if not source:
        return []
    terms = LICENCES.get(source, f"{source}, texts of the trainer's own: ask them for its licence")
    return [f"{stage} was trained on {terms}."]
