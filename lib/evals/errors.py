"""Errors that say what was being measured: an item that failed is never scored."""

import contextlib
from collections.abc import Iterator, Sequence

from lib.files import UserError, first_line


@contextlib.contextmanager
def evaluating(what: str) -> Iterator[None]:
    """Put in front of an exception what was being measured when it came, and let it go on."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{what}: {e}") from e
    except Exception as e:
        raise RuntimeError(f"{what}: {type(e).__name__}: {first_line(e)}") from e


def named(ids: Sequence[str]) -> str:
    """The items at work in words: by their ids, of which the first four are told."""
    if len(ids) == 1:
        return f"item {ids[0]}"
    more = ", …" if len(ids) > 4 else ""
    return f"one of {len(ids)} items ({', '.join(ids[:4])}{more})"
