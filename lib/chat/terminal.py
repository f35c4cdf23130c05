"""Talking in a terminal: `python -m lib.chat`."""

import contextlib
import os
import re
import secrets
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from lib.chat.messages import Piece, Reader, compact, ends, fit, reply
from lib.data.roles import in_turns
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, first_line, local_path, read_json, replacing, write_json
from lib.generate import Engine, Sampling
from lib.model import quantized
from lib.runs import Model, load_model, open_run

HELP = """/clear        forget the conversation
/regen        another answer to your last message
/save FILE    write the conversation as JSON
/load FILE    take up a saved conversation
/set          show the sampling settings; /set temperature 0.5 changes one
/help         this text
/quit         leave (or Ctrl-D)
//text        a message that begins with a slash
A line that ends in \\ goes on in the next one; a line of three quotes (\"\"\") begins a text of
many lines and another ends it.
Ctrl-C stops an answer."""
TUNABLE = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# a model may write escape sequences; a terminal must not obey them
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PLAIN = dict.fromkeys(("you", "tool", "note", "bad", "end"), "")
COLOURS = {
    "you": "\033[1;36m",
    "tool": "\033[2;33m",
    "note": "\033[2m",
    "bad": "\033[31m",
    "end": "\033[0m",
}


@dataclass
class Settings:
    """Talk to a trained model in the terminal; /help there tells the commands."""

    run: str = ""
    """run folder, runs/NAME or a path; empty for the newest"""
    stage: str = ""
    """base, mid, sft or rl; empty for the furthest that the run has"""
    ckpt: str = ""
    """empty for the newest checkpoint, best, or a checkpoint's path or address"""
    prompt: str = ""
    """answer this one message, print nothing but the answer and leave; - reads it from standard
    input
    """
    int8: bool = False
    """decode with the matrices as 8-bit integers; `python -m benchmarks.decode --run RUN`
    measures what that costs and brings here
    """
    speculate: int = 0
    """tokens to draft ahead from what was said before, checked all at once: the same text,
    faster where it repeats itself; 0 for none
    """
    system: str = ""
    """a system message, put before the conversation"""
    max_tokens: int = 512
    """longest answer, in tokens"""
    temperature: float = 0.6
    """0 always takes the likeliest token"""
    top_k: int = 50
    """choose among this many likeliest tokens; 0 for all"""
    top_p: float = 1.0
    """choose among the likeliest tokens that together have this probability"""
    min_p: float = 0.0
    """leave out tokens less likely than this share of the likeliest one"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens that were there already less likely"""
    seed: int | None = None
    """the same seed gives the same answers; none for others each time"""


class Talk:
    """One conversation with a model: what was said, the settings, and where the answers go."""

    def __init__(self, model: Model, settings: Settings, colours: dict = PLAIN, tools: bool = True):
        from lib.sandbox import calculator

        # tools: whether calls are shown
        self.model, self.settings, self.colours, self.tools = model, settings, colours, tools
        self.context = model.config.sequence_len
        params = quantized(model.params, model.config) if settings.int8 else model.params
        self.engine = Engine(
            params, model.config, 1, self.context, model.tokenizer, calculator, settings.speculate
        )
        self.seed = secrets.randbits(31) if settings.seed is None else settings.seed
        self.sampling()  # bad settings are told now
        self.clear()

    def clear(self):
        self.messages: list[dict] = (
            [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        )

    def sampling(self, **changes) -> Sampling:
        chosen = {name: getattr(self.settings, name) for name in TUNABLE}
        return Sampling(**chosen | changes, seed=self.seed, stop=ends(self.model.tokenizer))

    def note(self, text: str, colour: str = "note"):
        print(f"{self.colours[colour]}{text}{self.colours['end']}", file=sys.stderr, flush=True)

    def ask(self, text: str):
        """Add the user's message and answer it; a message that can't be rendered or doesn't fit is
        taken back.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            self.answer()
        except UserError:
            self.messages.pop()
            raise

    def prompt(self) -> list[int]:
        tokenizer = self.model.tokenizer
        if self.model.stage == "base":  # has never seen a chat: it goes on where the text ends
            ids = tokenizer.encode(self.messages[-1]["content"], bos=True)
            if len(ids) >= self.context:
                raise UserError(
                    f"this makes {len(ids)} tokens and the model's context has {self.context}: "
                    "shorten it"
                )
            return ids
        ids, dropped = fit(tokenizer, self.messages, self.context, self.settings.max_tokens)
        if dropped:
            self.note(
                f"(the oldest {dropped} messages don't fit into the model's {self.context} tokens "
                "and were left out)"
            )
        return ids

    def answer(self):
        """Write the answer to the last message and remember it, also when Ctrl-C cuts it short."""
        ids = self.prompt()
        reader = Reader(self.model.tokenizer)
        sampling = self.sampling(max_tokens=min(self.settings.max_tokens, self.context - len(ids)))
        self.seed += 1
        stopped, last = False, None
        try:
            with (
                _interrupted() as flag,
                contextlib.closing(reply(self.engine, ids, sampling, reader)) as pieces,
            ):
                for piece in pieces:
                    last = self._show(piece, last)
                    if stopped := flag.is_set():
                        break
        except KeyboardInterrupt:  # the next message must find an answer before it
            self.messages.append({"role": "assistant", "content": compact(reader.parts)})
            raise
        print(self._close(last), flush=True)
        if stopped:
            self.note("(stopped)")
        elif reader.finish == "length":
            self.note(f"(cut after {sampling.max_tokens} tokens)")
        self.messages.append({"role": "assistant", "content": compact(reader.parts)})

    def _show(self, piece: Piece, last: Piece | None) -> Piece:
        """Print a piece, tool calls in brackets and their own colour; `last` is the piece before
        it.
        """
        if piece.kind == "text" or self.tools:
            if last is None or last.index != piece.index:
                mark = {"text": "", "python": self.colours["tool"] + "[", "python_output": " = "}[
                    piece.kind
                ]
                print((self._close(last) if piece.kind != "python_output" else "") + mark, end="")
            # calls that are shown stand between the words themselves
            text = piece.text if self.tools else piece.said
            print(UNPRINTABLE.sub("", text), end="", flush=True)
        return piece

    def _close(self, last: Piece | None) -> str:
        return f"]{self.colours['end']} " if self.tools and last and last.kind != "text" else ""

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False when it asks to leave. Raises UserError."""
        name, _, rest = line[1:].strip().partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit", "q"):
            return False
        if name == "help":
            self.note(HELP)
        elif name == "clear":
            self.clear()
            self.note("(forgotten)")
        elif name == "regen":
            if not self.messages or self.messages[-1]["role"] == "system":
                raise UserError("there is no message to answer yet: write one")
            if self.messages[-1]["role"] == "assistant":
                self.messages.pop()
            self.answer()
        elif name == "save":
            if not rest:
                raise UserError("/save needs the name of a file to write, such as /save chat.json")
            try:
                write_json(Path(rest).expanduser(), {"messages": self.messages})
            # a folder, a name that is too long, text that is not Unicode
            except (OSError, ValueError) as e:
                raise UserError(
                    f"cannot save to {rest} ({type(e).__name__}): name another file"
                ) from None
            self.note(f"(saved {len(self.messages)} messages to {rest})")
        elif name == "load":
            self.messages = _load(rest, self.model.tokenizer)
            self.note(f"(took up {len(self.messages)} messages from {rest})")
        elif name == "set":
            self.set(rest)
        else:
            raise UserError(f"there is no command /{name}: /help lists them")
        return True

    def set(self, text: str):
        """/set: show the sampling settings, or change one."""
        if text:
            name, _, value = text.replace("=", " ").partition(" ")
            if name not in TUNABLE:
                raise UserError(f"there is no setting {name!r}: choose one of {', '.join(TUNABLE)}")
            old = getattr(self.settings, name)
            try:
                setattr(self.settings, name, type(old)(value))
                self.sampling()
            except ValueError:
                raise UserError(
                    f"{name} is {'an integer' if isinstance(old, int) else 'a number'}, not "
                    f"{value!r}"
                ) from None
            except UserError:
                setattr(self.settings, name, old)
                raise
        self.note("  ".join(f"{name} {getattr(self.settings, name)}" for name in TUNABLE))


@contextlib.contextmanager
def _interrupted():
    """An Event that the first Ctrl-C sets, so that an answer ends between two tokens; a second one
    interrupts at once.
    """
    flag = threading.Event()

    def handler(signum, frame):
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def _load(path: str, tokenizer: Tokenizer) -> list[dict]:
    """The messages of a file that /save wrote, checked."""
    if not path:
        raise UserError("/load needs the name of a file that /save wrote")
    try:
        messages = in_turns(read_json(local_path(path), cure="")["messages"])
        tokenizer.render_conversation(messages)
    except (UserError, ValueError, KeyError, TypeError) as e:
        why = first_line(e) if isinstance(e, UserError) else type(e).__name__
        raise UserError(
            f"{path} cannot be read as a saved conversation ({why}): name a file that /save wrote"
        ) from None
    return messages


def read_message(read) -> str:
    """One message of the user from `read(prompt)`, which gives a line: joins continued lines and
    quoted blocks.
    """
    line = read("> ")
    if line.strip() == '"""':
        lines = []
        while (line := read("… ")).strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = read("… ")
    return "\n".join([*lines, line])


def converse(talk: Talk, read):
    """Read, answer, repeat, until the input ends or /quit.

    An error is one line, and the conversation goes on.
    """
    while True:
        try:
            text = read_message(read)
        except EOFError:
            return
        except KeyboardInterrupt:
            talk.note("\n(Ctrl-D or /quit leaves)")
            continue
        try:
            if text.startswith("//"):
                talk.ask(text[1:])
            elif text.startswith("/") and "\n" not in text:
                if not talk.command(text):
                    return
            elif text.strip():
                talk.ask(text)
        except UserError as e:
            talk.note(f"Error: {e}", "bad")
        except KeyboardInterrupt:
            talk.note("\n(interrupted)")


def main(settings: Settings, coloured: bool):
    """Load the model and talk on standard input and output; `coloured`: the user wants colours
    where a terminal is.
    """

    # what is not text becomes U+FFFD; a TextIOWrapper, though its type is that of any text stream
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    single = settings.prompt
    if single == "-":
        single = sys.stdin.read()
    if settings.prompt and not single.strip():
        raise UserError(
            "the prompt is empty: write a message after --prompt, or - and the message on "
            "standard input"
        )
    folder = (
        Path(settings.run)
        if "/" in settings.run
        else open_run(settings.run, needs="tokenizer.json")
    )
    model = load_model(folder, settings.ckpt, settings.stage)
    tty = sys.stdin.isatty() and sys.stdout.isatty() and not single
    talk = Talk(
        model,
        settings,
        COLOURS if coloured and sys.stdout.isatty() and sys.stderr.isatty() else PLAIN,
        tools=not single,
    )
    if single:
        talk.ask(single)
        return
    if not tty:
        converse(talk, lambda prompt: _line(sys.stdin))
        return
    talk.note(
        f"{folder.name}, {model.stage}, step {model.meta['step']}, context {talk.context} tokens. "
        "/help tells the commands."
    )
    if model.stage == "base":
        talk.note(
            "This model was only pretrained and has not learnt to chat: it goes on with the text "
            "that you write."
        )
    you, end = talk.colours["you"], talk.colours["end"]
    with _line_editing(folder / ".chat_history"):
        # \x01 and \x02 tell readline that what is between them takes no room
        converse(
            talk, lambda prompt: input(f"\x01{you}\x02{prompt}\x01{end}\x02" if you else prompt)
        )


def _line(file) -> str:
    if not (line := file.readline()):
        raise EOFError
    return line.rstrip("\n")


@contextlib.contextmanager
def _line_editing(history: Path):
    """Cursor keys and the lines of earlier sessions, where Python has readline and the folder can
    be written.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    if not os.access(history.parent, os.W_OK):
        yield
        return
    # a link may lead out of the run folder, which may be a stranger's: it is neither read nor
    # written
    if history.is_file() and not history.is_symlink():
        readline.read_history_file(history)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        # a new file in its place, and never through it
        with replacing(history) as new:
            readline.write_history_file(new)
