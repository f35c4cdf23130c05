"""README and docs say what is there: their commands parse, and their links lead somewhere."""

import re
import shlex

import pytest

from lib import teach
from lib.config import Config
from lib.evals import questions
from lib.notebook import parameters, parse_overrides
from lib.tasks import tasks
from lib.train.finetune import parse_mixture
from tests.helpers import ROOT, programs

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "launch" / "README.md",
]


def commands() -> list[str]:
    """Every line of the shell blocks, without its comment."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
            lines = [shlex.join(shlex.split(line, comments=True)) for line in block.splitlines()]
            found += [line for line in lines if line]
    return list(dict.fromkeys(found))


def with_python(start: str) -> list[str]:
    return [line for line in commands() if line.startswith(f"python {start}")]


def options(line: str) -> dict[str, str]:
    """{name: value} of a command's flags."""
    words = shlex.split(line)
    flags = [i for i, word in enumerate(words) if word.startswith("--")]
    return {words[i].removeprefix("--"): words[i + 1] for i in flags}


@pytest.mark.parametrize("line", with_python("0"))
def test_commands_of_notebooks_have_these_flags(line):
    script, given = shlex.split(line)[1], options(line)
    known = {p.name.replace("_", "-") for p in parameters((ROOT / script).read_text())}
    assert given.keys() <= known
    if "overrides" in given:
        parse_overrides(given["overrides"], Config)
    for name in ("mid", "sft-mixture"):
        if name in given:
            parse_mixture(given[name])


def test_tasks_that_are_named_can_be_asked(tmp_path, monkeypatch):
    """With a file of one's own, as docs/own-data.md shows one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_questions.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    named = [options(line)["tasks"] for line in with_python("04") if "tasks" in options(line)]
    assert named
    for words in named:
        assert questions.find(teach.task_names(words, []), tasks())


@pytest.fixture(scope="module")
def helps():
    """{command: how it ends when it is asked for help}, of the rooms' commands."""
    lines = with_python("-m")
    runs = []
    for line in lines:
        _, _, *words = shlex.split(line)
        # what stands before the first flag: the room, and maybe what it is to do
        first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        runs.append([*words[:first], "--help"])
    return dict(zip(lines, programs.run_scripts(*runs, cwd=ROOT)))


@pytest.mark.slow
@pytest.mark.parametrize("line", with_python("-m"))
def test_commands_of_rooms_have_these_flags(line, helps):
    done = helps[line]
    assert done.returncode == 0, done.stderr
    for name in options(line):
        assert re.search(rf"--{name}\b", done.stdout), name


def test_scripts_that_are_named_are_there():
    scripts = [shlex.split(line)[1] for line in commands() if line.startswith("bash ")]
    assert scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("0*.py")), ids=lambda path: path.stem)
def test_links_of_notebooks_lead_somewhere(notebook):
    for target in re.findall(r"\]\(([^)#\s]+)\)", notebook.read_text()):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_addresses_of_code_in_the_map_are_right():
    """`lib/…` and `tests/…` in README, CONTRIBUTING and docs."""
    addresses = []
    for page in PAGES:
        for path in re.findall(r"`((?:lib|tests|benchmarks)/[\w/.]*)`", page.read_text()):
            addresses.append((page.name, path))
    assert len(addresses) > 20
    for page, path in addresses:
        assert (ROOT / path).exists(), f"{page}: {path}"
