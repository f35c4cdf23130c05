"""Ctrl-C: the first one asks to finish what was begun, the second insists; and none is lost."""

import contextlib
import os
import signal
import threading
import time
import types

# when the main thread is woken after a signal, in seconds from one time to the next
NUDGES = (0.02, 0.1, 0.3, 1.0)


@contextlib.contextmanager
def interruptible(
    promise: str = "finishing this step and saving", signals=(signal.SIGINT, signal.SIGTERM)
):
    """Yield a flag whose `.stop` becomes True at the first of `signals` (Ctrl-C is SIGINT), so that
    a loop can save and leave.

    promise: what the printed line says is happening then; nothing is printed if it is empty. A
    second signal raises KeyboardInterrupt at once. The handlers that were there are put back at the
    end. Outside the main thread, where Python gives nobody signals, the flag just stays False.
    """
    flag = types.SimpleNamespace(stop=False)
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def handler(signum, frame):
        if flag.stop:
            raise KeyboardInterrupt
        flag.stop = True
        if not promise:
            return
        # the signal may have come in the middle of another print, which refuses a second one
        with contextlib.suppress(RuntimeError):
            name = signal.Signals(signum).name
            print(f"\n{name}: {promise}; once more to stop at once")

    before = {s: signal.signal(s, handler) for s in signals}
    try:
        yield flag
    finally:
        for signum, previous in before.items():
            signal.signal(signum, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def heard():
    """Within it a signal that comes while the main thread begins to wait for a key is not lost.

    Python's handlers run in the main thread, once that has left its wait. A signal that arrives
    just before the wait, or that the system gives to another thread, does not end it: Ctrl-C would
    do nothing until the next key. So a thread that reads the signals from a pipe wakes the main
    thread, by a signal that means nothing (SIGURG).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main = threading.get_ident()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def nudge():
        # the end of the pipe ends the thread
        while number := os.read(reader, 1):
            # its own nudges come by the pipe as well
            if number[0] == signal.SIGURG:
                continue
            for seconds in NUDGES:
                time.sleep(seconds)
                signal.pthread_kill(main, signal.SIGURG)

    # a handler of Python's own, for only these interrupt a wait
    before = signal.signal(signal.SIGURG, lambda signum, frame: None)
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=nudge, name="nudge", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe_before)
        os.close(writer)
        thread.join()
        os.close(reader)
        signal.signal(signal.SIGURG, signal.SIG_DFL if before is None else before)
