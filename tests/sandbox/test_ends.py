"""How a program's end is handed on and put into words."""

import os
import signal
from types import SimpleNamespace

import pytest

from lib.sandbox import jail, programs


@pytest.mark.parametrize("status, code", [(0, 0), (3 << 8, 3), (signal.SIGKILL, 128 + 9)])
def test_a_parent_ends_as_its_child_did(monkeypatch, status, code):
    ends = []
    child = SimpleNamespace(
        waitpid=lambda pid, flags: (pid, status),
        waitstatus_to_exitcode=os.waitstatus_to_exitcode,
        _exit=ends.append,
    )
    monkeypatch.setattr(jail, "os", child)
    jail.wait_for(7)
    assert ends == [code]


@pytest.mark.parametrize("status", [-signal.SIGABRT, 128 + signal.SIGABRT])
def test_a_signal_has_its_name_whoever_tells_of_it(status):
    limits = programs.Limits(timeout=1.0, memory=1, output=1)
    assert programs._reason({}, "", status, limits) == "it was killed by SIGABRT"
