"""What a run has made goes to the Hub, in one commit: whole, or not at all.

Four kinds can be pushed (`KINDS`): a whole run, one model of it, its tokenizer, one of its exports.
Each goes to the root of a repository of its own, with a model card (`card`) and a list of its files
with their checksums (`MANIFEST`), which `pull` reads.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lib import hub
from lib.data.tokenizer import FILE
from lib.files import UserError, choose, first_line, parse_json, sha256, write_json
from lib.home import LEFT_OUT
from lib.interop.card import card
from lib.interop.exports import FOLDER, FORMATS, PROOF
from lib.runs import STAGES, load_model, stages
from lib.train import checkpoint
from lib.train.records import KIND

# what a repository of ours is known by
MANIFEST = "rawchat.json"
FORMAT = 1
# a checkpoint's own record
META = "meta.json"
CARD = "README.md"
# what the Hub itself puts into a repository
ITS_OWN = (".gitattributes", CARD)


class Parcel(NamedTuple):
    """What goes up: (name in the repository: file here), and what is told of it."""

    files: dict[str, Path]
    stage: str = ""
    export: str = ""
    proof: str = ""


class Pushed(NamedTuple):
    """What was pushed where; `commit` names this revision for ever."""

    repo: str
    commit: str
    files: int
    bytes: int

    def told(self, run: str) -> str:
        # the Hub takes the beginning of a commit's id for no revision
        source = f"hf:{self.repo}@{self.commit}"
        return (
            f"pushed {self.files} files, {self.bytes / 1e6:,.1f} MB, to "
            f"https://huggingface.co/{self.repo}\n"
            f"bring it back: python -m lib.interop pull --source {source} --run {run}"
        )


# ---- the kinds -----------------------------------------------------------------------------------


class Wish(NamedTuple):
    """What of a run is wanted: as in `load_model`, and for an export its format."""

    stage: str = ""
    ckpt: str = ""
    format: str = ""


@contextlib.contextmanager
def _whole_run(run: Path, wish: Wish) -> Iterator[Parcel]:
    """Everything in the folder, and of each stage's checkpoints the newest."""
    kept = [checkpoint.latest(run / STAGES[stage]) for stage in stages(run, only=None)]
    files = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_symlink() or not path.is_file() or _stays(name):
            continue
        step = next((parent for parent in path.parents if parent.name.startswith("step_")), None)
        if step is None or step in kept:
            files[name] = path
    yield Parcel(files)


def _stays(name: str) -> bool:
    """Whether a file of a run folder stays on the machine."""
    # earlier trainings, and exports, which are pushed by their own name
    top = name.partition("/")[0]
    return bool(LEFT_OUT.search(name)) or top == FOLDER or top.startswith("old-") or name == CARD


@contextlib.contextmanager
def _one_model(run: Path, wish: Wish) -> Iterator[Parcel]:
    """One checkpoint's parameters without what only its training needs, and the tokenizer."""
    model = load_model(run, wish.ckpt, wish.stage)
    meta = {key: value for key, value in model.meta.items() if key not in ("step", "metric")}
    with tempfile.TemporaryDirectory(dir=run, prefix=".push-") as folder:
        params = {"params": model.params}
        step, metric = model.meta["step"], model.meta["metric"]
        checkpoint.save(folder, step, params, meta, metric=metric)
        made = Path(checkpoint.path_of(folder, step))
        files = {path.name: path for path in sorted(made.iterdir())}
        yield Parcel(files | {FILE: run / FILE}, model.stage)


@contextlib.contextmanager
def _tokenizer(run: Path, wish: Wish) -> Iterator[Parcel]:
    if not (run / FILE).exists():
        raise UserError(f"{run} has no {FILE}: run 01_tokenizer.py --run {run.name} first")
    yield Parcel({FILE: run / FILE})


@contextlib.contextmanager
def _export(run: Path, wish: Wish) -> Iterator[Parcel]:
    """The folder of an export, which its proof has held."""
    choose("export format", wish.format, FORMATS)
    folder = run / FOLDER / wish.format
    if not folder.is_dir():
        raise UserError(
            f"{run} has no {wish.format} export: python -m lib.interop export --run {run.name} "
            f"--format {wish.format} makes one"
        )
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path
    proof = folder.with_suffix(PROOF)
    told = proof.read_text("utf-8") if proof.exists() else ""
    yield Parcel(files, export=wish.format, proof=told)


# what can be pushed: a function (run, wish) -> context of a Parcel; adding one is one entry
KINDS = {"model": _one_model, "run": _whole_run, "tokenizer": _tokenizer, "export": _export}


# ---- pushing -------------------------------------------------------------------------------------


def push(
    run,
    repo: str,
    kind: str = "model",
    wish: Wish | None = None,
    private: bool = True,
    token: str | None = None,
) -> Pushed:
    """Send what KINDS names of a run folder to a Hub repository, in one commit.

    private: who may see a repository that is made now. UserError where the run does not have it,
    where the repository holds something that is not ours, and where the Hub refuses. A push that
    was cut off is pushed again: large files that have arrived are not sent twice.
    """
    run = Path(run)
    repo = hub.parse(repo).repo
    pack = choose("kind to push", kind, KINDS)
    if not run.is_dir():
        raise UserError(f"there is no run {run}: --run names a folder in --runs-dir")
    with pack(run, wish or Wish()) as parcel, hub.reaching(f"cannot push to hf:{repo}", token):
        return _send(run, repo, kind, parcel, private, token)


def _send(
    run: Path, repo: str, kind: str, parcel: Parcel, private: bool, token: str | None
) -> Pushed:
    """Make the repository, and commit files, list and card together."""
    # what is wrong with the card is wrong before anything is sent
    about = card(run, repo, parcel.export or kind, parcel.stage, parcel.proof)
    hub.make(repo, token, private)
    before = _held(repo, private, token)
    listed = {name: _entry(path) for name, path in parcel.files.items()}
    manifest = dict(
        format=FORMAT,
        kind=kind,
        run=run.name,
        stage=parcel.stage,
        export=parcel.export,
        files=listed,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, MANIFEST), manifest)
        Path(folder, CARD).write_text(about, "utf-8")
        files = parcel.files | {name: Path(folder, name) for name in (MANIFEST, CARD)}
        gone = [name for name in before if name not in files]
        try:
            commit = hub.commit(repo, files, gone, f"{kind} of {run.name}", token)
        except FileNotFoundError as e:
            raise UserError(f"{run} changed while it was sent ({first_line(e)}): push again") from e
    return Pushed(repo, commit, len(files), sum(entry["bytes"] for entry in listed.values()))


def _entry(path: Path) -> dict:
    """Size and checksum of a file."""
    return dict(bytes=path.stat().st_size, sha256=sha256(path))


def _held(repo: str, private: bool, token: str | None) -> list[str]:
    """Files of an earlier push that are in a repository.

    UserError where it holds what no push of ours has brought, and where everybody may see it while
    it was to be private.
    """
    info = hub.patiently(lambda: hub.client(token).model_info(repo))
    if private and info.private is False:
        raise UserError(
            f"{repo} is there and public: pass --public to push to it, or choose another name"
        )
    names = [file.rfilename for file in info.siblings or []]

    def record(name: str) -> dict:
        """What a JSON file there holds; nothing where it is not there."""
        if name not in names:
            return {}
        with tempfile.TemporaryDirectory() as folder:
            hub.download(hub.Revision(repo, info.sha), [name], Path(folder), token)
            return parse_json(Path(folder, name).read_bytes(), f"{name} of {repo}")

    # the list of an earlier push; 02 keeps a checkpoint and a tokenizer without one
    listed = record(MANIFEST).get("files") or {}
    meta = {} if listed else record(META)
    if meta.get("kind") == KIND:
        listed = [*meta.get("files", {}), META, FILE]
    strange = [name for name in names if name not in ITS_OWN]
    if strange and not listed:
        raise UserError(
            f"{repo} holds {strange[0]} and {len(strange) - 1} other files that were not pushed "
            "from here: choose another name"
        )
    return [name for name in listed if name in names]
