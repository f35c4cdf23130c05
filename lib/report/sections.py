"""What the report says: a run's record as sections of blocks, in the order of the page."""

import datetime
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

from lib.evals import stats
from lib.evals.stats import Comparison
from lib.report import charts, words
from lib.report.blocks import (
    Block,
    Charts,
    Code,
    Heading,
    Items,
    Own,
    Pairs,
    Sample,
    SamplePart,
    Samples,
    Section,
    Table,
    Text,
    make_section,
)
from lib.report.record import (
    REFERENCES,
    RunRecord,
    is_mean,
    key_of,
    measured_source,
    scores_of,
    steps_done,
    task_names,
    text_bits,
    verdict,
)
from lib.report.words import UNKNOWN, duration, gigabytes, is_share, percent, value
from lib.runs import STAGES
from lib.train.metrics import column

# samples shown of each stage
MOST_SAMPLES = 4

# units written behind each figure
SHORT_UNITS = ("points", "bits per byte", "nats per token")

# differences told in a sentence; the picture and the table have all of them
MOST_SENTENCES = 3


def sections(
    run: RunRecord, earlier: Sequence[RunRecord] = (), unread: Sequence[str] = ()
) -> list[Section]:
    """The sections of a report; only those that the run has something for.

    earlier: other runs to compare with; unread: sentences on those that could not be read.
    """
    compared = differences(run)
    everything = [
        scores_section(run),
        differences_section(compared),
        beside_section(run, earlier, unread),
        core_section(run),
        make_section("By lm-evaluation-harness", harness_table(run)),
        bits_section(run),
        *training_sections(run),
        make_section("Plan and outcome", plan_table(run)),
        make_section("Samples", Samples(samples(run))),
        make_section("How it was measured", measurement_table(run)),
        make_section("Not measured", Items(not_measured(run))),
        configuration_section(run),
        make_section("Environment", Pairs(environment(run))),
        make_section("For the log", Code(log_entry(run, compared))),
    ]
    return [section for section in everything if section.blocks]


# ---- scores --------------------------------------------------------------------------------------


def scores_section(run: RunRecord) -> Section:
    """Every task's score by stage, drawn and as a table."""
    # a picture of each task that has shares to draw
    scores = {stage: scores_of(record) for stage, record in run.records.items()}
    drawn = []
    for name in task_names(run):
        stages = {}
        for stage, entries in scores.items():
            if name in entries and is_share(entries[name]):
                stages[stage] = entries[name]
        if stages:
            drawn.append(charts.dots(name, stages, published(name)))

    # what the signs mean
    legend = (
        "Dots with 95 % ranges. Dotted line: random answers; dashed line: always the commonest "
        "answer; ◇: published by others, see below."
    )
    units = (
        "Percent right ± standard error (perplexities: lower is better). CORE and ChatCORE are "
        "means of scores centred on guessing: 0 is chance, 100 perfect; of a part: over other "
        "tasks than nanochat's."
    )
    return make_section(
        "Scores",
        Charts("scores", drawn),
        Text(legend if drawn else ""),
        scores_table(run),
        Text(units if run.records else ""),
    )


def scores_table(run: RunRecord) -> Table:
    """Every task's score, a column for each stage."""
    stages = list(run.records)
    scores = {stage: scores_of(record) for stage, record in run.records.items()}
    rows = []
    for name in task_names(run):
        entries = [scores[stage].get(name) for stage in stages]

        # baselines are the task's own: the same in every stage
        latest = [entry for entry in entries if entry][-1]
        row = [
            name,
            *map(words.score, entries),
            percent(latest.get("baseline")),
            percent(latest.get("majority")),
            value(latest.get("n")),
            latest.get("kind", ""),
        ]
        rows.append(row)
    return Table(["task", *stages, "random", "majority", "items", "kind"], rows)


def published(name: str) -> list[float]:
    """Scores that others published of a task."""
    scores = []
    for _, _, metrics in REFERENCES:
        for metric, by_stage in metrics.items():
            if key_of(metric) == key_of(name):
                scores += by_stage.values()
    return scores


def differences(run: RunRecord) -> list[tuple[tuple[str, str], dict[str, Comparison]]]:
    """((stage, the stage after it), their comparisons); CORE as a whole, not by its tasks."""
    stages = list(run.records)
    compared = []
    for before, after in zip(stages, stages[1:]):
        comparisons = stats.compare(run.records[before], run.records[after], (before, after))
        tasks = run.records[after].get("tasks", {})
        for label in list(comparisons):
            if tasks.get(label, {}).get("kind") == "core":
                del comparisons[label]
        if comparisons:
            compared.append(((before, after), comparisons))
    return compared


def differences_section(compared: list[tuple[tuple[str, str], dict[str, Comparison]]]) -> Section:
    """Differences as a picture, the few that matter in sentences, all of them as a table."""
    blocks = []
    for (before, after), comparisons in compared:
        ordered = stats.differences(comparisons)
        drawn = charts.intervals(ordered, (before, after))
        rows = [_difference_row(comparison) for comparison in ordered]
        blocks += [
            Heading(f"From {before} to {after}"),
            Charts(f"differences_{after}", drawn, wide=True),
            Items(_told(ordered)),
            Table(["what", "difference", "95 % interval", "p, adjusted", "items", "real"], rows),
        ]
    legend = (
        "Paired tests on the same items, with intervals of 95 %; filled dots are more than chance "
        "when all comparisons are counted (Holm), hollow ones are not."
    )
    return make_section("Is the difference real?", *blocks, Text(legend if compared else ""))


def _told(ordered: list[Comparison]) -> list[str]:
    """The surest few in sentences, and one line for all that may be chance."""
    sentences = [c.sentence for c in ordered if c.real]
    chance = [words.comparison_label(c.label) for c in ordered if not c.real]
    told = sentences[:MOST_SENTENCES]
    if chance:
        these = "difference is" if len(chance) == 1 else "differences are"
        told.append(f"{len(chance)} {these} no more than chance: {', '.join(chance)}.")
    return told


def _difference_row(c: Comparison) -> list[str]:
    """A difference as a row of `differences_section`'s table."""
    scale, spec = (100, "+.1f") if c.unit == "points" else (1, "+.4f")
    interval = words.UNKNOWN
    if c.interval:
        low, high = (scale * end for end in c.interval)
        interval = f"{low:{spec}} to {high:{spec}}"
    delta = f"{scale * c.delta:{spec}}"
    if c.unit in SHORT_UNITS:
        delta += f" {c.unit}"
    return [
        words.comparison_label(c.label),
        delta,
        interval,
        f"{c.p_adjusted:.2g}" if c.p_adjusted >= 1e-4 else "< 0.0001",
        value(c.n or None),
        "yes" if c.real else "may be chance",
    ]


# ---- beside others -------------------------------------------------------------------------------


def beside_section(run: RunRecord, earlier: Sequence[RunRecord], unread: Sequence[str]) -> Section:
    """This run's scores in a column beside those of other runs and published ones."""
    if not run.records:
        return Section("Beside others", [])
    sources = [f"{who}: {source}." for who, source, _ in REFERENCES]
    scale = (
        "Percent; published figures come from other models, data and code: a scale to read one's "
        "own by, not a contest."
    )
    table = beside_table(run, earlier)
    return make_section("Beside others", table, Items([*unread, *sources]), Text(scale))


def beside_table(run: RunRecord, earlier: Sequence[RunRecord]) -> Table:
    """A row for each metric and stage that others have a figure of, a column for each system."""
    # {(key of the metric, stage): {system: cell}}, and how each metric was called first
    cells, names = {}, {}

    def put(metric: str, stage: str, system: str, cell: str):
        key = key_of(metric)
        names.setdefault(key, metric)
        cells.setdefault((key, stage), {})[system] = cell

    # ours, and those beside it
    systems = ["this run"]
    for other in [run, *earlier]:
        system = "this run" if other is run else f"run {other.name}"
        systems.append(system)
        for stage, record in other.records.items():
            for name, entry in scores_of(record).items():
                put(name, stage, system, words.score(entry))

    # published ones
    for system, _, metrics in REFERENCES:
        systems.append(system)
        for name, by_stage in metrics.items():
            for stage, score in by_stage.items():
                put(name, stage, system, f"{100 * score:.2f}")

    # what only this run has stands in its own table
    shown = {row: by_system for row, by_system in cells.items() if set(by_system) != {"this run"}}
    order = list(STAGES)
    keys = list(names)

    def place(row: tuple[str, str]):
        """Means first, then as they came, each by stage."""
        key, stage = row
        return not is_mean(names[key]), keys.index(key), order.index(stage)

    # a column for every system that has a figure, and always for ours
    with_figure = {"this run"}.union(*shown.values())
    used = [system for system in dict.fromkeys(systems) if system in with_figure]
    lines = []
    for key, stage in sorted(shown, key=place):
        by_system = shown[key, stage]
        figures = [_cell(system, by_system.get(system, UNKNOWN)) for system in used]
        lines.append([names[key], stage, *figures])
    return Table(["task", "stage", *used], lines)


def _cell(system: str, text: str) -> str:
    """A cell, marked where it is this run's."""
    return Own(text) if system == "this run" else text


# ---- other measurements --------------------------------------------------------------------------


def core_section(run: RunRecord) -> Section:
    """The tasks that CORE is made of."""
    by_stage = {}
    for stage, record in run.records.items():
        tasks = (record.get("core") or {}).get("tasks")
        if tasks:
            by_stage[stage] = tasks

    # every task that any stage was asked, with an entry of its
    labels = {}
    for tasks in by_stage.values():
        labels |= tasks

    # a row for each task, by the first stage's baseline
    rows = []
    for label, entry in labels.items():
        cells = []
        for tasks in by_stage.values():
            measured = tasks.get(label, {})
            cells.append(words.with_error(measured.get("accuracy"), measured.get("stderr"), 100))
        rows.append([label, *cells, percent(entry.get("baseline")), value(entry.get("n"))])
    table = Table(["task", *by_stage, "random", "items"], rows)
    return make_section("CORE, task by task", table)


def harness_table(run: RunRecord) -> Table:
    """Metrics of lm-evaluation-harness as it names them, "acc,none" and so on."""
    rows = []
    for stage, record in run.harness.items():
        samples_of = record.get("n-samples", {})
        for task, metrics in record.get("results", {}).items():
            items = value(samples_of.get(task, {}).get("effective"))
            for name, figure in metrics.items():
                # "acc,none" and its error "acc_stderr,none", which may be "N/A"
                metric, _, by = name.partition(",")
                if not isinstance(figure, float) or metric.endswith("_stderr"):
                    continue
                error = metrics.get(f"{metric}_stderr,{by}")
                if not isinstance(error, float):
                    error = None
                text = words.with_error(figure, error, spec=".4f")
                rows.append([task, stage, metric, text, items])
    return Table(["task", "stage", "metric", "value", "items"], rows)


def bits_section(run: RunRecord) -> Section:
    """The headline bits per byte, by kind of text, and why other figures of the run differ."""
    meaning = (
        "How many bits a byte of unseen text costs, ± standard error: lower is better, whatever "
        "the vocabulary."
    )
    return make_section(
        "Bits per byte",
        bits_table(run),
        Text(meaning if text_bits(run) else ""),
        Text(other_bits(run)),
    )


def bits_table(run: RunRecord) -> Table:
    """By text and kind, a column for each stage; and what file compressors need."""
    # a column for every stage that was measured on any text
    by_source = text_bits(run)
    measured_stages = set().union(*by_source.values())
    stages = [stage for stage in STAGES if stage in measured_stages]

    # a row for each text, and one for each of its kinds
    rows = []
    for source, by_stage in by_source.items():
        measured = [by_stage.get(stage, {}) for stage in stages]
        rows.append([source, "all", *map(words.bits, measured), _size(measured)])
        rows += _kind_rows(measured)

    # what file compressors need for the very same bytes
    for key, label in (("gzip_bpb", "gzip -9"), ("xz_bpb", "xz -9")):
        packed = run.results.get(key)
        if rows and packed:
            rest = [""] * (len(stages) - 1)
            size = value(run.results.get("val_bytes"))
            rows.append([measured_source(run), label, f"{packed:.4f}", *rest, size])
    return Table(["text", "kind", *stages, "bytes"], rows)


def _kind_rows(measured: list[dict]) -> list[list[str]]:
    """Rows of the kinds of one text, where it has several."""
    kinds = {}
    for entry in measured:
        kinds |= entry.get("kinds", {})
    if len(kinds) < 2:
        return []
    rows = []
    for kind in kinds:
        cells = [entry.get("kinds", {}).get(kind, {}) for entry in measured]
        rows.append(["", kind, *map(words.bits, cells), _size(cells)])
    return rows


def _size(measured: list[dict]) -> str:
    """Bytes of a text: the first stage's that has counted them."""
    for entry in measured:
        if entry.get("bytes"):
            return value(entry["bytes"])
    return UNKNOWN


def other_bits(run: RunRecord) -> str:
    """Why the curve of training and results.json say something else than the table; "" if not."""
    headline = [m for by_stage in text_bits(run).values() for m in by_stage.values()]
    if not run.records or not headline:
        return ""

    # other figures of the same model
    _, curve = column(run.curves.get("base", []), "val_bpb")
    others = []
    if curve and words.is_finite(curve[-1]):
        others.append(f"{curve[-1]:.4f} at the end of training")
    in_results = run.results.get("val_bpb")
    if in_results is not None and in_results != headline[0].get("bpb"):
        others.append(f"{in_results:.4f} in results.json")
    if not others:
        return ""
    these = " and ".join(others)
    return (
        "The first line is this model's figure: it reads each document from its own beginning. "
        f"{these} come from rows that hold pieces of several documents, while "
        "training on less text: close to it, and not to be set beside it."
    )


def training_sections(run: RunRecord) -> list[Section]:
    """The curves of each stage."""
    parts = []
    for stage, rows in run.curves.items():
        drawn = Charts(stage, charts.curves(rows, stage))
        parts.append(make_section(f"Training: {stage}", drawn))
    return parts


# ---- plan and outcome ----------------------------------------------------------------------------


def plan_table(run: RunRecord) -> Table:
    """What was planned beside what came out, of whatever is recorded."""
    rows = [
        _steps_row(run),
        _tokens_row(run),
        *_time_rows(run),
        _memory_row(run),
        _cost_row(run),
    ]
    # what is on neither side has nothing to say
    known = []
    for what, planned, outcome in rows:
        if planned or outcome:
            known.append([what, planned or "not planned", outcome or "not recorded"])
    return Table(["what", "planned", "came out"], known)


def _count(x) -> str | None:
    """A whole number for a row; None for one that was not recorded."""
    return f"{x:,}" if x else None


def _steps_row(run: RunRecord) -> tuple:
    """(what, planned, came out), as in all rows of the plan; None for what is not known."""
    done, asked = steps_done(run)
    if not run.curves:
        return "steps", None, None
    return "steps", _count(asked), _count(done)


def _tokens_row(run: RunRecord) -> tuple:
    done, asked = steps_done(run)
    batch = run.config.get("total_batch_size", 0)
    planned = run.results.get("plan", {}).get("tokens") or asked * batch
    return "tokens", _count(planned), _count(done * batch)


def _hours(run: RunRecord) -> dict[str, float]:
    """{stage: hours of its steps}."""
    hours = {}
    for stage, rows in run.curves.items():
        _, seconds = column(rows, "step_time")
        hours[stage] = sum(filter(words.is_finite, seconds)) / 3600
    return hours


def _time_rows(run: RunRecord) -> list[tuple]:
    """Only pretraining is planned; it has a row even if nothing was trained."""
    rows = []
    planned = run.results.get("plan", {}).get("hours")
    hours = {"base": 0.0} | _hours(run)
    for stage, spent in hours.items():
        what, plan = f"time of {stage}", None
        if stage == "base":
            what = "time of training steps"
            plan = duration(planned * 3600) if planned else None
        outcome = duration(spent * 3600) if spent else None
        rows.append((what, plan, outcome))
    return rows


def _memory_row(run: RunRecord) -> tuple:
    planned = run.results.get("plan", {}).get("memory_bytes")
    used = run.results.get("step_memory_bytes")
    texts = [None if size is None else gigabytes(size) for size in (planned, used)]
    return "memory of a step", *texts


def _cost_row(run: RunRecord) -> tuple:
    plan = run.results.get("plan", {})
    rate = plan.get("price_per_hour", run.results.get("price_per_hour"))

    # what was spent follows from the time where nobody has written it down
    hours = _hours(run).get("base", 0)
    cost = run.results.get("cost")
    if cost is None and rate and hours:
        cost = hours * rate
    return "cost of training", _dollars(plan.get("cost")), _dollars(cost)


def _dollars(money: float | None) -> str | None:
    return None if money is None else f"${money:.2f}"


# ---- samples -------------------------------------------------------------------------------------


def samples(run: RunRecord) -> list[Sample]:
    """What each stage wrote: its calls of tools too, where they were kept."""
    # what 02 or 04 wrote, unless the record of the stage has samples
    shown = []
    if not run.records.get("base", {}).get("samples"):
        for text in (run.results.get("samples") or [])[:MOST_SAMPLES]:
            shown.append(Sample("base", [SamplePart("text", str(text))]))

    # what was written when the stages were examined
    for stage, record in run.records.items():
        for entry in record.get("samples", [])[:MOST_SAMPLES]:
            shown.append(Sample(stage, _pieces(stage, entry)))
    return shown


def _pieces(stage: str, entry: dict) -> list[SamplePart]:
    """The prompt and what follows: an answer of a chat stands on a line of its own."""
    pieces = []
    prompt = entry.get("prompt", "")
    if prompt:
        pieces.append(SamplePart("prompt", prompt))
        if stage != "base":
            pieces.append(SamplePart("text", "\n"))

    # of old records only the text is left
    parts = entry.get("parts")
    if not isinstance(parts, list):
        pieces.append(SamplePart("text", entry.get("text", "")))
        return pieces

    # calls in brackets, with what the tool answered
    for part in parts:
        text = part.get("text", "")
        if part.get("type") == "python":
            pieces.append(SamplePart("call", f" [{text}"))
        elif part.get("type") == "python_output":
            pieces.append(SamplePart("answer", f" = {text}] "))
        else:
            pieces.append(SamplePart("text", f"{text}"))
    return pieces


# ---- how and with what ---------------------------------------------------------------------------


def measurement_table(run: RunRecord) -> Table:
    """On how many items, for how long, with what overlap each task was measured."""
    rows = []
    for stage, record in run.records.items():
        for name, entry in record.get("tasks", {}).items():
            seconds, speed = entry.get("seconds"), entry.get("per_second")
            row = [
                stage,
                name,
                value(entry.get("n")),
                value(entry.get("limit")),
                value(entry.get("seed", record.get("seed"))),
                UNKNOWN if seconds is None else duration(seconds),
                UNKNOWN if speed is None else words.short(speed),
                value(entry.get("truncated")),
                _overlap(entry.get("contamination")),
            ]
            rows.append(row)
    heads = ["stage", "task", "items", "limit", "seed", "time", "items/s", "cut prompts"]
    return Table([*heads, "seen in training"], rows)


def _overlap(contamination: dict | None) -> str:
    """How many items share a long piece of text with what was trained on."""
    if not contamination:
        return UNKNOWN
    text = f"{contamination['overlapping']} of {contamination['n']}"
    if contamination.get("short"):
        text += f" ({contamination['short']} too short to tell)"
    return text


def not_measured(run: RunRecord) -> list[str]:
    """What is missing, and why."""
    stages_of = {}
    for stage, record in run.records.items():
        for task, why in record.get("skipped", {}).items():
            stages_of.setdefault((task, why), []).append(stage)

    # each reason once
    sentences = list(run.notes)
    for (task, why), stages in stages_of.items():
        sentences.append(f"{task} ({', '.join(stages)}): {why}")
    return sentences


# settings of a model and a training that a reader looks for, in their own words
LABELS = {
    "n_layer": "layers",
    "n_embd": "width",
    "n_head": "query heads",
    "n_kv_head": "key/value heads",
    "head_dim": "head width",
    "mlp": "mlp",
    "mlp_dim": "mlp width",
    "vocab_size": "vocabulary",
    "sequence_len": "tokens in a row",
    "window_pattern": "attention windows",
    "total_batch_size": "tokens in a step",
    "microbatch": "rows at once",
    "num_steps": "steps planned",
    "optimizer": "optimizer",
    "matrix_lr": "rate of matrices",
    "embedding_lr": "rate of embeddings",
    "attention": "attention by",
    "remat": "recomputed in backward",
    "seed": "seed",
}
RESULT_LABELS = {
    "preset": "preset",
    "source": "trained on",
    "params": "parameters",
    "bytes_per_token": "bytes per token",
    "devices": "devices",
    "sharding": "shared by",
    "computed_in": "steps computed in",
    "compile_seconds": "seconds to compile",
}


def configuration_section(run: RunRecord) -> Section:
    """What a reader looks for by its label, then all other settings by the names they go by."""
    # of the training, then of the model
    pairs = []
    for key, label in RESULT_LABELS.items():
        if run.results.get(key) is not None:
            pairs.append((label, value(run.results[key])))
    if "vocab_size" in run.results and "vocab_size" not in run.config:
        pairs.append(("vocabulary", f"{run.results['vocab_size']:,}"))
    for key, label in LABELS.items():
        if key in run.config:
            pairs.append((label, value(run.config[key])))
    blocks: list[Block] = [Pairs(pairs)]

    # the rest
    others = [(key, value(x)) for key, x in run.config.items() if key not in LABELS]
    if others:
        blocks.append(Heading("Other settings, by the names that overrides take"))
        blocks.append(Pairs(others))
    return make_section("Configuration", *blocks)


def environment(run: RunRecord) -> list[tuple[str, str]]:
    """Which machine, versions and checkpoints the figures come from."""
    results = run.results
    pairs = [
        ("trained on", results.get("device")),
        ("trained with jax", results.get("jax")),
        ("trained with python", results.get("python")),
        ("trained from commit", results.get("commit")),
    ]
    for stage, record in run.records.items():
        pairs.append((f"{stage} measured", _measured_with(record)))

    # and this page itself
    now = datetime.datetime.now(datetime.UTC)
    written = f"{now:%Y-%m-%d %H:%M} UTC, python {platform.python_version()}, jax {jax.__version__}"
    commit = commit_id()
    if commit:
        written += f", commit {commit}"
    pairs.append(("report written", written))
    return [(name, str(text)) for name, text in pairs if text]


def _measured_with(record: dict) -> str:
    """Which checkpoint was measured, where, with what seed and when."""
    parts = [
        record.get("checkpoint"),
        record.get("device"),
        f"jax {record['jax']}" if "jax" in record else None,
        f"seed {record['seed']}" if "seed" in record else None,
        record.get("time"),
    ]
    return ", ".join(str(part) for part in parts if part)


def commit_id() -> str:
    """The commit of this code, "-dirty" behind it if changed since; "" without git."""
    if not shutil.which("git"):
        return ""
    describe = ["describe", "--always", "--dirty", "--exclude", "*"]
    asked = subprocess.run(
        ["git", "-C", Path(__file__).parent, *describe], capture_output=True, text=True
    )
    return asked.stdout.strip() if asked.returncode == 0 else ""


# ---- for the log ---------------------------------------------------------------------------------


def log_entry(run: RunRecord, compared: list[tuple[tuple[str, str], dict[str, Comparison]]]) -> str:
    """What belongs into a LOG: date, setting, outcome, the scores."""
    from lib.report.markdown import table_lines

    lines = [f"## {_last_day(run)} · Run {run.name}", "", verdict(run)]
    setting = _setting(run)
    if setting:
        lines += ["", "; ".join(setting) + "."]
    for table in (bits_table(run), scores_table(run)):
        if table.rows:
            lines += ["", *table_lines(table)]

    # what got better or worse from stage to stage
    for (before, after), comparisons in compared:
        real = [c.sentence for c in comparisons.values() if c.real]
        count = f"{len(real)} of {len(comparisons)} differences are real."
        lines += ["", f"From {before} to {after}, {count}"]
        lines += [f"- {sentence}" for sentence in real]
    return "\n".join(lines)


def _setting(run: RunRecord) -> list[str]:
    """The model, the preset and the machine in a few words."""
    config, results, parts = run.config, run.results, []
    if "n_layer" in config:
        shape = f"{config['n_layer']} layers × {config['n_embd']}"
        parts.append(f"{shape}, vocabulary {config['vocab_size']:,}, {config['optimizer']}")
    if "preset" in results:
        parts.append(str(results["preset"]))
    if "device" in results and "jax" in results:
        parts.append(f"{results['device']}, jax {results['jax']}")
    return parts


def _last_day(run: RunRecord) -> str:
    """The day on which something was measured or trained last."""
    # of a record, and of the last step of a training
    days = [record["time"][:10] for record in run.records.values() if record.get("time")]
    for rows in run.curves.values():
        if rows and "time" in rows[-1]:
            last = rows[-1]["time"]
            end = datetime.datetime.fromtimestamp(last, datetime.UTC)
            days.append(f"{end:%Y-%m-%d}")
    return max(days, default="undated")
