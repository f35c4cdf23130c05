"""Files for SkyPilot: what they rent, what they train, what is refused; read by its own parser."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lib import chips
from lib.chips import rented
from lib.config import Config
from lib.files import UserError
from lib.preflight import __main__ as preflight
from lib.preflight import launch
from lib.preflight.plan import Payment, plan
from tests.helpers import ROOT

FILES = sorted((ROOT / "launch").glob("*.yaml"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


def command_of(path) -> list[str]:
    """The question that a file says it answers."""
    [line] = re.findall("^# Written by: (.*)$", path.read_text(), re.M)
    return shlex.split(line)[3:]


def flags_of(text: str, script: str) -> dict[str, str]:
    """The flags that a file's `run` gives to a script."""
    line = re.search(rf"python {script} (.*)", text.replace("\\\n", " "))[1]
    words = shlex.split(line)
    return dict(zip(words[::2], words[1::2]))


@each_file
def test_a_file_is_what_its_command_writes(path, tmp_path, monkeypatch, capsys):
    arguments = command_of(path)
    monkeypatch.setattr(sys, "argv", ["preflight", *arguments])
    monkeypatch.chdir(tmp_path)
    preflight.main(preflight.parse(arguments))
    assert (tmp_path / "launch" / path.name).read_text() == path.read_text()
    assert f"launch/{path.name}" in capsys.readouterr().out


@each_file
def test_a_file_trains_the_model_that_was_asked_about(path):
    asked = preflight.parse(command_of(path))
    flags = flags_of(path.read_text(), "02_train.py")
    made = launch.trained_by(int(flags["--depth"]), 32768, flags["--overrides"])
    assert made == preflight.choose_config(asked.which)
    assert flags["--strategy"] == asked.where.strategy


def test_any_config_is_written_out_whole():
    """Fields that the scaling rules derive from others, too."""
    for config in (
        Config.preset("colab_v6e"),
        Config.preset("llama_like", sequence_len=512),
        Config.from_heads(8, vocab_size=8192),
    ):
        made = launch.trained_by(config.n_layer, config.vocab_size, launch.overrides(config))
        assert made == config


def text_for(chip: str, pay="on-demand", begins=True) -> str:
    config, where = Config.from_depth(4), rented(chip)
    asked = launch.Launch(config, where, "zero", "", pay, "x", begins, "command")
    planned = plan(config, where.chip, where.chips, pay=Payment(pay))
    return launch.launch_text(asked, planned, Path("x.yaml"))


def test_the_price_stands_in_the_file():
    config, where = Config.from_depth(4), rented("v6e-8")
    cost = plan(config, where.chip, 8, pay=Payment("spot")).cost
    text = text_for("v6e-8", "spot")
    assert f"${cost:.2f}" in text and chips.PRICES_DATE in text
    assert yaml.safe_load(text)["resources"]["use_spot"] is True
    assert "price not known" in text_for("v4-8", "spot")
    assert yaml.safe_load(text_for("l4-1"))["resources"]["use_spot"] is False


@pytest.mark.parametrize(
    "chip, name",
    [
        ("v6e-8", "tpu-v6e-8"),
        ("v6e:4x4", "tpu-v6e-16"),
        ("v5e-16", "tpu-v5litepod-16"),
        ("v5p-8", "tpu-v5p-8"),
        ("v4-16", "tpu-v4-16"),
        ("h100-8", "H100:8"),
        ("a100-2", "A100-80GB:2"),
    ],
)
def test_what_is_rented(chip, name):
    assert yaml.safe_load(text_for(chip))["resources"]["accelerators"] == name


@pytest.mark.parametrize(
    "chip, reason",
    [
        ("v6e-9", "unknown chip 'v6e-9'"),
        ("mi300-8", "unknown chip 'mi300-8'"),
        ("tpu7x-8", "rents no tpu7x: choose one of v6e, v5e"),
        ("h100-pcie-8", "Google rents no h100-pcie"),
        ("h200-1", "no h200-1 in one machine: choose one of h200-8"),
        ("v6e:2x3", "no v6e of the shape 2x3 is rented"),
    ],
)
def test_a_chip_that_nobody_rents_is_refused(chip, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = preflight.parse(["--depth", "4", "--chip", chip, "--estimate", "--launch"])
    with pytest.raises(UserError, match=reason) as refused:
        preflight.main(asked)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, reason",
    [
        (["--depth", "4", "--pay", "colab"], "spot or on-demand, not colab"),
        (["--depth", "4", "--pay", "flex-start"], "spot or on-demand, not flex-start"),
        (["--depth", "4", "--rl"], "--launch is of a training"),
        (["--table"], "--launch is of a training"),
    ],
)
def test_what_no_file_can_say_is_refused(words, reason):
    with pytest.raises(UserError, match=reason):
        preflight.main(preflight.parse([*words, "--launch", "--estimate"]))


HOSTS = """
python() { printf '%s\\n' "$*"; }
"""


def run_block(text: str, **environment) -> list[list[str]]:
    """The commands that a file's `run` gives, by bash itself."""
    block = yaml.safe_load(text)["run"].replace(". .venv/bin/activate", HOSTS)
    done = subprocess.run(
        ["bash", "-c", block],
        env=os.environ | {"RAWCHAT_HOME": "gs://b/home", "RUN": "x"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


def test_several_hosts_meet_at_the_first():
    text = text_for("v6e-16")
    hosts = dict(SKYPILOT_NUM_NODES="4", SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8\n10.0.0.9\n10.0.0.4")
    first = run_block(text, **hosts, SKYPILOT_NODE_RANK="0")
    assert [words[0] for words in first] == ["01_tokenizer.py", "02_train.py"]
    [third] = run_block(text, **hosts, SKYPILOT_NODE_RANK="2")
    assert third[third.index("--coordinator") + 1] == "10.0.0.7:8476"
    assert third[third.index("--host-count") + 1] == "4"
    assert third[third.index("--host-index") + 1] == "2"
    # a folder that all of them share
    assert third[third.index("--checkpoints") + 1] == "gs://b/home/checkpoints/x"


def test_one_host_needs_no_coordinator():
    one = dict(SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_IPS="10.0.0.7", SKYPILOT_NODE_RANK="0")
    words = run_block(text_for("v6e-8"), **one)
    assert [line[0] for line in words] == ["01_tokenizer.py", "02_train.py"]
    assert "--coordinator" not in words[1]
    # a run that is there has its tokenizer
    [only] = run_block(text_for("v6e-8", begins=False), **one)
    assert only[0] == "02_train.py"


# ---- SkyPilot's own parser ----------------------------------------------------------------------

PARSE = """
import json, sys, yaml, sky
home = [("RAWCHAT_HOME", "gs://b/home")]
for path in sys.argv[1:]:
    config = yaml.safe_load(open(path))
    task = sky.Task.from_yaml_config(config, env_overrides=home)
    [one] = task.resources
    print("TASK" + json.dumps(dict(accelerators=one.accelerators, spot=one.use_spot,
          recovery=one.job_recovery, envs=task.envs, cloud=str(one.cloud))))
try:
    sky.Task.from_yaml_config(yaml.safe_load(open(path)))
except ValueError as error:
    print("REFUSED" + str(error))
"""


def skypilot() -> str:
    """A Python that has SkyPilot: RAWCHAT_SKYPILOT, or where `sky` is installed."""
    if named := os.environ.get("RAWCHAT_SKYPILOT"):
        return named
    sky = shutil.which("sky")
    python = Path(sky).resolve().with_name("python") if sky else None
    if python is None or not python.exists():
        pytest.skip(
            "no SkyPilot: make a venv of its own, pip install skypilot==0.14.1 there, and name its "
            "python in RAWCHAT_SKYPILOT"
        )
    return str(python)


@pytest.mark.slow
def test_skypilot_reads_them():
    done = subprocess.run(
        [skypilot(), "-c", PARSE, *FILES], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    tasks = [json.loads(line) for line in re.findall("^TASK(.*)$", done.stdout, re.M)]
    assert len(tasks) == len(FILES)
    for path, task in zip(FILES, tasks):
        written = yaml.safe_load(path.read_text())["resources"]
        name, _, count = written["accelerators"].partition(":")
        assert task["accelerators"] == {name: int(count or 1)}
        assert task["spot"] == written["use_spot"]
        assert task["recovery"]["strategy"] == "EAGER_NEXT_REGION"
        assert task["cloud"] == "GCP"
        assert task["envs"]["RAWCHAT_HOME"] == "gs://b/home"
    # nobody forgets where runs live
    assert "RAWCHAT_HOME" in re.findall("^REFUSED(.*)$", done.stdout, re.M)[0]
