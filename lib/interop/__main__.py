"""`python -m lib.interop`: a model of ours for other programs, other people's model as a run."""

import tyro

from lib.files import local_path
from lib.interop import export_run, import_run
from lib.interop.hub_pull import pull as pull_run
from lib.interop.hub_push import Wish
from lib.interop.hub_push import push as push_run
from lib.interrupts import started
from lib.notebook import secret, setup
from lib.runs import newest_run


def export(
    run: str = "",
    format: str = "transformers",
    stage: str = "",
    ckpt: str = "",
    out: str = "",
    runs_dir: str = "runs",
):
    """Write a model of a run for another program, and prove it by that program.

    Args:
        run: name of the run; empty takes the one that was trained last
        format: transformers, gguf (llama.cpp), onnx, litert (phones), stablehlo, or
            stablehlo_inside, which has the weights in its files
        stage: base, mid, sft or rl; empty for the furthest that the run has
        ckpt: best, or a checkpoint's path; empty for the newest
        out: the folder to write, new or empty; none for exports/FORMAT in the run folder
        runs_dir: folder that holds the runs
    """
    folder = local_path(runs_dir) / run if run else newest_run(local_path(runs_dir))
    print(export_run(folder, format, stage, ckpt, out).table())


def import_(
    source: str,
    run: str,
    sequence_len: int = 0,
    prove: bool = True,
    stage: str = "",
    runs_dir: str = "runs",
):
    """Make a run of open weights: of the Llama family (SmolLM, uniform Qwen3), or of nanochat.

    Args:
        source: a model's folder, or hf:USER/NAME, or hf:USER/NAME@REVISION
        run: name of the new run
        sequence_len: context to use; 0 takes the model's own
        prove: compare a Llama's logits with transformers' before it is kept (extra hf)
        stage: of nanochat's: base, mid, sft or rl; empty for what its folder or metadata say
        runs_dir: folder that holds the runs
    """
    print(import_run(source, local_path(runs_dir) / run, sequence_len, prove, stage))


def push(
    repo: str,
    run: str = "",
    what: str = "model",
    stage: str = "",
    ckpt: str = "",
    format: str = "transformers",
    public: bool = False,
    runs_dir: str = "runs",
):
    """Send a run, a model, a tokenizer or an export to the Hugging Face Hub, with a model card.

    Needs HF_TOKEN with write access. All goes in one commit: who pulls has all of it or nothing.

    Args:
        repo: USER/NAME; made if it is not there
        run: name of the run; empty takes the one that was trained last
        what: model (parameters and tokenizer), run (whole, to go on elsewhere), tokenizer or export
        stage: of the model: base, mid, sft or rl; empty for the furthest that the run has
        ckpt: of the model: best, or a checkpoint's path; empty for the newest
        format: of the export
        public: let everybody see it; else a repository that is made now is private
        runs_dir: folder that holds the runs
    """
    folder = local_path(runs_dir) / run if run else newest_run(local_path(runs_dir))
    wish = Wish(stage, ckpt, format)
    pushed = push_run(folder, repo, what, wish, private=not public, token=secret("HF_TOKEN"))
    print(pushed.told(folder.name))


def pull(source: str, run: str, runs_dir: str = "runs"):
    """Bring back what was pushed, into a run folder.

    Args:
        source: hf:USER/NAME, or hf:USER/NAME@REVISION for what a branch held at one commit
        run: name of the run that it becomes or, for a tokenizer or an export, is put into
        runs_dir: folder that holds the runs
    """
    print(pull_run(source, local_path(runs_dir) / run, secret("HF_TOKEN")))


COMMANDS = {"export": export, "import": import_, "push": push, "pull": pull}

if __name__ == "__main__":
    setup()
    started()
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m lib.interop")
