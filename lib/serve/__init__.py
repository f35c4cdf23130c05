"""A chat page and an OpenAI-compatible API over one model: `python -m lib.serve`.

`api` checks requests, `worker` is the thread that writes their answers, `answers` brings these into
OpenAI's form. `web` is the application around them behind `guard`, `connections` keeps idle ones
from filling it, `counters` counts for Prometheus, `server` runs it, `page.html` is the page.
"""

from lib.serve.server import start
from lib.serve.settings import ServeSettings

__all__ = ["ServeSettings", "start"]
