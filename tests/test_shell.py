"""The shell scripts, with a stand-in for Python that notes what it is asked to do:

nothing is installed or trained.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["setup.sh", "speedrun.sh", "run_tests.sh", "update_notebooks.sh", ".ci/run"]
# answers like a good Python 3.12, notes its arguments, and fails when the file named FAIL says so
# for its first word
FAKE_PYTHON = """#!/bin/bash
echo "$*" >> "$HOME/calls"
case "$*" in
    --version) echo "Python 3.12.1" ;;
    *pick_preset*) echo "cpu_demo 4096 because" ;;
    "-m venv .venv") mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
if [ -e "$HOME/FAIL" ] && [[ "$*" == *"$(head -n 1 "$HOME/FAIL")"* ]]; then
    tail -n +2 "$HOME/FAIL"
    exit 1
fi
"""


@pytest.fixture
def house(tmp_path):
    """A copy of the scripts, with only the stand-in Python and the plainest tools on the path."""
    for name in SCRIPTS[:-1] + ["pyproject.toml"]:
        shutil.copy(ROOT / name, tmp_path)
    bin = tmp_path / "bin"
    bin.mkdir()
    for tool in "bash cat cksum cp date dirname getconf grep head mkdir mv rm tail tr".split():
        (bin / tool).symlink_to(shutil.which(tool))
    (bin / "python3").write_text(FAKE_PYTHON)
    (bin / "python3").chmod(0o755)
    return tmp_path


def run(house, script, *args):
    done = subprocess.run(
        ["bash", house / script, *args],
        cwd=house,
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": str(house / "bin"), "HOME": str(house)},
    )
    done.calls = (house / "calls").read_text().splitlines() if (house / "calls").exists() else []
    (house / "calls").unlink(missing_ok=True)
    return done


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


@pytest.mark.parametrize(
    "script, says",
    [
        (
            "speedrun.sh",
            ["--preset", "--source", "--run", "--fresh", "--continue", "cpu_demo", "stdlib"],
        ),
        ("run_tests.sh", ["--setup-only", "pytest"]),
    ],
)
def test_help_does_nothing_else(house, script, says):
    done = run(house, script, "--help")
    assert done.returncode == 0 and done.calls == []
    assert all(word in done.stdout.lower() for word in says)


def test_speedrun_help_lists_every_preset_and_source():
    from lib.config import PRESETS
    from lib.data import SOURCES

    text = (ROOT / "speedrun.sh").read_text()
    assert [name for name in [*PRESETS, *SOURCES] if name not in text] == []


@pytest.mark.parametrize(
    "args, says",
    [
        (["--frsh"], "unknown argument --frsh"),
        (["02"], "unknown argument 02"),
        (["--run"], "--run needs a value"),
        (["--run", "../x"], "cannot name a folder"),
        (["--run", "-x"], "cannot name a folder"),
        (["--run", ""], "cannot name a folder"),
        (["--fresh", "--continue"], "exclude each other"),
    ],
)
def test_speedrun_refuses_bad_arguments_before_it_does_anything(house, args, says):
    done = run(house, "speedrun.sh", *args)
    assert done.returncode == 2 and done.calls == []
    assert (
        done.stderr.startswith("error: ") and says in done.stderr and not (house / ".venv").exists()
    )


def test_speedrun_sets_up_and_runs_the_three_notebooks(house):
    done = run(house, "speedrun.sh", "--run", "a", "--source=x y", "--", "--num-steps", "5")
    assert done.returncode == 0, done.stderr
    assert "device: " in done.stdout and "preset: cpu_demo (because)" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("files: runs/a    total time: ")
    assert [c for c in done.calls if c.startswith("0")] == [
        "01_tokenizer.py --run a --source x y --vocab-size 4096",
        "02_train.py --run a --source x y --preset cpu_demo --num-steps 5",
        "04_eval_chat.py --run a",
    ]
    assert any("-m pip install" in c and " -e ." in c for c in done.calls)

    again = run(house, "speedrun.sh")
    assert "set-up: .venv is up to date" in again.stdout and not any(
        "install" in c for c in again.calls
    )


def test_speedrun_fresh_keeps_the_old_run_beside(house):
    (house / "runs" / "speedrun").mkdir(parents=True)
    assert "run: continuing runs/speedrun" in run(house, "speedrun.sh").stdout
    for n in (1, 2):
        (house / "runs" / "speedrun").mkdir(exist_ok=True)
        assert f"is now runs/speedrun.old-{n}" in run(house, "speedrun.sh", "--fresh").stdout
        assert (house / "runs" / f"speedrun.old-{n}").is_dir() and not (
            house / "runs" / "speedrun"
        ).exists()


def test_speedrun_fresh_leaves_a_run_alone_that_still_trains(house):
    (house / "runs" / "speedrun").mkdir(parents=True)
    (house / "FAIL").write_text("check_free\nError: runs/speedrun is being written by process 7\n")
    done = run(house, "speedrun.sh", "--fresh")
    assert done.returncode == 2 and "is being written by process 7" in done.stdout
    assert [path.name for path in (house / "runs").iterdir()] == ["speedrun"]
    assert any(c.endswith("runs/speedrun") for c in done.calls if "check_free" in c)


@pytest.mark.parametrize("count", [0, 1, 8])
def test_gpus_are_counted_however_slowly_they_are_listed(house, count):
    tool = house / "bin" / "nvidia-smi"
    tool.write_text(
        f'#!/bin/bash\nfor i in $(seq {count}); do echo "GPU $i: one" || exit 1; sleep 0.02; done\n'
    )
    tool.chmod(0o755)
    for name in ("seq", "sleep"):
        (house / "bin" / name).symlink_to(shutil.which(name))
    said = run(house, "speedrun.sh").stdout
    if count:
        assert f"device: gpu (nvidia-smi lists {count} of them)" in said
    else:
        assert "device: cpu" in said


def test_speedrun_stops_where_a_notebook_fails(house):
    (house / "FAIL").write_text("02_train.py\nError: no data\n")
    done = run(house, "speedrun.sh")
    assert done.returncode == 1 and "Error: no data" in done.stdout
    assert "02_train.py stopped" in done.stderr and "--fresh" in done.stderr
    assert not any(c.startswith("04") for c in done.calls)


def test_setup_without_a_network(house):
    (house / "FAIL").write_text(
        "pip install\nTemporary failure in name resolution\nERROR: No matching distribution\n"
    )
    done = run(house, "run_tests.sh", "--setup-only")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the package index cannot be reached")
    (house / "FAIL").unlink()  # back online: the next run takes it up
    done = run(house, "run_tests.sh", "--setup-only")
    assert done.returncode == 0 and any("-e .[dev" in c for c in done.calls)


def test_setup_with_another_pip_failure_points_to_the_log(house):
    (house / "FAIL").write_text("pip install\nERROR: No space left on device\n")
    done = run(house, "run_tests.sh", "--setup-only")
    assert (
        done.returncode == 1
        and "No space left" in done.stderr
        and ".venv/install.log has all of it" in done.stderr
    )


def test_setup_without_python(house):
    (house / "bin" / "python3").write_text("#!/bin/bash\nexit 127\n")  # a version manager's shim
    done = run(house, "run_tests.sh", "--setup-only")
    assert done.returncode == 1 and done.stderr.startswith(
        "error: no working Python 3.11, 3.12 or 3.13"
    )


def test_setup_mends_a_half_made_environment(house):
    (house / ".venv" / "bin").mkdir(parents=True)
    (house / ".venv" / "bin" / "python").symlink_to(house / "gone")
    done = run(house, "run_tests.sh", "--setup-only")
    assert (
        done.returncode == 0
        and "making .venv again" in done.stdout
        and "-m venv .venv" in done.calls
    )


def test_setup_installs_again_when_pyproject_changed(house):
    run(house, "run_tests.sh", "--setup-only")
    with open(house / "pyproject.toml", "a") as f:
        f.write("# changed\n")
    assert any("install" in c for c in run(house, "run_tests.sh", "--setup-only").calls)


def test_setup_installs_again_when_pyproject_changed_back(house):
    """Extras add up, but what an earlier pyproject.toml asked for is gone by then."""
    project = house / "pyproject.toml"
    first = project.read_text()
    run(house, "run_tests.sh", "--setup-only")
    assert any("install" in c for c in run(house, "speedrun.sh").calls)
    for text in (first + "# changed\n", first):
        project.write_text(text)
        assert any("install" in c for c in run(house, "run_tests.sh", "--setup-only").calls)
        assert not any("install" in c for c in run(house, "run_tests.sh", "--setup-only").calls)


def test_update_notebooks_refuses_unknown_arguments():
    done = subprocess.run(
        ["bash", ROOT / "update_notebooks.sh", "--chek"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "usage: bash update_notebooks.sh [--check]" in done.stderr
