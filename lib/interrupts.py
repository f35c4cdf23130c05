"""Ctrl-C: in a loop the first one asks to finish what was begun and the second insists; anywhere
else it ends a program with one line; and none is lost.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
import types

# when the main thread is woken after a signal, in seconds from one time to the next
NUDGES = (0.02, 0.1, 0.3, 1.0)

# what a shell expects of a program that Ctrl-C has ended, and of one whose words nobody reads
INTERRUPTED = 130
UNREAD = 141
STOPPED = "stopped: run it again to go on from what was saved"

# seconds after which a Ctrl-C that was lost is given once more
AGAIN = 0.01


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

    over = threading.Event()

    def nudge():
        # the end of the pipe ends the thread; all that has come meanwhile is answered together
        while numbers := os.read(reader, 4096):
            # its own nudges come by the pipe as well
            if set(numbers) == {signal.SIGURG}:
                continue
            for seconds in NUDGES:
                if over.wait(seconds):
                    return
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
        over.set()
        os.close(writer)
        thread.join()
        os.close(reader)
        signal.signal(signal.SIGURG, signal.SIG_DFL if before is None else before)


# ---- one line, wherever a program is -------------------------------------------------------------


def starting():
    """Let Ctrl-C end this program on the spot, until `started`: while it imports what it needs.

    Nothing has been begun then, and an exception would be of no use: packages make an ImportError
    of it, or lose it. One that is lost later, in a callback of the garbage collector say, is given
    once more. In a kernel, or where others handle Ctrl-C, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    if sys.unraisablehook is not _unraisable:
        OTHERS.append(sys.unraisablehook)
        sys.unraisablehook = _unraisable
        # what is registered first runs last
        atexit.register(_end)
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _excepthook


def started():
    """Let Ctrl-C raise KeyboardInterrupt again, so that what has been begun can be cleared away."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stopped(code: int):
    """Let this program, which Ctrl-C or a closed pipe has ended, leave with `code` once its uploads
    are through and its exit handlers have run.

    Python would go on to take itself down, under the feet of threads of jax that still compute
    what was begun: now and then that ends in a crash (code -11) instead.
    """
    ENDING.append(code)


def left_unread(error: BaseException) -> bool:
    """Whether an error says only that nobody reads any more what this program prints, as behind
    `| head`, and not that another pipe is broken.
    """
    if not isinstance(error, BrokenPipeError):
        return False
    watch = select.poll()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        watch.register(sys.stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def _excepthook(kind, error, trace):
    """Python's own, but in silence where nobody reads; until `notebook.setup` sets another."""
    if left_unread(error):
        stopped(UNREAD)
    else:
        sys.__excepthook__(kind, error, trace)


def _end():
    """Leave where `stopped` was said, or nobody reads what is still to be said; the last of all
    exit handlers.
    """
    # of other troubles Python tells, if they are worth it
    with contextlib.suppress(OSError, ValueError, AttributeError):
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            if not ENDING:
                stopped(UNREAD)
    if ENDING:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(ENDING[-1])


def caused(error: BaseException | None) -> bool:
    """Whether an exception comes of a Ctrl-C, be it that a package made another one of it."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _leave(*_):
    """End this process with one line; what is left undone is not even cleared away."""
    # as far as it goes: the signal may have come in the middle of another print
    with contextlib.suppress(Exception):
        print(f"\n{STOPPED}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(INTERRUPTED)


# what showed exceptions that nobody can catch before `starting` did
OTHERS: list = []

# the code of a program that is stopping
ENDING: list[int] = []


def _unraisable(problem):
    """Don't lose a Ctrl-C that was raised where it could not be handed on."""
    if not issubclass(problem.exc_type, KeyboardInterrupt):
        OTHERS[-1](problem)
    elif sys._getframe().f_back is None:
        # the program is over, Python is tidying up
        _leave()
    else:
        # from another thread, or it would be raised in here
        main = threading.get_ident()
        threading.Thread(target=_give_again, args=(main,), daemon=True).start()


def _give_again(main: int):
    """Raise a lost Ctrl-C once more in the thread `main`, when that has come out of the hook: in
    there it would be lost for good, and a busy machine may keep it there for long.
    """
    inside = True
    while inside:
        time.sleep(AGAIN)
        frame, inside = sys._current_frames().get(main), False
        while frame is not None:
            inside = inside or frame.f_code is _unraisable.__code__
            frame = frame.f_back
    # a signal in earnest, for it must end a wait too
    signal.pthread_kill(main, signal.SIGINT)
