"""The machine that Colab lends."""

import os
from pathlib import Path


def unassign():
    """Give it back: here, leave a note that it was."""
    Path(os.environ["STAND_IN_RUNTIME"]).write_text("given back\n")
