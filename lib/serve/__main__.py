"""`python -m lib.serve`: the chat page and the API over one model."""

import dataclasses
import os

import tyro

from lib import notebook
from lib.serve.web import Settings, main

notebook.setup()
settings = tyro.cli(Settings, prog="python -m lib.serve")
settings = dataclasses.replace(
    settings, token=settings.token or os.environ.get("RAWCHAT_TOKEN", "")
)
main(settings, in_colab="COLAB_RELEASE_TAG" in os.environ)
