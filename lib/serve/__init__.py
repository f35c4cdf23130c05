"""A chat page and an OpenAI-compatible API over one model: `python -m lib.serve`.

`api` turns requests into work for one engine and its answers into OpenAI's form, `counters` counts
for Prometheus, `web` is the server around them, `page.html` the page.
"""

from lib.serve.web import Settings, start

__all__ = ["Settings", "start"]
