"""What a report is made of: sections of plain blocks, which page and Markdown both render."""

import re
from typing import NamedTuple

from lib.report.charts import Chart


class Own(str):
    """A cell that speaks of this very run, among those of others."""


class Heading(NamedTuple):
    kind = "heading"
    text: str


class Text(NamedTuple):
    kind = "text"
    text: str


class Items(NamedTuple):
    """A list of sentences."""

    kind = "items"
    items: list[str]


class Pairs(NamedTuple):
    """Names and what they stand for."""

    kind = "pairs"
    pairs: list[tuple[str, str]]


class Table(NamedTuple):
    kind = "table"
    heads: list[str]
    rows: list[list[str]]

    def classes(self) -> list[str]:
        """How each column is set: "say" wraps, "num" stands on the right, "" is short text."""
        return [self._class(i) for i in range(len(self.heads))]

    def _class(self, column: int) -> str:
        cells = [str(row[column]) for row in self.rows]
        longest = max(map(len, cells), default=0)
        if longest > 30:
            return "say"

        # names at the left, and a column in which most cells have words
        with_words = [cell for cell in cells if re.search(r"[^\W\d_]{2}", cell)]
        if column == 0 or 2 * len(with_words) > len(cells):
            return ""
        return "num"


class Charts(NamedTuple):
    """name: of the file beside the Markdown that holds them."""

    kind = "charts"
    name: str
    charts: list[Chart]
    wide: bool = False


class SamplePart(NamedTuple):
    """A part of a sample: the prompt, what was written, or a call of a tool with its answer."""

    kind: str
    text: str


class Sample(NamedTuple):
    """Who wrote it, and its pieces."""

    who: str
    pieces: list[SamplePart]


class Samples(NamedTuple):
    kind = "samples"
    samples: list[Sample]


class Code(NamedTuple):
    kind = "code"
    text: str
    language: str = "markdown"


Block = Heading | Text | Items | Pairs | Table | Charts | Samples | Code


class Section(NamedTuple):
    title: str
    blocks: list[Block]


def make_section(title: str, *blocks: Block) -> Section:
    """A section of those blocks that have something to show; with headings only, none."""
    shown = [block for block in blocks if _content(block)]

    # words about nothing
    if all(block.kind in ("heading", "text") for block in shown):
        shown = []
    return Section(title, shown)


def _content(block: Block):
    """What decides whether a block has anything to show."""
    if isinstance(block, Table):
        return block.rows
    if isinstance(block, Charts):
        return block.charts
    return block[0]
