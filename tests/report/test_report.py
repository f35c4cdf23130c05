"""lib/report/: any part of a run gives a page, everything in it is escaped, and it says what the records say."""

import html.parser
import itertools
import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from lib.config import Config
from lib.files import UserError
from lib.report import page as report

NASTY = "</pre><script>alert(1)</script> ``` | & \"'\x1b[31m\ud800 *x*"
SHOWN = NASTY.replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
CONFIG = Config.preset("cpu_demo", num_steps=40).to_dict()
ROWS = [
    {
        "step": i,
        "time": 1.7e9 + i,
        "loss": 8 / i**0.3,
        "lr": 1.0,
        "step_time": 2.0,
        "tokens_per_s": 900.0 + i,
    }
    | ({"val_loss": 4.0, "val_bpb": 1.5 - i / 100} if i % 10 == 0 else {})
    for i in range(1, 41)
]


def entry(right, n=100, baseline=0.25, **more):
    p = right / n
    return (
        dict(
            kind="choice",
            score=p,
            stderr=math.sqrt(p * (1 - p) / n),
            n=n,
            baseline=baseline,
            majority=0.3,
            centered=(p - baseline) / (1 - baseline),
            seconds=2.0,
            per_second=n / 2,
            seed=0,
            limit=None,
            truncated=0,
            items=[{"id": str(i), "correct": int(i < right)} for i in range(n)],
        )
        | more
    )


def record(stage, tasks, **more):
    return (
        dict(
            stage=stage,
            step=40,
            checkpoint=f"{stage}/step_00000040",
            time="2026-11-21T01:00:00Z",
            seed=0,
            device="cpu",
            jax="0.10.2",
            tasks=tasks,
            skipped={},
        )
        | more
    )


FILES = {
    "tokenizer.json": "{}",
    "config.json": json.dumps(CONFIG),
    "results.json": json.dumps(
        dict(
            vocab_size=4096,
            bytes_per_token=3.4,
            params=1830000,
            source="stdlib",
            train_tokens=163840,
            val_bpb=1.1,
            step_memory_bytes=2**29,
            samples=["def f():\n    pass"],
            device="cpu",
            jax="0.10.2",
        )
    ),
    "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "evals/base.json": json.dumps(record("base", {"arc_easy": entry(24)})),
}


def put(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; complains of tags that don't match."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attrs, self.text, self.blocks = [], [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def columns(line):
    return len(re.findall(r"(?<!\\)\|", line))


def check_markdown(text):
    """Rows of a table have as many cells as its head, and all fences are closed."""
    fence, table = "", 0
    for line in text.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif mark := re.match("(`{3,})", line):
            fence = mark[1]
        elif line.startswith("|"):
            table = table or columns(line)
            assert columns(line) == table, line
        else:
            table = 0
    assert not fence


@pytest.mark.parametrize(
    "names",
    [c for n in range(1, 6) for c in itertools.combinations(FILES, n)],
    ids=lambda names: "+".join(n.partition(".")[0] for n in names),
)
def test_any_part_of_a_run_gives_a_page(tmp_path, names):
    run = put(tmp_path / "run", {name: FILES[name] for name in names})
    assert report.write(run) == run / "report.html"
    page, text = Page(run / "report.html"), (run / "report.md").read_text()
    sentence = report.verdict(report.read(run))
    assert (
        sentence in page.text
        and sentence[0].isupper()
        and sentence.endswith(".")
        and "None" not in sentence
    )
    check_markdown(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    # needs nothing from anywhere
    assert not [v for k, v in page.attrs if k in ("src", "href") or v and "url(" in v]
    assert "nan" not in page.text.lower().split() and "None" not in page.text
    for link in re.findall(r"!\[.*?\]\((.+?)\)", text):
        assert ElementTree.parse(run / link).getroot().tag.endswith("svg")
    assert sorted(p.name for p in run.iterdir() if p.name.startswith(".")) == []
    trained = {"results.json", "metrics.jsonl", "evals/base.json"} & set(names)
    assert (
        sentence.startswith("A model")
        if trained
        else ("Only a tokenizer" in sentence) == ("tokenizer.json" in names)
    )


def test_a_tokenizer_alone_is_told_in_a_sentence(tmp_path):
    files = {
        "tokenizer.json": "{}",
        "results.json": json.dumps(dict(vocab_size=4096, bytes_per_token=3.368)),
    }
    sentence = report.verdict(report.read(put(tmp_path / "run", files)))
    assert sentence == (
        "Only a tokenizer so far, one of 4,096 tokens that takes 3.37 bytes of held-out text per token; no model is trained "
        "and none is measured."
    )


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "nothing to report"),
        ({"results.json": "{"}, "results.json is damaged"),
        ({"evals/sft.json": "[1]"}, "sft.json is damaged"),
        ({"metrics.jsonl": "x\n"}, "line 1"),
    ],
)
def test_no_run_or_a_damaged_one_is_refused(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        report.write(put(tmp_path, files))
    assert not (tmp_path / "report.html").exists()


def test_what_files_say_stays_text(tmp_path):
    tasks = {NASTY: entry(50, kind=NASTY)}
    files = FILES | {
        "evals/base.json": json.dumps(
            record(
                "base",
                tasks,
                skipped={"x": NASTY},
                samples=[{"prompt": NASTY, "text": NASTY}],
                device=NASTY,
                bpb={NASTY: {"bpb": 1.0, "stderr": 0.1, "bytes": 9, "kinds": {}}},
            )
        ),
        "config.json": json.dumps(CONFIG | {"dtype": NASTY}),
        "evals/sft.json": json.dumps(record("sft", {NASTY: entry(90)})),
    }
    run = put(tmp_path / "run", files)
    page = Page(report.write(run))
    assert "script" not in page.tags and page.text.count(SHOWN) >= 6
    text = (run / "report.md").read_text()
    check_markdown(text)
    outside = re.sub(r"(?ms)^(````+)text\n.*?^\1$", "", text).partition("## For the log")[0]
    assert not re.search(r"(?<!\\)<script", outside) and outside.count("\\<script") >= 5
    assert SHOWN + SHOWN in text  # the sample, in a fence longer than its own
    for path in (run / "plots").glob("*.svg"):
        assert not list(ElementTree.parse(path).iter("script"))


def test_dots_stand_where_the_scores_are():
    chart = report.dots("task", {"base": entry(25), "sft": entry(80)}, [0.4])
    svg = ElementTree.fromstring(chart.svg())
    at = [float(c.get("cx")[:-1]) for c in svg.iter("{http://www.w3.org/2000/svg}circle")]
    assert at == [25, 80]
    bars = [
        (float(line.get("x1")[:-1]), float(line.get("x2")[:-1]))
        for line in svg.iter("{http://www.w3.org/2000/svg}line")
        if line.get("class") == "sft"
    ]
    assert bars == [
        (pytest.approx(80 - 1.96 * 4, abs=0.01), pytest.approx(80 + 1.96 * 4, abs=0.01))
    ]
    random, majority = (
        [
            line.get("x1")
            for line in svg.iter("{http://www.w3.org/2000/svg}line")
            if line.get("class") == kind
        ]
        for kind in ("random", "majority")
    )
    assert (random, majority) == (["25.00%"], ["30.00%"])
    assert "◇" in "".join(svg.itertext())
    below = report.dots("CORE", {"base": entry(0, score=-0.02, baseline=0.0)})
    assert all(0 <= float(x) <= 100 for x in re.findall(r'c?x[12]?="([-\d.]+)%"', below.inner))


def test_curves_survive_numbers_that_are_none():
    rows = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 2.0}]
    (chart,) = report.curves(rows, "base")
    assert (
        "2 values not finite" in chart.title
        and "nan" not in chart.inner
        and "inf" not in chart.inner
    )
    assert report.curves([{"step": 1, "loss": math.nan}], "base") == []
    many = report.curves([{"step": i, "loss": 1 / i} for i in range(1, 100_000)], "base")[0]
    assert len(many.inner) < 20_000


@pytest.mark.parametrize("low, high", [(0, 1), (-0.02, 0.03), (8.1, 8.3), (1, 1e9), (0, 13_700)])
def test_ticks_are_few_and_round(low, high):
    ticks = report._ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= t <= high for t in ticks)
    assert all(
        len(f"{t:.9g}".strip("-0").replace(".", "").replace("e+0", "").strip("0")) <= 3
        for t in ticks
    )


def test_plan_beside_outcome_and_nothing_invented(tmp_path):
    rows = {row[0]: row[1:] for row in report._plan(report.read(put(tmp_path / "a", FILES)))}
    assert rows["tokens"] == ("163,840", "163,840") and rows["memory of a step"] == (
        "not planned",
        "0.50 GiB",
    )
    assert (
        rows["time of training steps"] == ("not planned", "80 s") and "cost of training" not in rows
    )
    results = json.loads(FILES["results.json"]) | {
        "plan": {
            "tokens": 163840,
            "hours": 0.5,
            "memory_bytes": 2**30,
            "cost": 1.2,
            "price_per_hour": 9,
        }
    }
    rows = {
        row[0]: row[1:]
        for row in report._plan(
            report.read(put(tmp_path / "b", FILES | {"results.json": json.dumps(results)}))
        )
    }
    assert rows["time of training steps"] == ("30.0 min", "80 s") and rows["memory of a step"] == (
        "1.00 GiB",
        "0.50 GiB",
    )
    assert rows["cost of training"] == ("$1.20", "$0.20")
    assert (
        report._plan(
            report.read(
                put(
                    tmp_path / "c",
                    {"tokenizer.json": "{}", "results.json": '{"bytes_per_token": 3}'},
                )
            )
        )
        == []
    )
    stopped = FILES | {"metrics.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS[:10])}
    assert "training stopped at step 10 of 40" in report.verdict(
        report.read(put(tmp_path / "d", stopped))
    )


def test_every_stage_has_its_curves_and_every_figure_its_text(tmp_path):
    bits = {"tinystories": {"bpb": 1.2, "stderr": 0.01, "bytes": 900, "kinds": {}}}
    results = json.loads(FILES["results.json"]) | {
        "val_source": "tinystories",
        "gzip_bpb": 2.5,
        "xz_bpb": 2.0,
    }
    seen = entry(24, contamination={"overlapping": 1, "n": 100, "short": 7})
    files = FILES | {
        "results.json": json.dumps(results),
        "evals/base.json": json.dumps(record("base", {"arc_easy": seen}, bpb=bits)),
        "sft/metrics.jsonl": FILES["metrics.jsonl"],
    }
    run = put(tmp_path / "run", files)
    page = Page(report.write(run))
    assert (
        "Training: base" in page.text
        and "Training: sft" in page.text
        and (run / "plots/report_sft.svg").exists()
    )
    assert ["time of sft", "not planned", "80 s"] in [
        list(row) for row in report._plan(report.read(run))
    ]
    rows = report._bits_rows(report.read(run))[1]
    assert [row[:2] for row in rows] == [
        ["tinystories", "all"],
        ["tinystories", "gzip -9"],
        ["tinystories", "xz -9"],
    ]
    assert (
        "1.200 bits per byte of unseen tinystories where xz" in page.text
        and "1 of 100 (7 too short to tell)" in page.text
    )


def test_differences_between_stages_are_told(tmp_path):
    files = FILES | {
        "evals/base.json": json.dumps(record("base", {"a": entry(20), "b": entry(50)})),
        "evals/sft.json": json.dumps(
            record("sft", {"a": entry(90), "b": entry(50), "new": entry(10)})
        ),
    }
    page = Page(report.write(put(tmp_path / "run", files)))
    assert (
        "From base to sft" in page.text
        and "a: sft is better by 70.0 points" in page.text
        and "b: no difference" in page.text
    )
    log = (tmp_path / "run/report.md").read_text().partition("## For the log")[2]
    assert (
        "1 of 2 differences are real" in log
        and "the difference is real" in log
        and "## 2026-11-21 · Run run" in log
    )
    assert "clearly better than guessing on 2 of 3 tasks (most on a: 90.0 %)" in page.text


def test_published_figures_stand_beside_ones_own(tmp_path):
    core = {
        "score": 0.01,
        "stderr": 0.005,
        "tasks": {"copa": dict(accuracy=0.55, centered=0.1, stderr=0.05, n=100, baseline=0.5)},
    }
    put(tmp_path / "other", {"evals/sft.json": json.dumps(record("sft", {"ARC-Easy": entry(33)}))})
    put(tmp_path / "broken", {"evals/sft.json": "{"})
    run = put(
        tmp_path / "run",
        FILES | {"evals/base.json": json.dumps(record("base", {"arc_easy": entry(24)}, core=core))},
    )
    page = Page(report.write(run))
    heads, rows, sources = report._beside(report.read(run), *report._earlier(run)[:1])
    table = {}
    for first, *cells in rows:
        if isinstance(first, report.Head):
            table[first] = block = {}
        else:
            block[first] = dict(zip(heads[1:], cells))
    assert (
        table["CORE"]["GPT-2 1.6B"]["base"] == "25.65"
        and table["CORE"]["this run"]["base"] == "1.0 ± 0.5"
    )
    assert (
        table["arc_easy"]["run other"]["sft"].startswith("33.0 ±")
        and table["arc_easy"]["this run"]["sft"] == "—"
    )
    assert any(cells["sft"] == "38.76" for cells in table["arc_easy"].values())
    assert all(
        any(who in source and len(source) > len(who) + 5 for source in sources)
        for who in table["CORE"]
        if who != "this run"
    )
    assert "Run broken is left out" in page.text and "copa" in page.text
    partial = record(
        "base",
        {},
        core=core | {"partial": True},
        chatcore={"score": 0.9, "stderr": 0.01, "tasks": ["arithmetic"]},
    )
    whole = record(
        "sft",
        {},
        chatcore={
            "score": 0.2,
            "stderr": 0.01,
            "tasks": ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"],
        },
    )
    rows = report._beside(
        report.read(put(tmp_path / "part", {"evals/base.json": json.dumps(partial)})), []
    )[1]
    assert "this run" in [
        row[0]
        for row in report._beside(
            report.read(put(tmp_path / "all", {"evals/sft.json": json.dumps(whole)})), []
        )[1]
    ]
    # a part of CORE is not CORE, and a mean over other tasks not ChatCORE
    assert "this run" not in [row[0] for row in rows]


def test_writing_twice_gives_the_same_but_for_its_time(tmp_path):
    run = put(tmp_path / "run", FILES)
    read = lambda: re.sub(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", "", report.write(run).read_text())
    assert read() == read()


@pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs the browser: apt-get install chromium"
)
def test_a_browser_shows_it_without_scrolling_sideways(tmp_path):
    files = FILES | {
        "evals/sft.json": json.dumps(
            record(
                "sft",
                {"a_task_with_a_rather_long_name": entry(90)},
                samples=[{"prompt": "x" * 300, "text": "y" * 300}],
            )
        )
    }
    page = json.dumps(report.write(put(tmp_path / "run", files)).read_text()).replace("</", "<\\/")
    measure = """for (const width of [320, 390, 1280]) {
        const frame = document.createElement('iframe'), size = s => s.getBoundingClientRect()
        frame.style = `border:0;width:${width}px;height:900px`
        frame.srcdoc = page
        frame.onload = () => { const d = frame.contentDocument
            document.body.append(JSON.stringify({width, needs: d.documentElement.scrollWidth, charts:
                [...d.querySelectorAll('.charts>div>svg')].map(s => [size(s).width, size(s).height])}), '\\n') }
        document.body.append(frame) }"""
    (tmp_path / "frames.html").write_text(f"<body><script>const page = {page};{measure}</script>")
    shown = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            "--virtual-time-budget=3000",
            f"file://{tmp_path / 'frames.html'}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = [
        json.loads(line) for line in re.findall(r"\{&quot;width.*|\{\"width.*\}", shown.stdout)
    ]
    assert sorted(f["width"] for f in found) == [320, 390, 1280]
    for f in found:
        assert f["needs"] <= f["width"] and len(f["charts"]) >= 5
        assert all(220 <= wide <= f["width"] and high >= 30 for wide, high in f["charts"])
