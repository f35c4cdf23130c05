"""A report as Markdown, its charts in files beside it."""

import re
from collections.abc import Callable

from lib.report.blocks import Own, Section, Table
from lib.report.record import RunRecord, verdict


def markdown(run: RunRecord, sections: list[Section]) -> str:
    """The whole document."""
    # name and verdict, then the same blocks as on the page
    lines = [f"# {escaped(run.name)}", "", f"**{escaped(verdict(run))}**"]
    for title, blocks in sections:
        lines += ["", f"## {escaped(title)}"]
        for block in blocks:
            lines += ["", *WRITERS[block.kind](block)]
    return clean("\n".join(lines).rstrip() + "\n")


def clean(text: str) -> str:
    """Without what a file of text cannot hold or show: control characters, halves of surrogates."""
    text = text.replace("\r\n", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)


def escaped(text) -> str:
    """One line of text in which no character means anything to Markdown or HTML."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]<|~&])", r"\\\1", one_line)


def fenced(text: str, language: str = "text") -> list[str]:
    """Lines of a code block, its fence longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, 1 + longest)
    return [f"{fence}{language}", text, fence]


def table_lines(table: Table) -> list[str]:
    """Lines of a table."""
    heads = _row(map(escaped, table.heads))
    rule = "|---" * len(table.heads) + "|"
    rows = [_row(map(_cell, row)) for row in table.rows]
    return [heads, rule, *rows]


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """A cell; this run's own in bold."""
    if isinstance(text, Own):
        return f"**{escaped(text)}**"
    return escaped(text)


def _pairs(block) -> list[str]:
    """Pairs as a table: Markdown has no lists of names and what they stand for."""
    rows = [list(pair) for pair in block.pairs]
    return table_lines(Table(["setting", "value"], rows))


def _charts(block) -> list[str]:
    return [f"![{escaped(block.name)}](plots/report_{block.name}.svg)"]


def _samples(block) -> list[str]:
    # whole texts, for their own lines and blanks matter
    lines = []
    for who, pieces in block.samples:
        text = "".join(piece.text for piece in pieces)
        lines += [f"{who}:", "", *fenced(clean(text)), ""]
    return lines


# how each kind of block is written
WRITERS: dict[str, Callable[..., list[str]]] = {
    "heading": lambda block: [f"### {escaped(block.text)}"],
    "text": lambda block: [escaped(block.text)],
    "items": lambda block: [f"- {escaped(item)}" for item in block.items],
    "pairs": _pairs,
    "table": table_lines,
    "charts": _charts,
    "samples": _samples,
    "code": lambda block: fenced(block.text, block.language),
}
