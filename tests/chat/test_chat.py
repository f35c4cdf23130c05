"""Reading answers piece by piece, fitting a chat into the context, and the terminal, plain and as a
real one.
"""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import jax
import pytest

from lib.chat import fit, messages, terminal
from lib.data.tokenizer import Tokenizer
from lib.files import UserError
from lib.generate import Engine, Sampling, Token
from lib.runs import load_model
from tests.helpers import parrot, programs

ROOT = Path(__file__).parents[2]


@cache
def model():
    return load_model(parrot.run())


def tokens(*ids):
    return [Token(i, -0.5) for i in ids]


# ---- any chat


def test_a_character_waits_for_its_last_token():
    tokenizer = model().tokenizer
    ids = [i for byte in "é🙂".encode() for i in [tokenizer.tokens.index(bytes([byte]))]]
    reader = messages.Reader(tokenizer)
    pieces = [reader.read(tokens(i)) for i in ids]
    assert [[p.text for p in ps] for ps in pieces] == [[], ["é"], [], [], [], ["🙂"]]
    assert [len(p.tokens) for ps in pieces for p in ps] == [2, 4], (
        "a piece comes with all tokens that it is made of"
    )
    assert reader.read(tokens(*ids[:1])) == [] and reader.parts == [
        {"type": "text", "text": "é🙂"}
    ], "half a character never shows"


def test_bytes_that_are_no_text_become_one_mark_and_what_follows_is_kept():
    tokenizer = model().tokenizer
    reader = messages.Reader(tokenizer)
    reader.read(tokens(*[tokenizer.tokens.index(bytes([b])) for b in b"a\xffb\xe2\x9cc"]))
    assert reader.parts[0]["text"] == "a\ufffdb\ufffdc"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_tool_calls_are_parts_of_their_own_however_the_tokens_arrive(size):
    tokenizer = model().tokenizer
    content = parrot.CHATS["What is 37 plus 85?"]
    # the first one gets no answer
    content = [*content, {"type": "python", "text": "1/0"}, {"type": "python", "text": "2"}]
    ids, mask = tokenizer.render_conversation(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    )
    begin = ids.index(tokenizer.special["<|assistant_start|>"]) + 1
    reader, seen = messages.Reader(tokenizer), {}
    for at in range(begin, len(ids), size):
        for piece in reader.read(tokens(*ids[at : at + size])):
            kind, text = seen.setdefault(piece.index, (piece.kind, ""))
            seen[piece.index] = kind, text + piece.text
    assert reader.parts == content
    assert [dict(type=kind, text=text) for _, (kind, text) in sorted(seen.items())] == content
    assert (
        messages.spoken(reader.parts) == "Let me see. 37 plus 85 is **122**."
        and messages.compact(reader.parts) == content
    )
    assert messages.compact([{"type": "text", "text": "just"}]) == "just"


def turns(n, words="word " * 10):
    return [{"role": ("user", "assistant")[i % 2], "content": f"{i} {words}"} for i in range(n)]


def test_a_chat_that_fits_is_left_alone():
    tokenizer, messages = model().tokenizer, turns(3)
    ids = tokenizer.render_for_completion(messages)
    assert fit(tokenizer, messages, len(ids) + 50, 50) == (ids, 0)
    # an answer's length claims no more than half of the context
    assert fit(tokenizer, messages, 2 * len(ids), 1000) == (ids, 0)


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_the_oldest_turns_go_first_and_as_few_as_possible(system):
    tokenizer, messages = model().tokenizer, system + turns(21)
    full = len(tokenizer.render_for_completion(messages))
    for context in range(200, full, 97):
        ids, dropped = fit(tokenizer, messages, context, 40)
        assert dropped % 2 == 0 and dropped > 0
        rest = system + messages[len(system) + dropped :]
        assert ids == tokenizer.render_for_completion(rest) and len(ids) <= context - 40
        more = system + messages[len(system) + dropped - 2 :]
        assert len(tokenizer.render_for_completion(more)) > context - 40, (
            "one turn fewer would have done"
        )


def test_a_long_last_message_takes_the_answers_room_and_then_is_refused():
    tokenizer = model().tokenizer
    messages = turns(2) + [{"role": "user", "content": "word " * 40}]
    alone = len(tokenizer.render_for_completion(messages[2:]))
    assert fit(tokenizer, messages, alone + 5, 1000) == (
        tokenizer.render_for_completion(messages[2:]),
        2,
    )
    with pytest.raises(UserError, match=f"{alone} tokens"):
        fit(tokenizer, messages, alone, 1000)


def test_leaving_an_answer_frees_the_slot_and_the_next_one_is_the_same():
    m = model()
    engine = Engine(m.params, m.config, 1, m.config.sequence_len, m.tokenizer)
    ids = m.tokenizer.render_for_completion(parrot.messages("hello")[:1])
    sampling = Sampling(200, temperature=0, stop=messages.ends(m.tokenizer))
    for piece in messages.reply(engine, ids, sampling, messages.Reader(m.tokenizer)):  # noqa: B007
        break
    assert engine.free == 1
    reader = messages.Reader(m.tokenizer)
    assert (
        "".join(p.text for p in messages.reply(engine, ids, sampling, reader))
        == parrot.CHATS["hello"]
    )
    assert reader.finish == "stop"


def test_what_is_read_as_one_message():
    def message(*lines):
        lines = list(lines)
        return terminal.read_message(lambda prompt: lines.pop(0)), lines

    assert message("one", "two") == ("one", ["two"])
    assert message("one\\", "two\\", "three", "four") == ("one\ntwo\nthree", ["four"])
    assert message('"""', "a\\", "", "/clear", ' """ ', "b") == ("a\\\n\n/clear", ["b"])


def test_lines_that_are_pasted_together_are_one_message():
    def message(*lines):
        lines = list(lines)
        return terminal.read_message(lambda prompt: lines.pop(0), lambda: bool(lines)), lines

    assert message("one", "", "two") == ("one\n\ntwo", [])
    assert message("one\\", "two") == ("one\ntwo", [])
    assert message("/clear", "two") == ("/clear", ["two"]), "a command is a line of its own"
    assert message("//etc", "two") == ("//etc\ntwo", [])
    assert message('"""', "a", '"""', "b") == ("a", ["b"])


def test_a_message_may_begin_with_a_slash(capsys):
    talk = terminal.Talk(model(), terminal.ChatSettings(temperature=0, max_tokens=3))
    lines = ["//etc/fstab", "/dance", "//", "/a\n/b"]

    def read(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    terminal.converse(talk, read)
    asked = [m["content"] for m in talk.messages if m["role"] == "user"]
    assert asked == ["/etc/fstab", "/", "/a\n/b"]
    assert "no command /dance" in capsys.readouterr().err


def test_a_chat_that_ends_with_a_question_goes_on(tmp_path, capsys):
    """As a saved one may, or one whose last question was interrupted."""
    talk = terminal.Talk(model(), terminal.ChatSettings(temperature=0, max_tokens=3))
    with pytest.raises(UserError, match="nothing to save"):
        talk.command(f"/save {tmp_path / 'empty.json'}")
    path = tmp_path / "open.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    talk.command(f"/load {path}")
    talk.ask("What is 37 plus 85?")
    assert [m["role"] for m in talk.messages] == ["user", "user", "assistant"]
    talk.command("/regen")
    talk.command(f"/save {path}")
    talk.command(f"/load {path}")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    talk.ask("and now?")

    # an answer that cannot be had again is not lost
    long = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "yes"}]
    talk.messages = list(long)
    with pytest.raises(UserError, match="shorten it"):
        talk.command("/regen")
    assert talk.messages == long


def test_a_base_model_is_greeted_as_one(capsys):
    for stage, chatty in (("sft", True), ("base", False)):
        talk = terminal.Talk(model()._replace(stage=stage), terminal.ChatSettings())
        talk.greet("mine")
        greeting = capsys.readouterr().err
        assert f"mine, {stage}, step" in greeting
        assert ("has not learnt to chat" in greeting) != chatty


def test_words_around_a_hidden_call_are_not_glued_and_offsets_point_into_what_was_said():
    tokenizer = model().tokenizer
    call = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    content = [{"type": "text", "text": "é r r y"}, *call, {"type": "text", "text": "The 東"}]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    ids = tokenizer.render_conversation(turns)[0][len(tokenizer.render_for_completion(turns)) :]
    for size in (1, 3, 99):
        reader, said, starts = messages.Reader(tokenizer), "", []
        for at in range(0, len(ids), size):
            for piece in reader.read(tokens(*ids[at : at + size])):
                said += piece.said
                # a hidden call is nowhere in it
                told = piece.tokens if piece.kind == "text" else []
                starts += zip(piece.offsets, told, strict=True)
        assert said == messages.spoken(reader.parts) == "é r r y\nThe 東"
        for offset, token in starts:
            text = tokenizer.tokens[token.id].decode(errors="ignore")
            assert said[offset:].startswith(text)


# ---- the terminal


def flags(*args):
    return ["--run", str(parrot.run()), "--temperature", "0", *args]


def command(*args, **kwargs):
    env = programs.environment(**kwargs.pop("env", {}))
    start = kwargs.pop("start", ["-m", "lib.chat"])
    return [sys.executable, *start, *flags(*args)], dict(cwd=ROOT, env=env, **kwargs)


def run(*args, **kwargs):
    args, kwargs = command(*args, **kwargs)
    return subprocess.run(args, capture_output=True, timeout=120, **dict(text=True) | kwargs)


@pytest.mark.slow
def test_a_single_prompt_prints_the_answer_and_nothing_else():
    done = run("--prompt", "-", input="What is 37 plus 85?\n".strip())
    assert (done.returncode, done.stdout) == (0, "Let me see. 37 plus 85 is **122**.\n")


@pytest.mark.slow
def test_bad_input_is_one_sentence():
    wrong = [("--prompt", "hello", "--top-p", "2"), ("--prompt", "word " * 2000)]
    share, long = programs.run_scripts(*(("lib.chat", *flags(*words)) for words in wrong), cwd=ROOT)
    assert (share.returncode, share.stdout) == (2, "")
    assert share.stderr.startswith("Error: top_p must be from 0 to 1")
    assert long.returncode == 2 and "context has 768" in long.stderr
    assert "Traceback" not in long.stderr

    # bytes that are no text are marked, not fatal
    done = run("--prompt", "-", input=b"\xff hello", text=False)
    assert done.returncode == 0 and done.stdout and b"Traceback" not in done.stderr


@pytest.mark.slow
def test_a_piped_conversation_with_every_command(tmp_path):
    file = tmp_path / "chat.json"
    lines = [
        "/help",
        "/regen",
        "What is 37 plus 85?",
        "/regen",
        f"/save {file}",
        "/clear",
        "hello",
        f"/load {file}",
        "/load nowhere.json",
        "/save",
        f"/save {tmp_path}",
        "/set top_k 3",
        "/set top_k many",
        "/set temperature -1",
        "/set colour 1",
        "/set =",
        "/dance",
        '"""',
        "Show me some",
        '"""',
        "/quit",
        "hello",
    ]
    done = run(input="\n".join(lines))
    sum_ = "Let me see. [37+85 = 122] 37 plus 85 is **122**.\n"
    assert (
        done.stdout.startswith(sum_ + sum_ + "Hello! How can I help?\n")
        and done.stdout.count("Hello!") == 1
    )
    assert done.returncode == 0 and "\033" not in done.stdout + done.stderr
    assert json.loads(file.read_text()) == {"messages": parrot.messages("What is 37 plus 85?")}
    for said in (
        "Ctrl-C stops",
        "no message to answer",
        "saved 2",
        "(forgotten)",
        "took up 2",
        "nowhere.json cannot be read",
        "needs the name of a file",
        "top_k 3 ",
        f"cannot write {tmp_path}: a folder stands there",
        "top_k is an integer, not 'many'",
        "temperature must be",
        "no setting 'colour'",
        "no command /dance",
    ):
        assert said in done.stderr, said


class Terminal:
    """The program in a pseudo-terminal, as a person sees it."""

    def __init__(self, *args, **env):
        self.fd, inside = pty.openpty()
        args, kwargs = command(
            *args,
            start=[programs.PROGRAMS / "chat_slowly.py"],
            env={"TERM": "xterm", "NO_COLOR": "", **env},
        )
        self.process = subprocess.Popen(
            args, stdin=inside, stdout=inside, stderr=inside, start_new_session=True, **kwargs
        )
        os.close(inside)
        self.text = ""

    def until(self, wanted, timeout=120):
        """All that was shown since the last call, up to `wanted`, which is waited for."""
        ends = time.monotonic() + timeout
        while wanted not in self.text:
            ready, _, _ = select.select([self.fd], [], [], max(0, ends - time.monotonic()))
            assert ready, f"no {wanted!r} in {self.text!r}"
            # OSError if the program has left
            self.text += os.read(self.fd, 65536).decode("utf-8", "replace")
        end = self.text.index(wanted) + len(wanted)
        text, self.text = self.text[:end], self.text[end:]
        return text

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)

    def wait(self):
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self.fd)


@pytest.mark.slow
def test_a_real_terminal_has_colours_and_ctrl_c_stops_the_answer_only():
    terminal = Terminal()
    begin = terminal.until("> \033[0m")
    assert "context 768 tokens" in begin and "\033[2m" in begin
    terminal.type("What is 37 plus 85?\n")
    shown = terminal.until("> \033[0m")
    assert "\033[2;33m[37+85 = 122]\033[0m" in shown
    terminal.type("/clear\n")
    terminal.until("> \033[0m")
    terminal.type("Count to 120.\n")
    terminal.until("3 4")
    terminal.interrupt()
    shown = terminal.until("> \033[0m")
    assert "(stopped)" in shown and "120" not in shown
    # at the prompt it only says how to leave, however soon after the prompt it comes
    for _ in range(40):
        terminal.interrupt()
        terminal.until("/quit leaves")
        terminal.until("> \033[0m")
    terminal.type("/clear\n")
    terminal.until("(forgotten)")
    terminal.until("> \033[0m")  # before, the terminal takes Ctrl-D for itself
    terminal.type("\x04")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_pasted_lines_are_one_message_in_a_real_terminal(tmp_path):
    """And NO_COLOR is respected."""
    terminal = Terminal("--max-tokens", "2", NO_COLOR="1")
    shown = terminal.until("> ")
    # with the marks that a terminal sets around what is pasted, and without
    for before, after in (("", ""), ("\033[200~", "\033[201~")):
        terminal.type(f"{before}one\ntwo\nthree{after}")
        time.sleep(0.5)
        terminal.type("\n")
        shown += terminal.until("(cut after 2 tokens)")
        terminal.until("> ")
        file = tmp_path / f"{len(before)}.json"
        terminal.type(f"/save {file}\n")
        terminal.until("(saved 2 messages")
        terminal.until("> ")
        saved = json.loads(file.read_text())["messages"]
        assert saved[0] == {"role": "user", "content": "one\ntwo\nthree"}
        terminal.type("/clear\n")
        terminal.until("(forgotten)")
        terminal.until("> ")
    terminal.type("/quit\n")
    assert terminal.wait() == 0
    assert not re.search(r"\033\[[0-9;]*m", shown)


def test_escape_sequences_of_the_model_do_not_reach_the_terminal(capsys):
    talk = terminal.Talk(model(), terminal.ChatSettings(temperature=0))
    talk._show(messages.Delta(0, "text", "a\x1b]0;title\x07b\x9b31m\tc\n", []), None)
    assert capsys.readouterr().out == "a]0;titleb31m\tc\n"


def test_an_answer_that_is_interrupted_at_once_is_kept_and_the_talk_goes_on(monkeypatch, capsys):
    talk, step = terminal.Talk(model(), terminal.ChatSettings(temperature=0)), Engine.step
    made = []

    def interrupted(engine):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(1)
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Count to 120.")
    monkeypatch.undo()
    assert (
        talk.messages[-1]["role"] == "assistant"
        and parrot.COUNT.startswith(talk.messages[-1]["content"])
        and talk.engine.free
    )
    talk.ask("hello")
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_int8_weights_say_the_same(capsys):
    talk = terminal.Talk(model(), terminal.ChatSettings(temperature=0, int8=True))
    # in the form for a CPU, where a compiler built it, or in XLA's
    assert any(a.dtype == "int8" for a in jax.tree.leaves(talk.engine.params[0]["head"]))
    talk.ask("hello")
    assert capsys.readouterr().out == parrot.CHATS["hello"] + "\n"


def test_speculation_says_the_same(capsys):
    talk = terminal.Talk(model(), terminal.ChatSettings(temperature=0, speculate=3))
    talk.ask("hello")
    assert capsys.readouterr().out == parrot.CHATS["hello"] + "\n" and talk.engine.drafted


def test_a_base_model_goes_on_with_the_text(capsys):
    talk = terminal.Talk(
        model()._replace(stage="base"), terminal.ChatSettings(temperature=0, max_tokens=5)
    )
    talk.ask("hello")
    talk.messages.append({"role": "user", "content": "there"})
    assert talk.prompt() == model().tokenizer.encode("there", bos=True), (
        "only the last text, and nothing of a chat around it"
    )
    talk.messages.append({"role": "user", "content": "word " * 2000})
    with pytest.raises(UserError, match="shorten it"):
        talk.prompt()


def test_a_conversation_longer_than_the_context_goes_on_and_says_so(capsys):
    talk = terminal.Talk(model(), terminal.ChatSettings(temperature=0, max_tokens=30))
    talk.messages = turns(41)[:40]
    talk.ask("hello")
    assert (
        re.search(r"oldest \d+ messages don't fit", capsys.readouterr().err)
        and len(talk.messages) == 42
    )


def test_tokenizer_specials_are_all_accounted_for():
    tokenizer: Tokenizer = model().tokenizer
    inside = {tokenizer.special[name] for name in messages.KINDS}
    assert inside | set(messages.ends(tokenizer)) == set(
        tokenizer.special.values()
    ) and not inside & set(messages.ends(tokenizer))
