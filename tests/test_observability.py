"""docs/observability: queries on ClickHouse itself, over what our writer really sends; files that
belong together.
"""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from lib.train import otlp
from lib.train.metrics import Metrics
from tests.helpers import ROOT
from tests.helpers.collector import http_receiver

FOLDER = ROOT / "docs" / "observability"
BOARDS = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("dashboards/*.json")}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"]]
each_panel = pytest.mark.parametrize(
    "board, panel", PANELS, ids=lambda x: x if isinstance(x, str) else x["title"]
)


def yaml_of(name):
    return yaml.safe_load((FOLDER / name).read_text())


# ---- shapes: what the programs that read these files cannot do without ---------------------------

TEXT = {"type": "string", "minLength": 1}
SERVICE = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string", "pattern": r"^[\w./-]+:[\w.-]*\d[\w.-]*$"},  # a version
        "command": {"type": "array", "items": TEXT},
        "environment": {"type": "object", "additionalProperties": {"type": "string"}},
        "volumes": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[^:]+:/[^:]+(:ro)?$"},
        },
        # reached from this machine alone
        "ports": {"type": "array", "items": {"pattern": r"^127\.0\.0\.1:\d+:\d+$"}},
        "extra_hosts": {"type": "array", "items": TEXT},
        "depends_on": {"type": ["array", "object"]},
        "healthcheck": {"type": "object", "required": ["test"]},
        "restart": {"enum": ["no", "always", "on-failure", "unless-stopped"]},
    },
}
COMPOSE = {
    "type": "object",
    "required": ["services"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]*$"},
        "services": {"type": "object", "additionalProperties": SERVICE, "minProperties": 1},
        "volumes": {"type": "object"},
    },
}
PLACE = {
    "type": "object",
    "required": ["x", "y", "w", "h"],
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 23},
        "w": {"type": "integer", "minimum": 1, "maximum": 24},
    },
    "additionalProperties": {"type": "integer", "minimum": 0},
}
SOURCE = {
    "type": "object",
    "required": ["type", "uid"],
    "properties": {"type": TEXT, "uid": TEXT},
}
PANEL = {
    "type": "object",
    "required": ["id", "type", "title", "description", "gridPos", "datasource", "targets"],
    "properties": {
        "id": {"type": "integer", "minimum": 1},
        "type": {"enum": ["table", "timeseries", "trend"]},
        "title": TEXT,
        "description": TEXT,
        "gridPos": PLACE,
        "datasource": SOURCE,
        "targets": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["refId", "datasource"],
                "oneOf": [{"required": ["rawSql", "editorType"]}, {"required": ["expr"]}],
            },
        },
    },
}
DASHBOARD = {
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "time", "templating", "panels"],
    "properties": {
        "uid": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,40}$"},
        "title": TEXT,
        "schemaVersion": {"type": "integer", "minimum": 36},
        "panels": {"type": "array", "items": PANEL, "minItems": 1},
        "templating": {
            "type": "object",
            "properties": {
                "list": {"type": "array", "items": {"required": ["name", "type", "query"]}}
            },
        },
    },
}


def test_the_compose_file_has_the_shape_of_one():
    jsonschema.validate(yaml_of("compose.yaml"), COMPOSE)


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_have_the_shape_of_them(name):
    board = BOARDS[name]
    jsonschema.validate(board, DASHBOARD)
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    # no two of them stand on the same place
    taken = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def leaves(value, path=""):
    """(where it stands, value) of all that is neither a list nor a dict."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, one in items:
        if isinstance(one, dict | list):
            yield from leaves(one, f"{path}.{name}")
        else:
            yield f"{path}.{name}", one


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_own_schema_knows_every_field(name):
    """Classes that Grafana generates from its schema: what they don't know they drop."""
    pytest.importorskip("grafana_foundation_sdk", reason="no pip install grafana-foundation-sdk")
    from grafana_foundation_sdk.cog import encoder, plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    nonsense = BOARDS[name] | {"nonsense": 1}
    read = json.loads(encoder.JSONEncoder().encode(Dashboard.from_json(nonsense)))
    known = dict(leaves(read))
    missing = [path for path, value in leaves(nonsense) if known.get(path) != value]
    assert missing == [".nonsense"]


def test_what_is_mounted_is_there():
    compose = yaml_of("compose.yaml")
    for name, service in compose["services"].items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).exists(), f"{name}: {source}"
            else:
                assert source in compose["volumes"], f"{name}: {source}"
        for other in service.get("depends_on", []):
            assert other in compose["services"], f"{name}: {other}"


def test_the_files_speak_of_the_same_places():
    services = yaml_of("compose.yaml")["services"]
    collector = yaml_of("collector.yaml")
    ports = {port.rpartition(":")[2] for port in services["collector"]["ports"]}
    for protocol in collector["receivers"]["otlp"]["protocols"].values():
        assert protocol["endpoint"].rpartition(":")[2] in ports
    # what a pipeline names is described
    for pipeline in collector["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= collector[kind].keys()

    # one database, one login, for who writes and who reads
    login = services["clickhouse"]["environment"]
    exporter = collector["exporters"]["clickhouse"]
    sources = yaml_of("provisioning/datasources/rawchat.yaml")["datasources"]
    reader = next(source for source in sources if source["uid"] == "clickhouse")
    assert exporter["endpoint"].startswith("tcp://clickhouse:9000")
    assert reader["jsonData"]["host"] == "clickhouse"
    for theirs in (
        (exporter["database"], exporter["username"], exporter["password"]),
        (
            reader["jsonData"]["defaultDatabase"],
            reader["jsonData"]["username"],
            reader["secureJsonData"]["password"],
        ),
    ):
        assert theirs == (
            login["CLICKHOUSE_DB"],
            login["CLICKHOUSE_USER"],
            login["CLICKHOUSE_PASSWORD"],
        )


@each_panel
def test_every_panel_asks_a_source_that_is_provided(board, panel):
    provided = {
        (source["type"], source["uid"])
        for source in yaml_of("provisioning/datasources/rawchat.yaml")["datasources"]
    }
    for target in panel["targets"]:
        assert (target["datasource"]["type"], target["datasource"]["uid"]) in provided


# ---- queries -------------------------------------------------------------------------------------

# as the collector's exporter makes it, without codecs, indices and exemplars
GAUGES = """
CREATE TABLE otel.otel_metrics_gauge (
  ResourceAttributes Map(LowCardinality(String), String),
  ResourceSchemaUrl String,
  ScopeName String,
  ScopeVersion String,
  ScopeAttributes Map(LowCardinality(String), String),
  ScopeDroppedAttrCount UInt32,
  ScopeSchemaUrl String,
  ServiceName LowCardinality(String),
  MetricName String,
  MetricDescription String,
  MetricUnit String,
  Attributes Map(LowCardinality(String), String),
  StartTimeUnix DateTime64(9),
  TimeUnix DateTime64(9),
  Value Float64,
  Flags UInt32
) ENGINE = MergeTree ORDER BY (ServiceName, MetricName, Attributes, toUnixTimestamp64Nano(TimeUnix))
"""

# what a form of Grafana's would put in
CHOICES = {
    "${run:singlequote}": "'one','two'",
    "${stage:singlequote}": "'base'",
    "${baseline:singlequote}": "'one'",
    "${metric:singlequote}": "'lr'",
    "$__timeFilter(TimeUnix)": "TimeUnix > now() - INTERVAL 1 DAY",
}
STEPS = 12


def filled(sql: str) -> str:
    """A query as Grafana sends it."""
    for name, value in CHOICES.items():
        sql = sql.replace(name, value)
    assert "$" not in sql, sql
    return sql


def sent_by_the_writer(folder: Path) -> list[bytes]:
    """What a collector got of two runs and one stage, by the writer itself."""
    bodies = []

    def take(body):
        bodies.append(body)
        return 200, b""

    with http_receiver(take) as address:
        for name, offset in (("one", 0.0), ("two", 0.5)):
            run = folder / name
            run.mkdir()
            (run / "config.json").write_text("{}")
            stages = [run, run / "sft"] if name == "two" else [run]
            for place in stages:
                with Metrics(place, STEPS, [f"otlp:{address}"]) as metrics:
                    for step in range(1, STEPS + 1):
                        values = dict(loss=4 / step + offset, lr=0.1, tokens_per_s=1000.0 * step)
                        if step % 4 == 0:
                            values["val_bpb"] = 2 / step + offset
                        metrics.log(step, values)
    return bodies


def clock(nanoseconds: int) -> str:
    """A time as ClickHouse reads it, to the nanosecond."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{seconds}.{rest:09}"


def rows_of(bodies: list[bytes]) -> list[dict]:
    """Rows as the collector's exporter writes them for gauges."""
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as messages

    rows = []
    for body in bodies:
        request = messages.ExportMetricsServiceRequest.FromString(body)
        for resource in request.resource_metrics:
            attributes = {}
            for a in resource.resource.attributes:
                attributes[a.key] = str(getattr(a.value, a.value.WhichOneof("value")))
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    rows += [
                        dict(
                            ResourceAttributes=attributes,
                            ScopeName=scope.scope.name,
                            ServiceName=attributes["service.name"],
                            MetricName=metric.name,
                            MetricUnit=metric.unit,
                            TimeUnix=clock(point.time_unix_nano),
                            Value=getattr(point, point.WhichOneof("value")),
                        )
                        for point in metric.gauge.data_points
                    ]
    return rows


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(sql): rows of a ClickHouse that has what the writer sent."""
    chdb = pytest.importorskip("chdb", reason="needs the extra observability: pip install chdb")
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the otlp extra")
    from chdb.session import Session

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(otlp, "EVERY", 0.02)
        rows = rows_of(sent_by_the_writer(tmp_path_factory.mktemp("runs")))
    lines = "\n".join(map(json.dumps, rows))
    session = Session(str(tmp_path_factory.mktemp("clickhouse")))
    session.query("CREATE DATABASE otel")
    session.query(GAUGES)
    columns = ", ".join(rows[0])
    session.query(f"INSERT INTO otel.otel_metrics_gauge ({columns}) FORMAT JSONEachRow {lines}")
    session.query("USE otel")

    def query(sql):
        text = session.query(filled(sql), "JSON").bytes().decode()
        return json.loads(text)["data"]

    assert chdb
    yield query
    session.close()


def sql_of(title: str) -> str:
    [panel] = [panel for panel in BOARDS["runs"]["panels"] if panel["title"] == title]
    return panel["targets"][0]["rawSql"]


def test_runs_are_one_line_each(ask):
    rows = ask(sql_of("Runs"))
    assert {row["run"] for row in rows} == {"one", "two"} and len(rows) == 2
    by_run = {row["run"]: row for row in rows}
    assert by_run["two"]["steps"] in (STEPS, str(STEPS))
    assert by_run["two"]["loss"] == pytest.approx(4 / STEPS + 0.5)
    assert by_run["one"]["best_val_bpb"] == pytest.approx(2 / STEPS)
    assert by_run["one"]["tokens_per_s"] == pytest.approx(6500)
    assert by_run["one"]["device"] == "cpu" and by_run["one"]["devices"] >= 1


def test_curves_of_two_runs_stand_side_by_side(ask):
    rows = ask(sql_of("Loss"))
    for name, offset in (("one base", 0.0), ("two base", 0.5)):
        curve = [(int(row["step"]), row["value"]) for row in rows if row["series"] == name]
        assert [step for step, _ in curve] == list(range(1, STEPS + 1))
        assert [value for _, value in curve] == pytest.approx(
            [4 / step + offset for step in range(1, STEPS + 1)]
        )
    # a stage that was not chosen stays away
    assert {row["series"] for row in rows} == {"one base", "two base"}


def test_what_is_measured_now_and_then_has_its_steps(ask):
    rows = ask(sql_of("Bits per byte, held out"))
    steps = [int(row["step"]) for row in rows if row["series"] == "one base"]
    assert steps == [4, 8, 12]


def test_a_run_is_compared_with_the_baseline_at_equal_steps(ask):
    rows = ask(sql_of("Loss less the baseline's"))
    assert {row["series"] for row in rows} == {"two"} and len(rows) == STEPS
    assert all(row["value"] == pytest.approx(0.5) for row in rows)


def test_any_metric_can_be_chosen(ask):
    assert {row["value"] for row in ask(sql_of("$metric"))} == {0.1}


def test_speed_is_shown_by_the_clock(ask):
    rows = ask(sql_of("Tokens a second"))
    assert {row["series"] for row in rows} == {"one base", "two base"}
    assert all(row["value"] > 0 and re.match("20", row["time"]) for row in rows)


@pytest.mark.parametrize("panel", [p for b, p in PANELS if b == "runs"], ids=lambda p: p["title"])
def test_clickhouse_takes_every_query(panel, ask):
    ask(panel["targets"][0]["rawSql"])


def test_menus_offer_what_is_there(ask):
    offers = {}
    for variable in BOARDS["runs"]["templating"]["list"]:
        offers[variable["name"]] = {
            value for row in ask(variable["query"]) for value in row.values()
        }
    assert offers["run"] == offers["baseline"] == {"one", "two"}
    assert offers["stage"] == {"base", "sft"}
    assert {"loss", "lr", "val_bpb", "step"} <= offers["metric"]
