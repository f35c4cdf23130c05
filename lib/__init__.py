"""The rooms of the house: README says what each is for."""

import os
import sys
from importlib.util import find_spec

from lib import interrupts

# The imports of a command (`python -m lib.chat`), or of a notebook run as a script, begin here.
# Other people's programs, which only import this, handle Ctrl-C as they like.
_program = os.path.abspath(sys.argv[0]) if sys.argv else ""
_beside = os.path.dirname(_program) == os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.argv[:1] == ["-m"] or (_beside and _program.endswith(".py")):
    interrupts.starting()
    if find_spec("jax") is None:
        print(
            f"Error: {sys.executable} has no jax. `bash speedrun.sh` and `bash run_tests.sh` make "
            "an environment that has all, which `source .venv/bin/activate` enters; "
            "or install this project into one of your own: pip install -e .",
            file=sys.stderr,
        )
        sys.exit(2)
