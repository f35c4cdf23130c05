"""The report card of a run: one page of HTML that needs nothing else, and the same in Markdown."""

from pathlib import Path

from lib.files import write_atomic
from lib.report import charts
from lib.report.blocks import Charts, Own, Section
from lib.report.markdown import clean, markdown
from lib.report.record import RunRecord, earlier_runs, read, verdict
from lib.report.sections import sections

TEMPLATE = Path(__file__).with_name("page.html")


def page(run: RunRecord, sections: list[Section]) -> str:
    """The whole HTML document; everything that comes from a file is escaped."""
    from jinja2 import Environment, StrictUndefined

    # a name that is missing is an error here, not an empty place on the page
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.tests["own"] = lambda cell: isinstance(cell, Own)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        run=run,
        verdict=verdict(run),
        sections=sections,
        light=charts.LIGHT,
        dark=charts.DARK,
        chart_css=charts.CHART_CSS,
    )
    return clean(text + "\n")


def write(folder) -> Path:
    """Write report.html and report.md (its charts in plots/) into a run folder; the page's path.

    From whatever is there. UserError where the folder holds no run, or a damaged file.
    """
    folder = Path(folder)
    run = read(folder)
    parts = sections(run, *earlier_runs(folder))

    # Markdown cannot hold pictures: they are files beside it
    for section in parts:
        for block in section.blocks:
            if isinstance(block, Charts):
                path = folder / "plots" / f"report_{block.name}.svg"
                write_atomic(path, clean(charts.stack(block.charts)))

    write_atomic(folder / "report.md", markdown(run, parts))
    write_atomic(folder / "report.html", page(run, parts))
    return folder / "report.html"
