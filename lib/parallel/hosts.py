"""Processes that find each other, agree, and stop together.

What they say to each other beside the arrays goes through the key-value store that process 0 keeps
for all (jax gives it no public name yet).
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from lib.files import UserError, first_line

# keys of the store: why a process failed, and after which step all stop
FAILED, STOP = "rawchat/failed", "rawchat/stop"

# seconds to wait for the others' words: one may be downloading
PATIENCE = 3600

# seconds that process 0 outlives a failure: others ask once a second, and the store goes with it
LAST_WORDS = 3

_failing = threading.Event()
_rounds: dict[str, int] = {}  # how often something was said under a name


# ---- meeting -----------------------------------------------------------------------------------


def start_hosts(coordinator: str = "", count: int = 0, index: int = -1, timeout: float = 300):
    """Join all processes of a job into one JAX program; call before anything uses JAX's devices.

    Without arguments the cluster says who is who, as a TPU pod slice, Slurm or MPI do. Else:
    coordinator is "host:port" of process 0, reachable from all, count the number of processes and
    index this one's, from 0. A process that does not come within `timeout` seconds is named in the
    UserError that all others get; JAX itself would abort them.
    """
    # process 0 may have an upload to finish
    patience: dict[str, Any] = dict(
        initialization_timeout=int(timeout), shutdown_timeout_seconds=PATIENCE
    )
    if not coordinator:
        try:
            jax.distributed.initialize(**patience)
        except (ValueError, RuntimeError) as e:
            raise UserError(
                f"cannot find the other hosts by myself ({first_line(e)}): name the coordinator as "
                "host:port, the number of processes and this one's index"
            ) from e
        _watch()
        return

    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or count < 1 or not 0 <= index < count:
        raise UserError(
            f"coordinator {coordinator!r}, process {index} of {count}: give process 0's host:port, "
            "and an index from 0 below the number of processes"
        )
    _roll_call((host, int(port)), count, index, timeout)
    jax.distributed.initialize(coordinator, count, index, **patience)
    _watch()


def _roll_call(address, count: int, index: int, timeout: float):
    """Return when all processes are there; UserError names the ones that are not."""
    deadline = time.monotonic() + timeout
    if index:
        answer = _report(address, count, index, deadline)
    else:
        answer = _count_heads(address, count, deadline)
    if answer != "go":
        answer = answer or "process 0 stopped while waiting for the others"
        raise UserError(
            f"{answer} within {timeout:.0f} s "
            f"at {address[0]}:{address[1]}: start all processes, each with its index, and check "
            "that they reach process 0"
        )


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.01)


def _report(address, count: int, index: int, deadline: float) -> str:
    """Tell process 0 that this one is there, and return its answer once all are, or time is up."""
    while True:
        try:
            with socket.create_connection(address, timeout=_left(deadline)) as connection:
                connection.sendall(b"%d\n" % index)
                # process 0 knows better who is missing
                connection.settimeout(_left(deadline) + 5)
                return connection.makefile().readline().strip()
        except OSError as e:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"process 0 of {count} never answered at {address[0]}:{address[1]} "
                    f"({first_line(e)}): start it, and check address and firewall"
                ) from e
            time.sleep(0.1)


def _count_heads(address, count: int, deadline: float) -> str:
    """Wait for all others and tell each "go", or after the deadline who is missing."""
    try:
        server = socket.create_server(("", address[1]))
    except OSError as e:
        raise UserError(
            f"process 0 cannot listen at {address[0]}:{address[1]} ({first_line(e)}): "
            "take another port"
        ) from e

    joined = {}
    with server, contextlib.ExitStack() as stack:
        while len(joined) < count - 1 and time.monotonic() < deadline:
            server.settimeout(_left(deadline))
            # time is up, or a stranger at the port
            with contextlib.suppress(OSError, ValueError):
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(min(_left(deadline), 5))
                index = int(peer.makefile().readline(16))
                if 0 < index < count:
                    joined[index] = peer

        missing = ", ".join(str(i) for i in range(1, count) if i not in joined)
        answer = f"process {missing} of {count} never joined" if missing else "go"
        for peer in joined.values():
            with contextlib.suppress(OSError):  # it has gone by itself
                peer.sendall(f"{answer}\n".encode())
                # it closes first, which leaves the port free for JAX
                peer.recv(1)
    return answer


# ---- agreeing ------------------------------------------------------------------------------------


def _store() -> Any:
    """The key-value store of a job of several processes, or None."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        # jax has no public name for it
        internals = jax._src  # pyright: ignore[reportAttributeAccessIssue]
        return internals.distributed.global_state.client
    return None


def from_each(name: str, value) -> list:
    """The JSON-able values that all processes give under `name`, in their order; waits for all."""
    store = _store()
    if store is None:
        return [value]
    _rounds[name] = _rounds.get(name, -1) + 1
    key = f"rawchat/{name}/{_rounds[name]}"
    store.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [
        json.loads(store.blocking_key_value_get(f"{key}/{i}", PATIENCE * 1000))
        for i in range(jax.process_count())
    ]


def from_first(name: str, make):
    """make() of process 0, JSON-able, which alone calls it; waits for it."""
    return from_each(name, None if jax.process_index() else make())[0]


def check_same(what: str, value: dict):
    """UserError on all processes if one has other entries in `value`, such as from other flags.

    They would wait for each other for ever.
    """
    values = from_each(what, value)
    first = values[0]
    for i, other in enumerate(values):
        for name in other:
            if first.get(name) != other[name]:
                raise UserError(
                    f"process {i} has other {what} than process 0 ({name}: {other[name]!r}, not "
                    f"{first.get(name)!r}): give all processes the same"
                )


# ---- stopping ------------------------------------------------------------------------------------


def stopping_together() -> Callable[[int, bool], bool]:
    """A function (step, wanted) for one training: whether all processes stop after that step.

    They stop two steps after the first where one wanted to. All must ask, step by step. None is
    further ahead: it asks about a step once it has read the numbers of the one before, for which
    all must have started that. Each training has a key of its own, so that a wish is never met
    again by the next one of the same processes, which begin them in the same order.
    """
    _rounds[STOP] = _rounds.get(STOP, -1) + 1
    folder = f"{STOP}/{_rounds[STOP]}"

    def ask(step: int, wanted: bool) -> bool:
        store = _store()
        if store is None:
            return wanted
        if wanted:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
                store.key_value_set(f"{folder}/at", str(step + 2))
        return any(step >= int(at) for _, at in store.key_value_dir_get(folder))

    return ask


def end_all(error):
    """End this process of several because of `error`, and with it the others.

    They would wait for it in a collective for ever. Does nothing where there is one process.
    """
    store = _store()
    if store is None:
        return
    _failing.set()
    why = f"process {jax.process_index()} stopped: {first_line(error)}"
    # another failed first, or process 0 is gone
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store.key_value_set(FAILED + "/why", why)
    _exit(getattr(error, "code", 2))


def _exit(code: int = 2):
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(LAST_WORDS)
    os._exit(code)  # an orderly exit waits for the others


def _watch():
    """Look, in the background, whether another process has left, and follow it."""
    done = threading.Event()

    def look():
        while not done.wait(1.0):
            try:
                why = _store().key_value_dir_get(FAILED)
            # the job is over, or process 0 died: JAX ends us then
            except (jax.errors.JaxRuntimeError, AttributeError):
                return
            if why and not _failing.is_set():
                print(f"Error: {why[0][1]}", file=sys.stderr)
                _exit()

    watcher = threading.Thread(target=look, daemon=True)
    if _store() is not None:
        watcher.start()
        atexit.register(lambda: (done.set(), watcher.join()))
