"""lib/interrupts.py: what the first and the second Ctrl-C do."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lib.interrupts import interruptible
from lib.train.checkpoint import restore

ROOT = Path(__file__).parents[1]


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
    code = """
import sys, time, numpy as np
from lib.interrupts import interruptible
from lib.train.checkpoint import Saver
with interruptible() as flag, Saver(sys.argv[1]) as saver:
    for step in range(1, 10**6):
        if step == 3: print("running", flush=True)
        time.sleep(0.005)
        if flag.stop:
            saver.save(step, {"w": np.full(3, step)})
            break
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    process.terminate()
    assert process.wait(30) == 0
    tree, meta = restore(tmp_path)
    assert tree["w"][0] == meta["step"] >= 3
