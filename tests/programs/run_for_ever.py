"""Runs a program that never ends, behind walls. Arguments: jail.py, JSON with the walls' names.

jail.py is a copy, by whose address the processes can be told from others; what is made on the way
lies beside it.
"""

import json
import sys
import tempfile
from pathlib import Path

from lib.sandbox import programs

programs.JAIL = Path(sys.argv[1])
tempfile.tempdir = str(programs.JAIL.parent)
layers = tuple(json.loads(sys.argv[2]))
programs.run_python("while True: pass", timeout=60, layers=layers)
