"""`python -m lib.preflight`: its options, its answers, and that Ctrl-C ends it at once."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from lib.chips import V6E
from lib.config import Config
from lib.files import UserError
from lib.preflight import __main__ as command
from lib.preflight.cache import has_libtpu
from lib.preflight.compile import tpu_devices
from tests.helpers import ROOT


def ask(*arguments):
    command.main(command.parse([*arguments]))


def test_help_is_grouped_and_explained(capsys):
    with pytest.raises(SystemExit) as e:
        command.parse(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    for title in ("Which model", "On what", "What to ask", "Time and money"):
        assert title in text
    assert "python -m lib.preflight" in text and "--depth INT" in text and "Layers;" in text


def test_without_libtpu_an_estimate_answers_and_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    ask("--depth", "4")
    text = capsys.readouterr().out
    assert "nothing was compiled" in text
    assert "cost        $" in text and "check the price" in text
    with pytest.raises(UserError, match="libtpu, which is not installed"):
        tpu_devices("v6e:1x1")


@pytest.mark.parametrize("name", ["v9-1", "v6e-3", "h100", "v9:1x1", ""])
def test_an_unknown_chip_is_one_sentence_with_the_names(name):
    with pytest.raises(UserError, match="v6e") as e:
        ask("--depth", "4", "--chip", name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "say which model"),
        (["--depth", "2", "--preset", "gpu"], "say which model"),
        (["--depth", "2", "--mesh", "data:2"], "data=2"),
        (["--depth", "2", "--chip", "v6e-4", "--strategy", "dpp"], "unknown sharding strategy"),
        (["--run", "none-such"], "no config"),
        (["--depth", "2", "--overrides", "microbtach=2"], "unknown config field"),
        (["--depth", "2", "--mfu", "0"], "mfu is a share"),
        (["--depth", "2", "--mfu", "nan"], "mfu is a share"),
        (["--depth", "2", "--price", "nan"], "price must be"),
        (["--depth", "2", "--price", "-1"], "price must be"),
        (["--depth", "2", "--search", "--map", "map.nosuch"], "cannot draw map.nosuch"),
        (["--depth", "2", "--dashboard"], "ask for it alone"),
        (["--depth", "2", "--map", "map.png"], "add --search"),
        (["--depth", "2", "--to", "x.yaml"], "add one of them"),
        (["--depth", "2", "--int8"], "add --decode"),
        (["--depth", "2", "--decode", "1"], "leave one out"),
        (["--depth", "2", "--decode", "-1"], "1 or more"),
        (["--table", "--json"], "leave --json out"),
        (["--table", "--chip", "v6e-8"], "chips of its own"),
        (["--rl", "--table", "--depth", "3"], "models and chips of its own"),
        (["--rl", "--depth", "3", "--search"], "--search is of a training"),
        (["--published", "--launch"], "--launch is of a training"),
        # as training says it
        (["--depth", "20", "--chip", "h100-8", "--strategy", "zero"], "use microbatch=8"),
        (["--depth", "20", "--mesh", "data=4"], "needs 4 devices, and there are 1"),
        (["--depth", "20", "--chip", "v6e-8", "--mesh", "data=0"], "needs 0 devices"),
        (["--depth", "20", "--chip", "h100-8", "--strategy", "tp"], "must divide n_kv_head=10"),
        # nobody rents what is too small
        (["--depth", "32", "--chip", "v6e-1", "--launch"], "does not fit on v6e-1"),
    ],
)
def test_bad_questions(arguments, message):
    with pytest.raises(UserError, match=message):
        ask("--estimate", *arguments)


def test_json(capsys):
    question = ["--depth", "4", "--chip", "v5p-8", "--strategy", "fsdp"]
    ask(*question, "--estimate", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["chips"] == 4 and answer["plan"]["cost"] > 0
    assert math.isfinite(answer["mfu"]) and answer["bound"]["step"]["seconds"] > 0


def test_a_search_is_part_of_one_answer(tmp_path, capsys):
    ask(
        *["--depth", "4", "--chip", "v6e-1", "--estimate", "--search", "--json"],
        *["--map", str(tmp_path / "map.png")],
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["search"]["best"] and answer["plan"]["steps"] > 0 and answer["fits"]
    assert (tmp_path / "map.png").exists()


@pytest.mark.parametrize("chip, needs", [("h100-1", "for one TPU chip"), ("v6e-1", "pip install")])
def test_a_decode_step_that_cannot_be_compiled_is_refused(chip, needs, monkeypatch):
    monkeypatch.setattr("lib.preflight.cache.has_libtpu", lambda: False)
    with pytest.raises(UserError, match=needs):
        ask("--depth", "4", "--chip", chip, "--decode", "1")


def test_a_t4_is_planned_in_what_it_computes(tmp_path, capsys):
    """An hour at 40 %, as its preset means it; and a file that was measured so is taken."""
    ask("--preset", "colab_free_t4", "--chip", "t4-1", "--estimate", "--json")
    answer = json.loads(capsys.readouterr().out)
    config = Config.preset("colab_free_t4")
    flops = config.flops_per_token * config.num_steps * config.total_batch_size
    assert answer["plan"]["hours"] == pytest.approx(flops / 0.4 / 8.1e12 / 3600)
    assert 0.3 < answer["plan"]["hours"] < 1

    path = tmp_path / "Tesla_T4.json"
    path.write_text(
        json.dumps(dict(device="Tesla T4", flops=4e12, bandwidth=2e11, dtype="float32"))
    )
    ask("--depth", "4", "--chip", "t4-1", "--estimate", "--calibrate", str(path))
    assert "4 TFLOP/s, 200 GB/s measured" in capsys.readouterr().out


def test_a_published_measurement_stays_below_its_bound(capsys):
    ask("--published", "--estimate")
    line = capsys.readouterr().out.splitlines()[-1]
    share = float(line.partition("measured: ")[2].partition("%")[0])
    assert "477,000 tokens/s" in line and 30 < share < 100

    # by other settings it has another bound, but it is of no other shape or chip
    ask("--published", "--estimate", "--overrides", "microbatch=1")
    assert capsys.readouterr().out.splitlines()[-1] != line
    for other in (["--depth", "4"], ["--preset", "gpu"], ["--chip", "v5e-1"]):
        with pytest.raises(UserError, match="one shape on one chip"):
            ask("--published", "--estimate", *other)


def test_measured_ceilings_take_the_place_of_the_data_sheets(tmp_path, capsys):
    """At half of both, twice the time; MFU is of the data sheet all the same."""
    path = tmp_path / "chip.json"
    half = dict(device="TPU v6 lite", flops=V6E.flops / 2, bandwidth=V6E.bandwidth / 2)
    path.write_text(json.dumps(half))
    question = ["--depth", "4", "--estimate", "--json"]
    ask(*question)
    sheet = json.loads(capsys.readouterr().out)
    ask(*question, "--calibrate", str(path))
    measured = json.loads(capsys.readouterr().out)
    for name, bound in sheet["bound"].items():
        assert measured["bound"][name]["seconds"] == pytest.approx(2 * bound["seconds"], rel=1e-6)
    assert measured["mfu"] == pytest.approx(sheet["mfu"] / 2)
    assert "459 TFLOP/s, 800 GB/s measured" in measured["source"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(device="TPU v5 lite", flops=1.0, bandwidth=1.0), "measured on TPU v5 lite, not on"),
        (
            dict(device="TPU v6 lite", flops=1.0, bandwidth=1.0, dtype="float32"),
            "measured in float32, .*compute_dtype=bfloat16",
        ),
        (
            dict(device="TPU v6 lite", flops=1.0, bandwidth=1.0, dtype="mixed"),
            "measured in mixed, .*compute_dtype=bfloat16",
        ),
        (dict(device="TPU v6 lite", flops=1.0), "was not written by 06_speed"),
        (dict(device="TPU v6 lite", flops="1", bandwidth=1.0), "was not written by 06_speed"),
        (dict(device=None, flops=1.0, bandwidth=1.0), "was not written by 06_speed"),
    ],
)
def test_a_file_of_another_chip_is_refused(tmp_path, fields, message):
    path = tmp_path / "chip.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        ask("--depth", "4", "--estimate", "--calibrate", str(path))


@pytest.mark.tpu
@pytest.mark.skipif(not has_libtpu(), reason="compiling needs libtpu")
def test_ctrl_c_ends_it_at_once_even_while_libtpu_compiles(tmp_path):
    # a step that takes minutes to compile, asked for the first time
    overrides = f"num_steps={time.time_ns() % 10**9 + 10}"
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.preflight", "--depth", "20", "--overrides", overrides],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # compilation begins when XLA's dump appears in the folder of temporary files
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("preflight-*/tmp*/*")) and time.monotonic() < limit:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(0.5)

    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 5
    assert process.returncode == 130 and out == ""
    assert err.strip() == "stopped: nothing of this answer is kept"
    assert list(tmp_path.glob("preflight-*")) == []
