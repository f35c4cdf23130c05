"""Talking in a terminal: `python -m lib.chat`."""

import contextlib
import dataclasses
import os
import re
import secrets
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.chat.messages import Delta, Reader, compact, ends, fit, reply
from lib.chat.settings import Which, Writing
from lib.data.roles import in_turns
from lib.data.tokenizer import Tokenizer
from lib.files import UserError, first_line, local_path, read_json, replacing, write_json
from lib.generate import Engine, Sampling
from lib.generate.kept import keep_programs
from lib.interrupts import heard, interruptible
from lib.runs import Model

HELP = """/clear        forget the conversation
/regen        another answer to your last message
/save FILE    write the conversation as JSON
/load FILE    take up a saved conversation
/set          show the sampling settings; /set temperature 0.5 changes one
/help         this text
/quit         leave (or Ctrl-D)
//text        a message that begins with a slash
Lines that are pasted together are one message. A line that ends in \\ goes on in the next one; a
line of three quotes (\"\"\") begins a text of many lines and another ends it.
Ctrl-C stops an answer."""
NOT_CHATTY = (
    "This model was only pretrained and has not learnt to chat: it goes on with the text that you "
    "write."
)

# a model may write escape sequences; a terminal must not obey them
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COLOURS = {
    "you": "\033[1;36m",
    "tool": "\033[2;33m",
    "note": "\033[2m",
    "bad": "\033[31m",
    "end": "\033[0m",
}
PLAIN = dict.fromkeys(COLOURS, "")

# seconds in which the next line of a pasted text is there: a hand is slower
PASTED = 0.03


# ---- settings ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saying:
    """What is said to it."""

    prompt: str = ""
    """answer this one message, print nothing but the answer and leave; - reads it from standard
    input"""
    system: str = ""
    """a system message, put before the conversation"""


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen."""

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


@dataclass(frozen=True)
class ChatSettings(Which, Writing, Saying, Choosing):
    """Talk to a trained model in the terminal; /help there tells the commands."""


# what /set changes
TUNABLE = tuple(field.name for field in dataclasses.fields(Choosing) if field.name != "seed")


# ---- the conversation ----------------------------------------------------------------------------


class Talk:
    """One conversation with a model: what was said, the settings, and where the answers go.

    tools: whether calls are shown. programs: where those of decoding are kept for the next time.
    """

    def __init__(
        self,
        model: Model,
        settings: ChatSettings,
        colours: dict = PLAIN,
        tools: bool = True,
        programs: Path | None = None,
    ):
        from lib.sandbox import calculator

        self.model = model
        self.settings = settings
        self.colours = colours
        self.tools = tools
        self.context = model.config.sequence_len
        # one conversation needs one slot
        self.engine = Engine(
            settings.weights(model),
            model.config,
            1,
            self.context,
            model.tokenizer,
            calculator,
            settings.speculate,
        )
        keep_programs(self.engine, programs)
        self.seed = secrets.randbits(31) if settings.seed is None else settings.seed
        # bad settings are told now
        self.sampling()
        self.clear()

    def clear(self):
        """Begin anew, with nothing but the system's message."""
        self.messages: list[dict] = []
        if self.settings.system:
            self.messages.append({"role": "system", "content": self.settings.system})

    def sampling(self, **changes) -> Sampling:
        """How the next answer is sampled; UserError if that makes no sense."""
        chosen = {name: getattr(self.settings, name) for name in TUNABLE}
        return Sampling(**chosen | changes, seed=self.seed, stop=ends(self.model.tokenizer))

    def note(self, text: str, colour: str = "note"):
        """Say something that is not the model's."""
        print(f"{self.colours[colour]}{text}{self.colours['end']}", file=sys.stderr, flush=True)

    def greet(self, name: str):
        """Say who is there: the run's name, and what may be expected of it."""
        about = f"{name}, {self.model.stage}, step {self.model.meta['step']}"
        self.note(f"{about}, context {self.context} tokens. /help tells the commands.")
        if self.model.stage == "base":
            self.note(NOT_CHATTY)

    # ---- answers

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
        """The ids that ask for an answer to the last message."""
        tokenizer = self.model.tokenizer
        # one that has never seen a chat goes on where the text ends
        if self.model.stage == "base":
            ids = tokenizer.encode(self.messages[-1]["content"], bos=True)
            if len(ids) >= self.context:
                raise UserError(
                    f"this makes {len(ids)} tokens and the model's context has {self.context}: "
                    "shorten it"
                )
            return ids

        # two messages without an answer between them are one, as where a saved chat ended with one
        chat = in_turns(self.messages)
        # a chat that has grown too long loses its oldest turns
        ids, dropped = fit(tokenizer, chat, self.context, self.settings.max_tokens)
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
        # as much as was asked for, or as there is room for
        most = min(self.settings.max_tokens, self.context - len(ids))
        sampling = self.sampling(max_tokens=most)
        self.seed += 1
        try:
            stopped = self._write(ids, sampling, reader)
        except KeyboardInterrupt:
            # the next message must find an answer before it
            self._remember(reader)
            raise
        self._remember(reader)
        # why it is no longer, where it did not end by itself
        if stopped:
            self.note("(stopped)")
        elif reader.finish == "length":
            self.note(f"(cut after {sampling.max_tokens} tokens)")

    def _remember(self, reader: Reader):
        """Add what was written to the conversation."""
        self.messages.append({"role": "assistant", "content": compact(reader.parts)})

    def _write(self, ids: list[int], sampling: Sampling, reader: Reader) -> bool:
        """Print an answer as it is written; whether Ctrl-C stopped it."""
        last = None
        stopped = False
        pieces = reply(self.engine, ids, sampling, reader)
        # so that an answer ends between two tokens
        ctrl_c = interruptible("", signals=[signal.SIGINT])
        with ctrl_c as flag, contextlib.closing(pieces):
            for piece in pieces:
                last = self._show(piece, last)
                stopped = flag.stop
                if stopped:
                    break
        print(self._close(last), flush=True)
        return stopped

    def _show(self, piece: Delta, last: Delta | None) -> Delta:
        """Print a piece, tool calls in brackets and their own colour; `last` is the piece before
        it.
        """
        if piece.kind != "text" and not self.tools:
            return piece
        # what stands around a call
        begins = last is None or last.index != piece.index
        if begins and piece.kind != "python_output":
            print(self._close(last), end="")
        if begins:
            opening = {"python": self.colours["tool"] + "[", "python_output": " = "}
            print(opening.get(piece.kind, ""), end="")
        # calls that are shown stand between the words themselves
        text = piece.text if self.tools else piece.said
        print(UNPRINTABLE.sub("", text), end="", flush=True)
        return piece

    def _close(self, last: Delta | None) -> str:
        """What ends a tool call that was shown."""
        if not self.tools or last is None or last.kind == "text":
            return ""
        return f"]{self.colours['end']} "

    # ---- commands

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; False when it asks to leave. Raises UserError."""
        # the first word, and what it is about
        name, _, rest = line[1:].strip().partition(" ")
        if name in ("quit", "exit", "q"):
            return False
        commands = {
            "help": lambda rest: self.note(HELP),
            "clear": lambda rest: self.forget(),
            "regen": lambda rest: self.regenerate(),
            "save": self.save,
            "load": self.load,
            "set": self.set,
        }
        if name not in commands:
            raise UserError(f"there is no command /{name}: /help lists them")
        commands[name](rest.strip())
        return True

    def forget(self):
        """/clear"""
        self.clear()
        self.note("(forgotten)")

    def regenerate(self):
        """/regen: another answer to the last message."""
        if not self.messages or self.messages[-1]["role"] == "system":
            raise UserError("there is no message to answer yet: write one")
        before = list(self.messages)
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        try:
            self.answer()
        except UserError:
            self.messages = before
            raise

    def save(self, path: str):
        """/save: write the conversation into a file."""
        if not path:
            raise UserError("/save needs the name of a file to write, such as /save chat.json")
        if not any(message["role"] == "user" for message in self.messages):
            raise UserError("nothing was said yet, so there is nothing to save")
        try:
            write_json(local_path(path), {"messages": self.messages})
        except (OSError, ValueError) as e:
            # a folder, a name that is too long, text that is not Unicode
            why = type(e).__name__
            raise UserError(f"cannot save to {path} ({why}): name another file") from None
        self.note(f"(saved {len(self.messages)} messages to {path})")

    def load(self, path: str):
        """/load: take up the conversation of a file."""
        self.messages = _load(path, self.model.tokenizer)
        self.note(f"(took up {len(self.messages)} messages from {path})")

    def set(self, text: str):
        """/set: show the sampling settings, or change one."""
        name, _, value = text.replace("=", " ").strip().partition(" ")
        if name:
            self._change(name, value.strip())
        self.note("  ".join(f"{name} {getattr(self.settings, name)}" for name in TUNABLE))

    def _change(self, name: str, value: str):
        """Change one sampling setting; UserError leaves it as it was."""
        if name not in TUNABLE:
            raise UserError(f"there is no setting {name!r}: choose one of {', '.join(TUNABLE)}")
        # tried on the settings themselves, and taken back if they make no sense
        before = self.settings
        kind = type(getattr(before, name))
        try:
            self.settings = dataclasses.replace(before, **{name: kind(value)})
            self.sampling()
        except ValueError:
            due = "an integer" if kind is int else "a number"
            raise UserError(f"{name} is {due}, not {value!r}") from None
        except UserError:
            self.settings = before
            raise


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


# ---- reading -------------------------------------------------------------------------------------


# gives a line behind a prompt; EOFError at the end
Read = Callable[[str], str]


def read_message(read: Read, more: Callable[[], bool] = lambda: False) -> str:
    """One message of the user from `read(prompt)`, which gives a line: joins continued lines,
    quoted blocks and pasted lines.

    more(): whether another line is there already, as behind the first line of a pasted text.
    """
    # a block begins with a line of its own
    line = read("> ")
    if line.strip() == '"""':
        return _block(read)
    # a line goes on in the next, or the next is there already
    lines = [line]
    while True:
        if lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
        elif is_command(lines[0]) or not more():
            return "\n".join(lines)
        lines.append(read("… "))


def _block(read: Read) -> str:
    """The lines up to one of three quotes."""
    lines = []
    while (line := read("… ")).strip() != '"""':
        lines.append(line)
    return "\n".join(lines)


def is_command(text: str) -> bool:
    """Whether a message is for this program; two slashes begin one for the model."""
    return text.startswith("/") and not text.startswith("//") and "\n" not in text


def more_is_typed() -> bool:
    """Whether the terminal holds another line that nobody can have typed by hand so fast."""
    return bool(select.select([sys.stdin], [], [], PASTED)[0])


def converse(talk: Talk, read: Read, more: Callable[[], bool] = lambda: False):
    """Read, answer, repeat, until the input ends or /quit.

    An error is one line, and the conversation goes on.
    """
    while True:
        # what the person says
        try:
            text = read_message(read, more)
        except EOFError:
            return
        except KeyboardInterrupt:
            talk.note("\n(Ctrl-D or /quit leaves)")
            continue

        # what comes of it
        try:
            if is_command(text):
                if not talk.command(text):
                    return
            elif text.strip():
                talk.ask(text[1:] if text.startswith("//") else text)
        except UserError as e:
            talk.note(f"Error: {e}", "bad")
        except KeyboardInterrupt:
            talk.note("\n(interrupted)")


# ---- the program ---------------------------------------------------------------------------------


def main(settings: ChatSettings, coloured: bool, programs: Path | None = None):
    """Load the model and talk on standard input and output; `coloured`: the user wants colours
    where a terminal is. programs: as of `Talk`.
    """
    # what is not text becomes U+FFFD; a TextIOWrapper, though its type is that of any text stream
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    # one message and no conversation
    single = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    if settings.prompt and not single.strip():
        raise UserError(
            "the prompt is empty: write a message after --prompt, or - and the message on "
            "standard input"
        )

    # no colours in a file
    colours = PLAIN
    if coloured and sys.stdout.isatty() and sys.stderr.isatty():
        colours = COLOURS
    talk = Talk(settings.load(), settings, colours, tools=not single, programs=programs)
    if single:
        talk.ask(single)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        _in_a_terminal(talk, settings.folder())
    else:
        converse(talk, lambda prompt: _line(sys.stdin))


def _in_a_terminal(talk: Talk, folder: Path):
    """Talk with a person, whose lines are kept in the run folder."""
    talk.greet(folder.name)
    you, end = talk.colours["you"], talk.colours["end"]

    def read(prompt: str) -> str:
        # \x01 and \x02 tell readline that what is between them takes no room
        return input(f"\x01{you}\x02{prompt}\x01{end}\x02" if you else prompt)

    with _line_editing(folder / ".chat_history"), heard():
        converse(talk, read, more_is_typed)


def _line(file) -> str:
    """The next line of a file; EOFError behind the last."""
    line = file.readline()
    if not line:
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
