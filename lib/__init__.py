"""The rooms of the house: README says what each is for."""

import os
import sys

from lib import interrupts

# The imports of a command (`python -m lib.chat`), or of a notebook run as a script, begin here.
# Other people's programs, which only import this, handle Ctrl-C as they like.
_program = os.path.abspath(sys.argv[0]) if sys.argv else ""
_beside = os.path.dirname(_program) == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.argv[:1] == ["-m"] or (_beside and _program.endswith(".py")):
    interrupts.starting()
