"""The programs of tests/programs, started as processes of their own with this checkout's `lib`."""

import json
import os
import subprocess
import sys

from tests.helpers import ROOT

PROGRAMS = ROOT / "tests" / "programs"


def command(name: str, *args) -> list[str]:
    """The words that start tests/programs/NAME.py."""
    return [sys.executable, str(PROGRAMS / f"{name}.py"), *map(str, args)]


def environment(devices: int = 1, **more) -> dict[str, str]:
    """This process's environment, with JAX on the CPU, as many virtual devices, and this checkout's
    `lib` first.
    """
    # behind the flags of all tests
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    return os.environ | ours | more


def start(
    name: str, *args, env: dict | None = None, devices: int = 1, **options
) -> subprocess.Popen:
    """The program begun; `options` are those of Popen."""
    env = environment(devices, **(env or {}))
    return subprocess.Popen(command(name, *args), env=env, text=True, **options)


def run(
    name: str, *args, env: dict | None = None, devices: int = 1, **options
) -> subprocess.CompletedProcess:
    """The program from start to end, its output kept."""
    env = environment(devices, **(env or {}))
    return subprocess.run(command(name, *args), env=env, capture_output=True, text=True, **options)


def run_scripts(*runs, **options) -> list[subprocess.CompletedProcess]:
    """How each of `runs` ends, (script, its arguments...), all in one process; `options` as for
    `run`.

    A process and its imports cost seconds. A name without .py is that of a module.
    """
    words = [[str(word) for word in run] for run in runs]
    done = run("run_scripts", json.dumps(words), **options)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout.rpartition("RESULT")[2])
    return [subprocess.CompletedProcess(*result) for result in zip(words, *zip(*results))]
