"""Ctrl-C: the first one asks to finish what was begun, the second insists."""

import contextlib
import signal
import threading
import types


@contextlib.contextmanager
def interruptible(promise: str = "finishing this step and saving"):
    """Yield a flag whose `.stop` becomes True at the first SIGTERM or Ctrl-C, so that a loop can
    save and leave.

    promise: what the printed line says is happening then. A second signal raises KeyboardInterrupt
    at once. The handlers that were there are put back at the end. Outside the main thread, where
    Python gives nobody signals, the flag just stays False.
    """
    flag = types.SimpleNamespace(stop=False)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handler(signum, frame):
        if flag.stop:
            raise KeyboardInterrupt
        flag.stop = True
        # the signal may have come in the middle of another print, which refuses a second one
        with contextlib.suppress(RuntimeError):
            name = signal.Signals(signum).name
            print(f"\n{name}: {promise}; once more to stop at once")

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for signum, previous in before.items():
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)
