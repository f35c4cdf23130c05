"""The wandb protocol, with our own client and with wandb's, against a stand-in for its server."""

import pytest

from lib.files import UserError
from lib.sweeps import drivers, journal, space
from lib.sweeps import server as server_module
from lib.sweeps.journal import Journal
from tests.helpers import programs
from tests.helpers.sweeps import sweep
from tests.helpers.wandb_server import StandIn


@pytest.fixture
def standin():
    server = StandIn()
    yield server
    server.shutdown()


def quiet_run(started):
    """start_run without wandb: keeps what it was told in `started`."""

    def start_run(id, assignment, stop):
        started.setdefault(id, []).append(
            kept := dict(assignment=assignment, rows=[], code=None, stop=stop)
        )
        return lambda step, values: kept["rows"].append((step, values)), lambda code: kept.update(
            code=code
        )

    return start_run


def test_a_sweep_goes_to_the_project_of_its_yaml_unless_told_otherwise(standin):
    server = server_module.SweepServer(standin.url, "key", pause=0.01)
    spec = space.check(sweep() | dict(project="theirs", entity="team"))

    def project(spec, owner=""):
        return server_module.create_sweep(server, spec, owner)[1]

    assert [project(spec), project(spec, "mine"), project(spec, "us/ours")] == [
        "theirs",
        "mine",
        "ours",
    ]
    assert project(sweep()) == server_module.PROJECT


def test_the_sweep_protocol(standin, tmp_path):
    """Created, joined by id, trials given out, one stopped, one given back and resumed, none
    trained twice, exit.
    """
    spec, started = sweep(), {}
    server = server_module.SweepServer(standin.url, "key", pause=0.01)
    path = server_module.create_sweep(server, spec, "proj")
    assert path == ("team", "proj", "swp1") and server_module.read_sweep(server, path) == spec
    journal.create(tmp_path, spec)
    worker = lambda book: drivers.Wandb(
        book, spec, server, path, quiet_run(started), say=lambda text: None, poll=0.01
    )
    with Journal(tmp_path) as book:
        boss = worker(book)
        [one] = boss.take()
        standin.failures = 2  # a hiccup of the server costs nothing
        assert (
            one.assignment == {"depth": 1, "seed": 1}
            and boss.report(one, 1, {"val_bpb": 2.0}) == ""
        )
        standin.stop.add(one.id)
        assert boss.report(one, 2, {"val_bpb": 3.0}) == "pruned"
        boss.end(one, "pruned", 3.0)
        [two] = boss.take()
        boss.end(two, "failed", reason="n_kv_head=3 does not divide n_head=4")
        [three] = boss.take()
        boss.end(three, "done", 1.25, steps=7)
        [four] = boss.take()  # and now this runtime vanishes
    with Journal(tmp_path) as book:
        boss = worker(book)
        [again] = boss.take()
        assert (again.id, again.assignment, again.tries) == (four.id, four.assignment, 2), (
            "the same run, at once, without asking"
        )
        boss.end(again, "done", 1.0)
        standin.requeued += [one.id, two.id, three.id]  # the server missed that they ended
        standin.given = 5
        [six] = boss.take()
        assert six.id == "run6" and started[three.id][-1]["code"] == 0, (
            "reported again, not trained again"
        )
        assert started[one.id][-1]["rows"] == [
            (1, {"val_bpb": 2.0}),
            (2, {"val_bpb": 3.0}),
            (None, {"pruned": True}),
        ]
        assert [started[t.id][-1]["code"] for t in (one, two)] == [0, 1] and len(
            started[one.id]
        ) == len(started[two.id]) == 2
        boss.free(six)
        standin.requeued.append(six.id)
        [resumed] = boss.take()
        assert resumed.id == six.id and started[six.id][0]["code"] == 255
        boss.end(resumed, "done", 2.0)
        assert boss.take() == []
    assert (
        started[two.id][0]["rows"][-1] == (None, {"failed": "n_kv_head=3 does not divide n_head=4"})
        and started[two.id][0]["code"] == 1
    )
    assert [t.state for t in journal.trials(tmp_path)] == [
        "pruned",
        "failed",
        "done",
        "done",
        "done",
    ]


def test_a_server_that_says_no_is_quoted(standin):
    with pytest.raises(UserError, match="cannot be reached"):
        server_module.SweepServer("http://127.0.0.1:9", "key", tries=2, pause=0.01)("query")
    standin.failures = 9
    with pytest.raises(UserError, match="503"):
        server_module.SweepServer(standin.url, "key", tries=2, pause=0.01)("query")
    with pytest.raises(UserError, match="ENTITY/PROJECT/ID"):
        server_module.parse_path("swp1")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_with_wandbs_own_client(standin, tmp_path, mode):
    """Runs belong to the sweep, carry their numbers, end with the right code; offline they are kept
    on disk.
    """
    pytest.importorskip("wandb")
    env = {
        "WANDB_BASE_URL": standin.url,
        "WANDB_API_KEY": "a" * 40,
        "WANDB_MODE": mode,
        "HOME": str(tmp_path),
        "WANDB_DIR": str(tmp_path),
    }
    done = programs.run("wandb_worker", tmp_path / "sweep", env=env, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [t.state for t in journal.trials(tmp_path / "sweep")] == ["done", "failed"]
    if mode == "online":
        one, two = standin.runs["run1"], standin.runs["run2"]
        assert (
            one["sweep"] == "swp1"
            and one["preempting"]
            and (one["state"], one["exit"]) == ("finished", 0)
            and two["exit"] == 1
        )
        assert (
            one["history"][0]["val_bpb"] == 1.0
            and one["history"][0]["step"] == 3
            and two["summary"]["failed"].startswith("out of memory")
        )
        assert (
            "run1 done {'depth': 1} 1.0 {3: 1.0}" in done.stdout
            and "run2 failed {'depth': 2} None" in done.stdout
        )
    else:
        assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2
