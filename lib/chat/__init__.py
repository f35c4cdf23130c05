"""Talking with a model.

`messages` reads an answer as it is written and fits a conversation into the context: the terminal,
the server and the notebook use the same. `terminal` is `python -m lib.chat`.
"""

from lib.chat.messages import Delta, Reader, compact, ends, fit, reply

__all__ = ["Delta", "Reader", "compact", "ends", "fit", "reply"]
