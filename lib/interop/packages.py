"""Packages that only an export needs: imported when it runs, or one sentence on how to get them."""

import importlib
from typing import Any

from lib.files import UserError


def optional(extra: str, *names: str) -> list[Any]:
    """The named modules; UserError with the pip command where one of them is missing.

    extra: the optional dependencies of pyproject.toml that hold them.
    """
    modules = []
    for name in names:
        try:
            modules.append(importlib.import_module(name))
        except ImportError as e:
            raise UserError(
                f"this needs {e.name or name}, which is not installed: run "
                f"pip install -e '.[{extra}]' in the folder of the code"
            ) from e
    return modules
