"""lib/interrupts.py: what the first and the second Ctrl-C do."""

import os
import signal
import subprocess
import threading
import time

import pytest

from lib.interrupts import interruptible
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


def test_sigterm_saves_then_exits(tmp_path):
    process = programs.start("save_when_stopped", tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "running\n"
    process.terminate()
    assert process.wait(30) == 0
    tree, meta = restore(tmp_path)
    assert tree["w"][0] == meta["step"] >= 3
