"""`python -m lib.chat`: talking to a model in the terminal."""

import os

from lib import notebook
from lib.chat.terminal import ChatSettings, main

notebook.setup()
settings = notebook.options(ChatSettings, "python -m lib.chat")
coloured = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
main(settings, coloured, programs=notebook.kept_programs())
