"""Gives itself a Ctrl-C. Argument: starting (while it imports, say, and something catches all
exceptions), lost (in a callback of the garbage collector, which loses exceptions; ends with 7
if it is given once more), slowly (the same where a thread is slow to start, as on a busy machine),
or ended (with an upload and an exit handler still to come, which tell so, as does who is torn
down).
"""

import atexit
import os
import signal
import sys
import threading
import time

from lib import interrupts


class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


def tell(word: str):
    os.write(2, word.encode())


class Kept:
    def __del__(self):
        tell("torn down")


def upload():
    time.sleep(0.1)
    tell("uploaded ")


def end():
    """What a script does after a Ctrl-C: its last words are said, and its work is given up."""
    atexit.register(tell, "tidied ")
    threading.Thread(target=upload).start()
    interrupts.stopped(interrupts.INTERRUPTED)
    sys.exit(1)


kept = Kept()
interrupts.starting()
if sys.argv[1] == "starting":
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        print("caught")
elif sys.argv[1] == "ended":
    end()
else:
    if sys.argv[1] == "slowly":
        start = threading.Thread.start
        threading.Thread.start = lambda thread: (start(thread), time.sleep(0.1))
    interrupts.started()
    Lost()
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        os._exit(7)
