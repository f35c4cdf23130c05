"""How a trained model writes: many rows in one batch that come and go, each by its own settings.

`generate` and `stream` write after a list of prompts; an `Engine` (or `Engines` side by side) is
what they and a server run on. `Sampling` says how one row is written.
"""

from lib.generate.engine import Engine, Engines, generate, stream
from lib.generate.sampling import Sampling
from lib.generate.writer import Token

__all__ = ["Engine", "Engines", "Sampling", "Token", "generate", "stream"]
