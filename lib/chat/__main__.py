"""`python -m lib.chat`: talking to a model in the terminal."""

import os

import tyro

from lib import notebook
from lib.chat.terminal import Settings, main

notebook.setup()
settings = tyro.cli(Settings, prog="python -m lib.chat")
main(settings, coloured=not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")
