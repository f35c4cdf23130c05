"""lib/interrupts.py: what the first and the second Ctrl-C do."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lib import interrupts
from lib.interrupts import heard, interruptible
from lib.train.checkpoint import restore
from tests.helpers import programs


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_asks_second_stops_and_handlers_come_back(sig, capsys):
    before = signal.getsignal(sig)
    with interruptible() as flag:
        assert not flag.stop
        os.kill(os.getpid(), sig)
        time.sleep(0.01)
        assert flag.stop and "once more" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), sig)
            time.sleep(1)
    assert signal.getsignal(sig) is before


def test_no_handlers_outside_the_main_thread():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with interruptible() as flag:
            seen.append((flag.stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_only_the_signals_that_are_named_and_in_silence(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with interruptible("", signals=[signal.SIGINT]) as flag:
        assert signal.getsignal(signal.SIGTERM) is before
        signal.raise_signal(signal.SIGINT)
        assert flag.stop
    assert capsys.readouterr().out == ""


def wait_for_a_key(pressed_after: float, key_after: float) -> float:
    """Read from a pipe until Ctrl-C, which the system gives to another thread; the seconds till it
    is heard. A key comes later.
    """
    reader, writer = os.pipe()
    over = threading.Event()

    def press():
        time.sleep(pressed_after)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        over.wait(key_after)
        os.write(writer, b"x")

    thread = threading.Thread(target=press)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        os.read(reader, 1)
        time.sleep(1)
    seconds = time.monotonic() - began
    over.set()
    thread.join()
    os.close(reader)
    os.close(writer)
    return seconds


def test_ctrl_c_is_heard_by_who_waits_for_a_key():
    before = signal.getsignal(signal.SIGURG)
    with heard():
        assert wait_for_a_key(0.05, 2) < 1.5
    assert signal.getsignal(signal.SIGURG) is before
    assert "nudge" not in {thread.name for thread in threading.enumerate()}
    # and this is what it is for
    assert wait_for_a_key(0.05, 0.4) > 0.4


def test_who_pressed_many_times_need_not_wait_at_the_end():
    with heard():
        for _ in range(20):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
                time.sleep(1)
        began = time.monotonic()
    # each is answered by nudges over more than a second, and not one after the other
    assert time.monotonic() - began < 1


@pytest.mark.slow
def test_sigterm_saves_then_exits(tmp_path):
    process = programs.start("save_when_stopped", tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "running\n"
    process.terminate()
    assert process.wait(30) == 0
    tree, meta = restore(tmp_path)
    assert tree["w"][0] == meta["step"] >= 3


@pytest.mark.slow
def test_while_a_program_starts_ctrl_c_ends_it_whatever_catches_exceptions():
    done = programs.run("hear_ctrl_c", "starting")
    assert (done.returncode, done.stderr.strip()) == (130, interrupts.STOPPED)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lost", "slowly"])
def test_a_ctrl_c_that_a_callback_loses_is_given_once_more(how):
    """Once the callback is over: where a thread is slow to start, it would be lost again."""
    began = time.monotonic()
    done = programs.run("hear_ctrl_c", how)
    assert (done.returncode, done.stderr) == (7, "")
    # it ends a wait of 20 seconds, and not first what follows
    assert time.monotonic() - began < 15


def test_what_a_package_makes_of_ctrl_c_still_comes_of_it():
    error = ImportError("it could not be initialised")
    assert not interrupts.caused(error)
    error.__cause__ = KeyboardInterrupt()
    assert interrupts.caused(error)


@pytest.mark.slow
def test_a_stopped_program_finishes_uploads_and_exit_handlers_and_is_not_torn_down():
    """Threads of jax that still compute must not find Python gone."""
    done = programs.run("hear_ctrl_c", "ended")
    assert (done.returncode, done.stderr) == (130, "uploaded tidied ")


@pytest.mark.parametrize(
    "command", ["-m lib.preflight", "-m lib.chat", "-m lib.report", "02_train.py"]
)
def test_who_stops_reading_gets_no_traceback(command):
    """As behind `| head`; nothing is read at all here, so that it is never too late."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, *command.split(), "--help"]
    with open(writer, "wb") as nobody:
        done = subprocess.run(arguments, stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert (done.stderr, done.returncode) == ("", interrupts.UNREAD)


def test_a_broken_pipe_that_is_not_the_output_is_an_error():
    broken = "import lib; raise BrokenPipeError('of a socket')"
    # lib takes only its own programs, such as this one, for its own
    program = f"import sys; sys.argv[0] = '-m'; {broken}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("BrokenPipeError: of a socket\n")
