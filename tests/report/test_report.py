"""Any part of a run gives a page, all in it is escaped, and it says what the records say."""

import html.parser
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import pytest

from lib import report
from lib.config import Config
from lib.evals.stats import Comparison
from lib.files import UserError
from lib.report import charts, sections, words
from lib.report.blocks import Own
from lib.report.record import EARLIER, earlier_runs

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
            computed_in="float32 with products of bfloat16",
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
        "Only a tokenizer so far, one of 4,096 tokens that takes 3.37 bytes of held-out text per "
        "token; no model is trained and none is measured."
    )


@pytest.mark.parametrize(
    "files, words",
    [
        ({}, "nothing to report"),
        ({"results.json": "{"}, "results.json: not JSON"),
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
    chart = charts.dots("task", {"base": entry(25), "sft": entry(80)}, [0.4])
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
    below = charts.dots("CORE", {"base": entry(0, score=-0.02, baseline=0.0)})
    places = re.findall(r'c?x[12]?="([-\d.]+)%"', below.inner)
    assert len(places) > 2 and all(0 <= float(x) <= 100 for x in places)


def test_a_falling_loss_falls_and_many_points_become_means():
    rows = [{"step": 1, "loss": 8.0}, {"step": 2, "loss": 2.0}]
    (chart,) = charts.curves(rows, "base")
    (line,) = re.findall(r'points="([^"]+)"', chart.inner)
    (left, top), (right, bottom) = (map(float, point.split(",")) for point in line.split(" "))
    assert left < right and top < bottom

    # 600 rows are 300 points, each the mean of two
    rows = [{"step": i, "loss": float(i % 2)} for i in range(1, 601)]
    points, dropped = charts._points(rows, "loss")
    assert points.values == [0.5] * 300 and points.steps[:2] == [2, 4] and dropped == 0


def test_what_is_a_share_and_what_is_not():
    assert words.score(entry(50, n=100)).startswith("50.0 ±")
    perplexity = entry(0, kind="perplexity", score=116.2, stderr=5.5)
    assert words.score(perplexity) == "116 ± 5.5"
    assert not words.is_share(perplexity)
    assert words.score(None) == "—"


def test_the_newest_of_other_runs_are_shown(tmp_path):
    for i in range(EARLIER + 2):
        run = put(tmp_path / f"r{i}", {"evals/sft.json": json.dumps(record("sft", {}))})
        os.utime(run / "evals/sft.json", (i, i))
    ours = put(tmp_path / "ours", FILES)
    runs, unread = earlier_runs(ours)
    assert [run.name for run in runs] == [f"r{i}" for i in range(EARLIER + 1, 1, -1)]
    assert unread == []


def test_the_headline_is_the_base_models_and_core_is_compared_as_a_whole(tmp_path):
    def bits(bpb):
        return {"stdlib": {"bpb": bpb, "stderr": 0.01, "bytes": 900, "kinds": {}}}

    core = {"score": 0.1, "stderr": 0.01, "tasks": {}}
    tasks = {"copa": entry(60, kind="core"), "own": entry(30)}
    files = FILES | {
        "evals/base.json": json.dumps(record("base", tasks, bpb=bits(1.25), core=core)),
        "evals/sft.json": json.dumps(record("sft", tasks, bpb=bits(1.75), core=core)),
    }
    run = report.read(put(tmp_path / "run", files))
    assert "1.250 bits per byte of unseen stdlib" in report.verdict(run)
    ((_, compared),) = sections.differences(run)
    assert set(compared) == {"own", "core", "bpb/stdlib"}


def test_curves_survive_numbers_that_are_none():
    rows = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 2.0}]
    (chart,) = charts.curves(rows, "base")
    assert (
        "2 values not finite" in chart.title
        and "nan" not in chart.inner
        and "inf" not in chart.inner
    )
    assert charts.curves([{"step": 1, "loss": math.nan}], "base") == []
    many = charts.curves([{"step": i, "loss": 1 / i} for i in range(1, 100_000)], "base")[0]
    assert len(many.inner) < 20_000


@pytest.mark.parametrize("low, high", [(0, 1), (-0.02, 0.03), (8.1, 8.3), (1, 1e9), (0, 13_700)])
def test_ticks_are_few_and_round(low, high):
    ticks = charts.ticks(low, high)
    assert 2 <= len(ticks) <= 6 and all(low <= t <= high for t in ticks)
    assert all(
        len(f"{t:.9g}".strip("-0").replace(".", "").replace("e+0", "").strip("0")) <= 3
        for t in ticks
    )


def plan_rows(folder, files):
    """The plan's table as {what: (planned, came out)}."""
    table = sections.plan_table(report.read(put(folder, files)))
    return {what: tuple(rest) for what, *rest in table.rows}


def test_plan_beside_outcome_and_nothing_invented(tmp_path):
    rows = plan_rows(tmp_path / "a", FILES)
    assert rows["tokens"] == ("163,840", "163,840")
    assert rows["memory of a step"] == ("not planned", "0.50 GiB")
    assert rows["time of training steps"] == ("not planned", "80 s")
    assert "cost of training" not in rows

    plan = dict(tokens=163840, hours=0.5, memory_bytes=2**30, cost=1.2, price_per_hour=9)
    results = json.loads(FILES["results.json"]) | {"plan": plan}
    rows = plan_rows(tmp_path / "b", FILES | {"results.json": json.dumps(results)})
    assert rows["time of training steps"] == ("30.0 min", "80 s")
    assert rows["memory of a step"] == ("1.00 GiB", "0.50 GiB")
    # 80 seconds at nine dollars an hour
    assert rows["cost of training"] == ("$1.20", "$0.20")

    only_tokenizer = {"tokenizer.json": "{}", "results.json": '{"bytes_per_token": 3}'}
    assert plan_rows(tmp_path / "c", only_tokenizer) == {}
    rows = "".join(json.dumps(row) + "\n" for row in ROWS[:10])
    stopped = put(tmp_path / "d", FILES | {"metrics.jsonl": rows})
    assert "training stopped at step 10 of 40" in report.verdict(report.read(stopped))


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
    assert "Training: base" in page.text and "Training: sft" in page.text
    assert (run / "plots/report_sft.svg").exists()
    assert ["time of sft", "not planned", "80 s"] in sections.plan_table(report.read(run)).rows
    rows = sections.bits_table(report.read(run)).rows
    assert [row[:2] for row in rows] == [
        ["tinystories", "all"],
        ["tinystories", "gzip -9"],
        ["tinystories", "xz -9"],
    ]
    assert "1.200 bits per byte of unseen tinystories where xz" in page.text
    assert "1 of 100 (7 too short to tell)" in page.text
    # one headline, and why the others say something else
    assert "1.1000 at the end of training and 1.1000 in results.json come from rows" in page.text


def test_differences_between_stages_are_drawn_and_told(tmp_path):
    tasks = {f"t{i}": entry(50) for i in range(5)}
    files = FILES | {
        "evals/base.json": json.dumps(record("base", tasks | {"a": entry(20), "b": entry(80)})),
        "evals/sft.json": json.dumps(
            record("sft", tasks | {"a": entry(90), "b": entry(30), "new": entry(10)})
        ),
    }
    run = put(tmp_path / "run", files)
    page = Page(report.write(run))
    assert "From base to sft" in page.text
    assert "a: sft is better by 70.0 points" in page.text
    assert "5 differences are no more than chance: t0, t1, t2, t3, t4." in page.text
    assert (run / "plots/report_differences_sft.svg").exists()

    ((pair, compared),) = sections.differences(report.read(run))
    assert pair == ("base", "sft")
    rows = {
        row[0]: row[1:] for row in sections.differences_section([(pair, compared)]).blocks[3].rows
    }
    assert rows["a"][0] == "+70.0 points" and rows["a"][-1] == "yes"
    assert rows["t0"][-1] == "may be chance"

    log = (run / "report.md").read_text().partition("## For the log")[2]
    assert "2 of 7 differences are real" in log and "the difference is real" in log
    assert "## 2026-11-21 · Run run" in log


def comparison(label, delta, stderr, p, unit="points", better="higher"):
    return Comparison(label, delta, stderr, p, 100, "", unit, better, p_adjusted=p)


def test_intervals_stand_where_the_differences_are():
    compared = [
        comparison("up", 0.10, 0.02, 0.001),
        comparison("down", -0.10, 0.02, 0.001),
        comparison("unsure", 0.02, 0.02, 0.3),
        comparison("bpb/x", -0.2, 0.01, 0.001, "bits per byte", "lower"),
    ]
    points, bits = charts.intervals(compared, ("base", "sft"))
    assert points.title == "sft less base, points (more is better)"
    assert bits.title == "sft less base, bits per byte (less is better)"

    svg = ElementTree.fromstring(points.svg())
    space = "{http://www.w3.org/2000/svg}"
    circles = [(c.get("class"), float(c.get("cx")[:-1])) for c in svg.iter(f"{space}circle")]
    # the longest end, 13.92 points, stands at 1/1.08 of the half width
    reach = 100 * (0.10 + 1.96 * 0.02) * 1.08
    assert circles == [
        ("better", pytest.approx(50 + 50 * 10 / reach, abs=0.01)),
        ("worse", pytest.approx(50 - 50 * 10 / reach, abs=0.01)),
        ("chance", pytest.approx(50 + 50 * 2 / reach, abs=0.01)),
    ]
    ends = [
        (float(line.get("x1")[:-1]), float(line.get("x2")[:-1]))
        for line in svg.iter(f"{space}line")
        if line.get("class") == "chance"
    ]
    low, high = (50 + 50 * (2 + sign * 1.96 * 2) / reach for sign in (-1, 1))
    assert ends == [(pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))]
    text = "".join(svg.itertext())
    assert "up +10.0" in text and "unsure +2.0 (may be chance)" in text
    assert "bits per byte of x -0.2000" in "".join(ElementTree.fromstring(bits.svg()).itertext())
    # fewer bits are better
    assert 'class="better"' in bits.inner


def test_a_guesser_is_not_called_better_than_guessing(tmp_path):
    # one of eighteen tasks is two standard errors above chance, as happens
    tasks = {f"t{i}": entry(25) for i in range(17)} | {"lucky": entry(34)}
    files = FILES | {"evals/base.json": json.dumps(record("base", tasks))}
    sentence = report.verdict(report.read(put(tmp_path / "a", files)))
    assert "clearly better than guessing on none of 18 tasks" in sentence
    # alone on the sheet as far above is another matter
    tasks["sure"] = entry(60)
    files = FILES | {"evals/base.json": json.dumps(record("base", tasks))}
    sentence = report.verdict(report.read(put(tmp_path / "b", files)))
    assert "on 1 of 19 tasks (most on sure: 60.0 %)" in sentence


def test_core_is_in_the_headline(tmp_path):
    core = {"score": 0.123, "stderr": 0.011, "tasks": {}}
    files = FILES | {"evals/base.json": json.dumps(record("base", {}, core=core))}
    sentence = report.verdict(report.read(put(tmp_path / "run", files)))
    assert "CORE is 0.123 ± 0.011 after stage base" in sentence
    # of two stages that have it the later one's
    files |= {"evals/sft.json": json.dumps(record("sft", {}, core=core | dict(score=0.2)))}
    sentence = report.verdict(report.read(put(tmp_path / "two", files)))
    assert "CORE is 0.200 ± 0.011 after stage sft" in sentence


def test_published_figures_stand_beside_ones_own(tmp_path):
    core = {
        "score": 0.01,
        "stderr": 0.005,
        "tasks": {"copa": dict(accuracy=0.55, centered=0.1, stderr=0.05, n=100, baseline=0.5)},
    }
    put(tmp_path / "other", {"evals/sft.json": json.dumps(record("sft", {"ARC-Easy": entry(33)}))})
    put(tmp_path / "broken", {"evals/sft.json": "{"})
    files = {"evals/base.json": json.dumps(record("base", {"arc_easy": entry(24)}, core=core))}
    run = put(tmp_path / "run", FILES | files)
    page = Page(report.write(run))
    assert "Run broken is left out" in page.text and "copa" in page.text

    beside = sections.beside_table(report.read(run), *earlier_runs(run)[:1])
    table = {
        (task, stage): dict(zip(beside.heads[2:], cells)) for task, stage, *cells in beside.rows
    }
    assert beside.heads[:3] == ["task", "stage", "this run"]
    assert table["CORE", "base"]["GPT-2 1.6B"] == "25.65"
    assert table["CORE", "base"]["this run"] == "1.0 ± 0.5"
    assert isinstance(table["CORE", "base"]["this run"], Own)
    assert table["arc_easy", "sft"]["run other"].startswith("33.0 ±")
    assert table["arc_easy", "sft"]["nanochat d20, 8×H100, 3h51m"] == "38.76"
    # our column is there where we have no figure too
    assert table["GSM8K", "rl"]["this run"] == "—"


def test_a_part_of_core_is_not_core_and_another_mean_not_chatcore(tmp_path):
    core = {"score": 0.01, "stderr": 0.005, "tasks": {}, "partial": True}
    whole = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval"]

    def ours(name, **means):
        evaluated = {"evals/sft.json": json.dumps(record("sft", {}, **means))}
        table = sections.beside_table(report.read(put(tmp_path / name, evaluated)), [])
        return {row[0] for row in table.rows if row[2] != "—"}

    assert ours("part", core=core) == set()
    assert ours("all", core=core | {"partial": False}) == set()  # published for base alone
    part = report.read(tmp_path / "part")
    assert "CORE of a part is 0.010" in report.verdict(part)
    assert "CORE is 0.010" in report.verdict(report.read(tmp_path / "all"))
    mean = {"score": 0.2, "stderr": 0.01}
    assert ours("other", chatcore=mean | {"tasks": ["arithmetic"]}) == set()
    assert ours("whole", chatcore=mean | {"tasks": whole}) == {"ChatCORE"}


def test_samples_keep_their_blanks_and_their_calls(tmp_path):
    answer = [
        {"type": "text", "text": "Let me see:"},
        {"type": "python", "text": "37*85"},
        {"type": "python_output", "text": "3145"},
        {"type": "text", "text": "That is  3145."},
    ]
    said = [dict(prompt="What is 37 times 85?", text="That is  3145.", parts=answer)]
    continued = [dict(prompt="def f(n):\n", text="    return n\n")]
    files = FILES | {
        "evals/base.json": json.dumps(record("base", {}, samples=continued)),
        "evals/sft.json": json.dumps(record("sft", {}, samples=said)),
    }
    run = put(tmp_path / "run", files)
    page = Page(report.write(run))
    assert "def f(n):\n    return n\n" in page.text
    chat = "What is 37 times 85?\nLet me see: [37*85 = 3145] That is  3145."
    assert chat in page.text and chat in (run / "report.md").read_text()
    # what the calculator did has a colour
    assert {("class", "call"), ("class", "answer")} <= set(page.attrs)


def test_figures_of_an_earlier_training_are_not_shown_as_this_ones(tmp_path):
    # measured in 2026, and the training that is in the folder began a day later
    later = ROWS[0]["time"] + 10**9
    rows = "".join(json.dumps(row | {"time": later + i}) + "\n" for i, row in enumerate(ROWS[:3]))
    results = json.loads(FILES["results.json"]) | {"began": ROWS[0]["time"]}
    files = FILES | {"metrics.jsonl": rows, "results.json": json.dumps(results)}
    run = put(tmp_path / "run", files)
    page = Page(report.write(run))
    assert "bits per byte of unseen" not in page.text and "arc_easy" not in page.text
    assert "results.json belongs to an earlier training" in page.text
    assert "evals/base.json was measured before this training began" in page.text
    # the tokenizer's figures stay
    assert report.read(run).results == dict(vocab_size=4096, bytes_per_token=3.4)

    # of the same training, all is there
    same = FILES | {"results.json": json.dumps(results)}
    assert report.read(put(tmp_path / "same", same)).results["val_bpb"] == 1.1


@pytest.mark.parametrize("nothing", ["Infinity", "NaN", "null"])
def test_no_held_out_text_is_said_and_not_drawn(tmp_path, nothing):
    results = FILES["results.json"].replace('"val_bpb": 1.1', f'"val_bpb": {nothing}')
    assert nothing in results
    run = put(tmp_path / "run", FILES | {"results.json": results})
    page = Page(report.write(run))
    assert "there was no held-out text to measure on" in page.text
    assert (
        "inf" not in page.text.lower().split() and "bits per byte of unseen stdlib" not in page.text
    )


def test_every_table_has_headings_and_settings_have_labels(tmp_path):
    run = report.read(put(tmp_path / "run", FILES))
    for section in sections.sections(run):
        for block in section.blocks:
            if block.kind == "table":
                assert all(block.heads), section.title
    labels = dict(sections.configuration_section(run).blocks[0].pairs)
    assert labels["layers"] == str(CONFIG["n_layer"]) and labels["parameters"] == "1,830,000"
    assert labels["steps computed in"] == "float32 with products of bfloat16"
    # nothing is lost: the rest stands by its own name
    rest = dict(sections.configuration_section(run).blocks[2].pairs)
    assert len(labels) - 5 + len(rest) >= len(CONFIG) - len(sections.LABELS)
    assert "n_layer" not in rest and "rope_base" in rest


def test_writing_twice_gives_the_same_but_for_its_time(tmp_path):
    run = put(tmp_path / "run", FILES)

    def read():
        return re.sub(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", "", report.write(run).read_text())

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
    html = report.write(put(tmp_path / "run", files)).read_text()
    page = json.dumps(html).replace("</", "<\\/")
    measure = """for (const width of [320, 390, 1280]) {
        const frame = document.createElement('iframe'), size = s => s.getBoundingClientRect()
        frame.style = `border:0;width:${width}px;height:900px`
        frame.srcdoc = page
        frame.onload = () => { const d = frame.contentDocument
            const needs = d.documentElement.scrollWidth
            document.body.append(JSON.stringify({width, needs, charts:
                [...d.querySelectorAll('.charts>div>svg')]
                    .map(s => [size(s).width, size(s).height])}), '\\n') }
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
