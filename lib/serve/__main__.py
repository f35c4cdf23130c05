"""`python -m lib.serve`: the chat page and the API over one model."""

import dataclasses
import os

from lib import notebook
from lib.serve.server import main
from lib.serve.settings import ServeSettings

notebook.setup()
settings = notebook.options(ServeSettings, "python -m lib.serve")
token = settings.token or os.environ.get("RAWCHAT_TOKEN", "")
main(dataclasses.replace(settings, token=token), in_colab="COLAB_RELEASE_TAG" in os.environ)
