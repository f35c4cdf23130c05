"""`python -m lib.preflight`: what a training run needs, before it is paid for."""

import os

from lib.preflight.compile import ENVIRONMENT, command

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)
command()
