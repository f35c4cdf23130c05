"""Gives itself a Ctrl-C. Argument: starting (while it imports, say, and something catches all
exceptions) or lost (in a callback of the garbage collector, which loses exceptions; ends with 7
if it is given once more).
"""

import os
import signal
import sys
import time

from lib import interrupts


class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


interrupts.starting()
if sys.argv[1] == "starting":
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        print("caught")
else:
    interrupts.started()
    Lost()
    try:
        time.sleep(20)
    except KeyboardInterrupt:
        sys.exit(7)
