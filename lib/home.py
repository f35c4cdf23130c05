"""Where runs live: one home for every tab, on storage that outlives the machine.

A notebook in Colab or Kaggle runs on a machine of its own, which vanishes. All notebooks take the
same `home`: empty (this machine), `drive` (Google Drive, mounted for you), `hub:USER/NAME` (a
repository of the Hugging Face Hub), `gs://…` or `s3://…` (a bucket), or the path of a folder.

It is asked once: what one notebook was given, the next ones on this machine take too; and the
environment variable, or secret of Colab's or Kaggle's, RAWCHAT_HOME answers for all of them.

A folder is worked in directly. A bucket or a repository is mirrored: `pull` brings what another
machine left there, `Mirror` sends what changes here, in the background. Checkpoints carry
checksums of their own, so what a killed upload leaves is noticed by whoever loads it.
"""

import contextlib
import math
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from lib import hub
from lib.files import (
    UserError,
    filesystem,
    first_line,
    is_remote,
    local_path,
    parse_json,
    reaching,
    read_json,
    reading,
    replacing,
    sha256,
    write_atomic,
    write_json,
    writing,
)

# where Colab mounts Google Drive, and the folder of ours in it
DRIVE = Path("/content/drive")
DRIVE_FOLDER = DRIVE / "MyDrive" / "rawchat"

# the variable, or secret, that names the home of all notebooks; where the last answer is kept
VARIABLE = "RAWCHAT_HOME"
ANSWER = Path("runs") / ".home"

# token shards that stay at home, some 100 MB each: with all of a large text Drive would be full
KEPT_SHARDS = 20

# what a run folder on a mirror is known by: the files, their checksums, and when they were sent
MANIFEST = "manifest.json"

# what stays on the machine: half-written files, locks, notes to ourselves, what can be made again
LEFT_OUT = re.compile(r"(^|/)\.|\.(tmp|part|lock|old)$|(^|/)(wandb|trace)/")


T = TypeVar("T")


class Home(NamedTuple):
    """A place for runs: the folder that this machine works in, and what it is mirrored to."""

    name: str  # as the user wrote it; "" for this machine
    runs_dir: Path
    remote: str  # "" where the folder itself is the home; else gs://…, s3://… or hub:USER/NAME


def settled(
    name: str, variable: str = "", secret: Callable[[str], str | None] | None = None
) -> str:
    """The home that a notebook means: the one it was given, else what was answered before.

    That is what RAWCHAT_HOME of the environment says (variable), else what the last notebook here
    was given, else that name among the secrets of a machine that is lent: there it is said, too,
    that there is no answer. One printed line says which it is.
    """
    name = name.strip()
    if name:
        return name
    answers = {
        f"by {VARIABLE} of the environment": lambda: variable,
        f"as the last notebook here was given ({ANSWER})": _last_answer,
        f"by the secret {VARIABLE}": lambda: secret(VARIABLE) if secret else None,
    }
    for why, answer in answers.items():
        if chosen := (answer() or "").strip():
            print(f"home: {chosen}, {why}; home=. is this machine")
            return chosen
    if secret:
        print(
            "note: runs live on this machine and are lost with it: give a home, or set it once for "
            f"all notebooks as the secret {VARIABLE}"
        )
    return ""


def _last_answer() -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return ANSWER.read_text()
    return ""


def remember(name: str):
    """Let the next notebooks on this machine take this home, where they are given none."""
    if name and name != _last_answer().strip():
        with contextlib.suppress(OSError):
            ANSWER.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(ANSWER, name + "\n")


def open_home(name: str = "", token: Callable[[], str | None] = lambda: None) -> Home:
    """The home called `name`, tried before any compute: a file is written, read and deleted.

    token: gives the Hub's token when it is needed. UserError in one sentence where the place can't
    be used: Drive refused or full, a bucket without credentials, a repository that refuses writing.
    """
    name = name.strip()
    if name == "drive":
        _mount_drive()
        return _folder_home(name, DRIVE_FOLDER)
    if name.startswith("hub:") or is_remote(name):
        home = Home(name, Path("runs"), name.rstrip("/"))
        _place(home, token).probe()
        return home
    if name:
        return _folder_home(name, local_path(name))
    return Home("", Path("runs"), "")


def _folder_home(name: str, folder: Path) -> Home:
    """A home in a folder, after a file was written there, read back and deleted."""
    probe = folder / f".probe-{uuid.uuid4().hex[:8]}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_atomic(probe, "probe")
            probe.read_text()
        finally:
            probe.unlink(missing_ok=True)
    return Home(name, folder / "runs", "")


def _mount_drive():
    """Mount Google Drive, as Colab does; UserError elsewhere, and where the user says no."""
    if DRIVE_FOLDER.parent.is_dir():
        return
    try:
        from google.colab import drive  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "home=drive is for Colab, and this is not Colab: give a path, gs://… or hub:USER/NAME"
        ) from None
    try:
        drive.mount(str(DRIVE))
    except Exception as e:  # each way to refuse has a class of its own
        raise UserError(
            f"Google Drive was not mounted ({first_line(e)}): allow it and run this cell again, "
            "or choose another home"
        ) from e


# ---- mirrors -------------------------------------------------------------------------------------


class Folder:
    """A home that is a folder, such as Drive's, as a place for what is not worked on there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> list[str]:
        """Token shards, as paths below the home; the runs there are no one's business."""
        return [f"tokens/{path.name}" for path in (self.folder / "tokens").glob("*.npy")]

    def get(self, name: str, path: Path):
        with reading(self.folder / name):
            shutil.copyfile(self.folder / name, path)

    def change(self, new: dict[str, Path], gone: Iterable[str]):
        for name, path in new.items():
            with replacing(self.folder / name) as tmp:
                shutil.copyfile(path, tmp)


class Bucket:
    """A mirror on a bucket, or on anything else that fsspec knows an address for."""

    def __init__(self, address: str):
        self.address = address

    def probe(self):
        name = f"probe-{uuid.uuid4().hex[:8]}"
        fs, root = filesystem(self.address)
        with reaching(self.address):
            fs.makedirs(root, exist_ok=True)
            fs.pipe_file(f"{root}/{name}", b"probe")
            fs.cat_file(f"{root}/{name}")
            fs.rm_file(f"{root}/{name}")

    def names(self) -> list[str]:
        """All files, as paths below the home."""
        fs, root = filesystem(self.address)
        with reaching(self.address):
            root = fs._strip_protocol(root).rstrip("/")
            return [path[len(root) + 1 :] for path in fs.find(root)]

    def read(self, name: str) -> bytes:
        fs, root = filesystem(self.address)
        with reaching(f"{self.address}/{name}"):
            return fs.cat_file(f"{root}/{name}")

    def get(self, name: str, path: Path):
        fs, root = filesystem(self.address)
        with reaching(f"{self.address}/{name}"):
            fs.get_file(f"{root}/{name}", str(path))

    def change(self, new: dict[str, Path], gone: Iterable[str]):
        """Upload `new` (name: local file) in its order, then delete `gone`."""
        fs, root = filesystem(self.address)
        with reaching(self.address):
            for name, path in new.items():
                fs.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                fs.put_file(str(path), f"{root}/{name}")
            for name in gone:
                with contextlib.suppress(FileNotFoundError):
                    fs.rm_file(f"{root}/{name}")


class Repository:
    """A mirror in a model repository of the Hugging Face Hub; one change is one commit."""

    def __init__(self, repo: str, token: str | None):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            raise UserError(f"home=hub:{repo} is no repository: write hub:USER/NAME")
        self.repo = repo
        self.token = token
        self.api = hub.client(token)

    def _reaching(self):
        return hub.reaching(f"cannot use home=hub:{self.repo}", self.token)

    def probe(self):
        import huggingface_hub

        if not self.token:
            raise UserError(
                f"home=hub:{self.repo} needs the secret HF_TOKEN with write access: set it among "
                "Colab's or Kaggle's secrets, or in the environment"
            )
        with self._reaching():
            hub.make(self.repo, self.token)
            # a commit is the only proof that one may write
            note = huggingface_hub.CommitOperationAdd("probe.txt", b"probe")
            self.api.create_commit(self.repo, [note], commit_message="can this be written?")
            gone = huggingface_hub.CommitOperationDelete("probe.txt")
            self.api.create_commit(self.repo, [gone], commit_message="it can")

    def names(self) -> list[str]:
        with self._reaching():
            return self.api.list_repo_files(self.repo)

    def read(self, name: str) -> bytes:
        with self._reaching(), tempfile.TemporaryDirectory() as folder:
            path = self.api.hf_hub_download(self.repo, name, local_dir=folder)
            return Path(path).read_bytes()

    def get(self, name: str, path: Path):
        with self._reaching(), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            os.replace(self.api.hf_hub_download(self.repo, name, local_dir=folder), path)

    def change(self, new: dict[str, Path], gone: Iterable[str]):
        there = set(self.names())
        gone = [name for name in gone if name in there]
        if new or gone:
            with self._reaching():
                hub.commit(self.repo, new, gone, "runs as they are now", self.token)


def _place(home: Home, token: Callable[[], str | None]):
    if home.remote.startswith("hub:"):
        return Repository(home.remote.removeprefix("hub:"), token())
    return Bucket(home.remote)


# ---- token shards --------------------------------------------------------------------------------


class Shelf:
    """Token shards that stay at home, so that whoever takes a run over need not tokenise anew.

    KEPT_SHARDS of them at most; the others are made anew while training reads the first ones. What
    goes wrong is told once, and ends nothing. sends: of several processes one does.
    """

    def __init__(self, place, name: str, sends: bool = True):
        self.place, self.name, self.sends = place, name, sends
        self.lock = threading.Lock()
        # what is there; None until it was asked for
        self.there: set[str] | None = None
        self.broken = self.told_full = self.told_brought = False

    def bring(self, path: Path, read: Callable[[Path], T | None]) -> T | None:
        """What `read` says of a shard that was brought; None where home hasn't it, or not whole."""
        name = f"tokens/{path.name}"
        with self._guarded():
            if self.broken or name not in self._names():
                return None
            with replacing(path) as tmp:
                self.place.get(name, tmp)
            shard = read(path)
            if shard is None:
                # damaged: the one that is made now is sent
                self._names().discard(name)
            elif not self.told_brought:
                self.told_brought = True
                print(f"home: token shards come from {self.name}, tokenised before")
            return shard
        return None

    def keep(self, path: Path):
        """Send a shard home, where it isn't there and there is room."""
        name = f"tokens/{path.name}"
        with self._guarded():
            if self.broken or not self.sends or name in self._names():
                return
            if len(self._names()) >= KEPT_SHARDS:
                self._tell_full()
                return
            self.place.change({name: path}, ())
            self._names().add(name)

    def _names(self) -> set[str]:
        with self.lock:
            if self.there is None:
                names = self.place.names()
                self.there = {name for name in names if re.fullmatch(r"tokens/[^/]+\.npy", name)}
            return self.there

    def _tell_full(self):
        if not self.told_full:
            self.told_full = True
            print(
                f"home: {self.name} keeps {KEPT_SHARDS} token shards, about 2 GB; the others are "
                "tokenised anew on another machine, while it trains"
            )

    @contextlib.contextmanager
    def _guarded(self):
        """Tell what goes wrong, once, and leave the shelf alone from then on."""
        try:
            yield
        except (UserError, OSError) as e:
            if not self.broken:
                print(f"warning: no token shards to or from {self.name}: {first_line(e)}")
            self.broken = True


# ---- in and out ----------------------------------------------------------------------------------


def _manifest(place, home: Home, name: str) -> dict:
    """What a run's manifest at home says: its "files" and the "time" they were sent."""
    where = f"{home.name}/{name}"
    cure = "delete it there and send the run again"
    manifest = parse_json(place.read(name), where, cure=cure)
    files, time_sent = manifest.get("files"), manifest.get("time")
    if not isinstance(files, dict) or not isinstance(time_sent, int | float):
        raise UserError(f"{where} is damaged, it lists no files: {cure}")
    return manifest


def pull(home: Home, run: str = "", token: Callable[[], str | None] = lambda: None) -> str:
    """Bring a run from the home to this machine; the run's name, "" where the home has none.

    An empty `run` stands for the one that was sent last. Files that are the same here stay; what
    has changed on both sides since they last agreed is refused: no tab overwrites another's work.
    """
    if not home.remote:
        return run
    place = _place(home, token)
    manifests = [name for name in place.names() if re.fullmatch(rf"runs/[^/]+/{MANIFEST}", name)]
    sent = {name.split("/")[1]: _manifest(place, home, name) for name in manifests}
    run = run or max(sent, key=lambda name: sent[name]["time"], default="")
    if run not in sent:
        return run

    for name in sent[run]["files"]:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(
                f"{home.name} lists a file {name!r} of {run} that lies outside it: don't trust it"
            )

    folder = home.runs_dir / run
    wanted = _wanted(home, folder, sent[run]["files"])
    for name in wanted:
        with replacing(folder / name) as tmp:
            place.get(f"runs/{run}/{name}", tmp)
    if wanted:
        print(f"home: {len(wanted)} files of {run} came from {home.name}")
    _agree(folder, home.remote, sent[run]["files"])
    return run


def _wanted(home: Home, folder: Path, files: dict[str, str]) -> list[str]:
    """The files that home has otherwise than this machine; refused where both have changed them."""
    before, now = _agreed(folder, home.remote), _checksums(folder)
    wanted = [name for name, digest in files.items() if now.get(name) != digest]
    both = [
        name for name in wanted if name in now and before.get(name) not in (now[name], files[name])
    ]
    if both:
        raise UserError(
            f"{folder} and {home.name} have both changed since they last agreed ({both[0]} and "
            f"{len(both) - 1} more): two machines work on this run; stop one, and move {folder} "
            "away to go on with what the home has"
        )
    return wanted


class Mirror:
    """Sends a run folder to its home in the background: `send()` after a save, `wait()` at the end.

    A failed upload is one printed sentence; the next `send` tries again, and training goes on.
    """

    def __init__(self, home: Home, run: Path, token: Callable[[], str | None] = lambda: None):
        self.home = home
        self.run = Path(run)
        self.place = _place(home, token) if home.remote else None
        # when the newest of what is at home was there to be sent; inf where nothing has to be
        self.sent_at = time.monotonic() if home.remote else math.inf
        self._thread = None
        self._again = threading.Event()

    def send(self):
        """Start an upload of what has changed, or have the one that is under way look again."""
        if self.place is None:
            return
        self._again.set()
        if self._thread is None or not self._thread.is_alive():
            # no daemon: a program that ends waits for what it has begun to send
            self._thread = threading.Thread(target=self._upload, name="home")
            self._thread.start()

    def wait(self):
        """Return when all that was to be sent is at home; UserError where it could not be sent."""
        if self.place is None:
            return
        if self._thread is not None:
            self._thread.join()
        _send(self.place, self.home.remote, self.run)

    def shelf(self, sends: bool = True) -> "Shelf | None":
        """Where token shards are kept at home; None where home is this machine."""
        if self.place is not None:
            return Shelf(self.place, self.home.name, sends)
        if self.home.name in ("", "."):
            return None
        return Shelf(Folder(self.home.runs_dir.parent), self.home.name, sends)

    def _upload(self):
        while self._again.is_set():
            self._again.clear()
            begun = time.monotonic()
            try:
                _send(self.place, self.home.remote, self.run)
                self.sent_at = begun
            except UserError as e:
                print(
                    f"warning: {self.run} was not sent to {self.home.name}, "
                    f"the next save tries again: {e}"
                )


def _send(place, remote: str, run: Path):
    """Upload what differs from what was sent before: checkpoints first, the manifest last."""
    before, now = _agreed(run, remote), _checksums(run)
    changed = [name for name in now if now[name] != before.get(name)]
    changed.sort(key=lambda name: "/step_" not in f"/{name}")
    gone = [f"runs/{run.name}/{name}" for name in before if name not in now]
    if not changed and not gone:
        return

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, MANIFEST)
        write_json(manifest, {"time": time.time(), "files": now})
        new = {f"runs/{run.name}/{name}": run / name for name in changed}
        new[f"runs/{run.name}/{MANIFEST}"] = manifest
        try:
            place.change(new, gone)
        except (
            FileNotFoundError
        ):  # a checkpoint was pruned meanwhile: the next call sees what is left
            return
    _agree(run, remote, now)


def _checksums(run: Path) -> dict[str, str]:
    """{file below the run folder: SHA-256}; links are not followed out of it."""
    known = _read(run / ".checksums.json")
    checksums, fresh = {}, {}
    for path in sorted(run.rglob("*")) if run.is_dir() else ():
        name = path.relative_to(run).as_posix()
        if LEFT_OUT.search(name) or path.is_symlink() or not path.is_file():
            continue
        # a checkpoint of gigabytes is read once: size and time tell that it is still the same
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns]
            kept = known.get(name)
            checksums[name] = kept[2] if kept and kept[:2] == stamp else sha256(path)
            fresh[name] = [*stamp, checksums[name]]
    if fresh != known:
        write_json(run / ".checksums.json", fresh)
    return checksums


def _agreed(run: Path, remote: str) -> dict[str, str]:
    """The files and checksums of when this machine and a home last had the same.

    Nothing, where that was another home: a run that moves is sent whole.
    """
    record = _read(run / ".agreed.json")
    if not isinstance(record.get("files"), dict):
        # written before the home's name was
        return record
    return record["files"] if record.get("home") == remote else {}


def _agree(run: Path, remote: str, checksums: dict[str, str]):
    write_json(run / ".agreed.json", {"home": remote, "files": checksums})


def _read(path: Path) -> dict:
    with contextlib.suppress(UserError):
        return read_json(path)
    return {}
