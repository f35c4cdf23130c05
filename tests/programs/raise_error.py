"""A script that ends by an error. Argument: which, as ERRORS names it."""

import sys

from lib.files import UserError
from lib.notebook import setup

ERRORS = {
    "bad input": UserError("do this"),
    "a bug": ValueError("a bug"),
    "Ctrl-C": KeyboardInterrupt(),
}
setup()
raise ERRORS[sys.argv[1]]
