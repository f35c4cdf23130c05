"""Eight virtual devices, and two processes, against one device; each in processes of its own, which
jax's device count needs.
"""

import json
import re
import socket
import subprocess
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from lib import parallel
from lib.config import Config
from lib.files import UserError
from lib.parallel import collectives, hosts
from lib.parallel import layout as layouts
from lib.parallel.layout import AXES
from lib.params import is_spec, param_specs
from lib.train import step
from tests.helpers import programs

ROOT = Path(__file__).parents[2]
CONFIG = dict(
    vocab_size=320,
    sequence_len=32,
    n_layer=3,
    n_embd=64,
    n_head=4,
    n_kv_head=4,
    head_dim=16,
    mlp_dim=128,
    microbatch=8,
    window_pattern="SL",
    total_batch_size=2 * 8 * 32,
    num_steps=10,
    warmup_steps=2,
    loss_chunk=64,
    compute_dtype="float32",
    attention="einsum",
    scan_layers=False,
)
STEPS, HALF = 10, 5
LAYOUTS = [
    ("dp", {"data": 8}),
    ("zero", {"data": 8}),
    ("fsdp", {"fsdp": 8}),
    ("fsdp", {"data": 2, "fsdp": 4}),
    ("tp", {"data": 2, "tensor": 4}),
]


def train(*runs, devices=1, processes=1):
    """What tests/programs/train_sharded.py tells of these runs, all in one start of it."""
    arguments = dict(config=CONFIG, steps=STEPS, runs=runs)
    if processes > 1:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            arguments["hosts"] = [f"127.0.0.1:{s.getsockname()[1]}", processes]
    jobs = [
        programs.start(
            "train_sharded",
            json.dumps(arguments),
            i,
            devices=devices // processes,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(processes)
    ]
    try:
        done = [job.communicate(timeout=600) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * processes, "\n".join(
        err[-2000:] for _, err in done
    )
    return json.loads(done[0][0].partition("RESULT")[2])


def distance(a, b):
    """Relative L2 between two lists of parameters, all together."""
    a, b = (np.concatenate([np.array(p) for p in x["params"]]) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# ---- one device ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_one():
    """Ten steps on one device; with rows forgotten; no step at all; in other orders and other
    microbatches.
    """
    others = [dict(order=1), dict(order=2)]
    for microbatch in (2, 4):
        for order in (None, 1):
            others.append(dict(config={"microbatch": microbatch}, order=order))
    return train({}, dict(drop=2), dict(until=0), *others)


@pytest.fixture(scope="module")
def single(on_one):
    return on_one[0]


# how much farther than its own noise another program may be from one device
FACTOR = 5


@pytest.fixture(scope="module")
def noise(on_one):
    """How far one device comes from itself when it takes the same sums in another order.

    The rows of each batch change places, or come in other microbatches. An Adam with an eps of
    1e-10 makes the rounding of nearly zero gradients visible, on one processor more than another.
    """
    single, _, _, *others = on_one
    return max(distance(other, single) for other in others)


def check_equal(many, single, noise, steps=slice(None)):
    """The same losses, norms and parameters, up to what the order of sums makes of them."""
    losses, norms = np.transpose(many["losses"])
    wanted, wanted_norms = np.transpose(single["losses"][steps])
    np.testing.assert_allclose(losses, wanted, rtol=2e-5)
    np.testing.assert_allclose(norms, wanted_norms, rtol=5e-3)
    if steps.stop is None:
        assert distance(many, single) < FACTOR * noise


@pytest.mark.slow
def test_the_noise_is_small_beside_a_mistake(on_one, noise):
    """What is allowed is far from what two forgotten rows of sixteen do."""
    single, forgotten, *_ = on_one
    assert 0 < FACTOR * noise < 0.1 * distance(forgotten, single)


@pytest.mark.parametrize("value_embeds", [True, False])
@pytest.mark.parametrize("strategy", ["dp", "zero", "fsdp", "tp"])
def test_a_model_may_lack_value_embeddings(strategy, value_embeds):
    """Layers apart, several microbatches: the step is traced as a part of a mesh."""
    config = Config(**CONFIG).replace(value_embeds=value_embeds)
    layout = layouts.make_layout(strategy, config, jax.devices()[:1])
    template = step.state_template(config)
    rows = jax.ShapeDtypeStruct((16, config.sequence_len), "int32")
    state, _ = jax.eval_shape(step.make_train_step(config, layout), template, rows, rows)
    assert jax.tree.structure(state) == jax.tree.structure(template)
    assert ("value_embeds" in state.params) == value_embeds


# ---- eight devices -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_eight():
    """Ten steps on each layout; rows forgotten, and their logits left out; a state that is made
    there.
    """
    runs = [dict(layout=layout) for layout in LAYOUTS]
    skipping = dict(skip_ignored=True, loss_chunk=8)
    forgotten = dict(drop=2, config=skipping, layout=LAYOUTS[-1])
    return train(*runs, forgotten, dict(until=0, make=True, layout=LAYOUTS[3]), devices=8)


@pytest.fixture(scope="module")
def eight(on_eight):
    """{layout: its ten steps}"""
    return dict(zip(map(str, LAYOUTS), on_eight))


@pytest.mark.parametrize("layout", [str(x) for x in LAYOUTS])
@pytest.mark.slow
def test_every_strategy_equals_one_device(single, eight, noise, layout):
    check_equal(eight[layout], single, noise)


@pytest.mark.slow
def test_devices_leave_out_as_many_logits_as_each_may(on_one, on_eight, noise):
    """Where rows teach nothing, some devices have fewer chunks of logits than others."""
    check_equal(on_eight[-2], on_one[1], noise)


@pytest.mark.slow
def test_a_part_that_differs_on_one_device_is_a_difference(eight):
    assert all(run["equal"] == [True, False] for run in eight.values())


@pytest.mark.slow
def test_what_is_split_takes_less_room(single, eight):
    size = {name: eight[name]["bytes"] / single["bytes"] for name in map(str, LAYOUTS)}
    dp, zero, fsdp, both, tp = size.values()
    assert dp == 1 and 0.4 < zero < 0.6 and fsdp < 0.15 and both < 0.25 and 0.3 < tp < 0.8


@pytest.mark.slow
def test_collectives_are_the_expected_ones(eight):
    dp, zero, fsdp, *_ = (eight[str(x)] for x in LAYOUTS)
    # gradients and metrics are summed, and the orthogonalised updates come back: nothing with a
    # batch or sequence in its shape
    assert set(dp["kinds"]) == {"all-reduce", "all-gather"} and dp["kinds"]["all-reduce"] <= 3
    widths = {CONFIG[k] for k in ("n_embd", "mlp_dim", "n_head", "head_dim", "n_layer")} | {
        12,
        1,
        2,
        8,
    }
    for shape in dp["gathers"]:
        assert {int(n) for n in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if n} <= widths, (
            shape
        )
    assert zero["kinds"]["reduce-scatter"] and fsdp["kinds"]["reduce-scatter"]
    assert not {"all-to-all", "collective-permute"} & {*zero["kinds"], *fsdp["kinds"]}


@pytest.mark.parametrize("layout", [str(x) for x in LAYOUTS])
@pytest.mark.slow
def test_devices_add_up_in_float32_though_they_compute_in_bfloat16(eight, layout):
    """Gradients, losses and counts; what tensor parallelism sums within a layer are activations."""
    across = eight[layout]["bfloat16"]["across"]
    types = {"all_reduce f32", "all_reduce i32", "reduce_scatter f32"}
    if "tp" in layout:
        types.add("all_reduce bf16")
    assert set(across) <= types, across
    assert across["all_reduce f32"] > 1
    if "fsdp" in layout:
        # each gathered weight's gradient is scattered
        assert across["reduce_scatter f32"] > 10


@pytest.mark.slow
def test_a_device_adds_up_in_float32_though_it_computes_in_bfloat16(single, eight):
    for one in (single, *eight.values()):
        assert one["bfloat16"]["most"] <= 1, "of so many bfloat16 numbers a sum was taken"


# ---- starting on one layout and checkpoint, going on in another ----------------------------------


@pytest.mark.slow
def test_a_state_is_the_same_wherever_it_is_made(on_one, on_eight):
    _, _, begun, *_ = on_one
    assert on_eight[-1]["params"] == begun["params"]


@pytest.mark.slow
def test_several_processes_equal_one_and_their_checkpoint_goes_anywhere(single, noise, tmp_path):
    """Trained five steps by two processes of two devices each, saved by both, the rest on one and
    on four devices of one process.
    """
    zero, fsdp = str(tmp_path / "zero"), str(tmp_path / "fsdp")
    halves = train(
        dict(layout=["zero", {"data": 4}], until=HALF, save=zero),
        dict(layout=["fsdp", {"data": 2, "fsdp": 2}], until=HALF, save=fsdp),
        devices=4,
        processes=2,
    )
    for half, folder in zip(halves, (zero, fsdp)):
        check_equal(half, single, noise, slice(0, HALF))
        (saved,) = Path(folder).iterdir()
        assert {f"opt_state.{i}-of-2.safetensors" for i in (0, 1)} < {
            path.name for path in saved.iterdir()
        }

    rests = train(
        dict(restore=zero),
        dict(restore=zero, layout=["dp", {"data": 4}]),
        dict(restore=zero, layout=["fsdp", {"fsdp": 4}]),
        dict(restore=fsdp),
        devices=4,
    )
    for rest in rests:
        check_equal(rest, single, noise, slice(HALF, None))


# ---- devices on paper: traced for, and not there -----------------------------------------------


def on_paper(strategy, mesh) -> layouts.Layout:
    sizes = tuple(mesh.get(axis, 1) for axis in AXES)
    return layouts.Layout(jax.sharding.AbstractMesh(sizes, AXES), strategy)


@pytest.mark.parametrize("strategy, mesh", LAYOUTS)
def test_a_gradient_is_summed_once_over_devices_that_saw_other_rows(strategy, mesh):
    config, layout = Config(**CONFIG), on_paper(strategy, mesh)
    specs = param_specs(config)
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        own = layout.partition(spec)

        def share(g, spec=spec):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(collectives, "param_specs", lambda config: spec)
                return collectives.reduce_gradients(layout, config, g)

        out = layout.state_partition(spec, spec.shape)
        summed = jax.shard_map(
            share, mesh=layout.mesh, in_specs=(own,), out_specs=out, check_vma=False
        )
        [call] = jax.make_jaxpr(summed)(jax.ShapeDtypeStruct(spec.shape, "float32")).eqns
        over = []
        for op in call.params["jaxpr"].eqns:
            if op.primitive.name in ("psum", "reduce_scatter"):
                over += op.params.get("axes") or op.params["axis_name"]
        assert sorted(over) == sorted(
            axis for axis in ("data", "fsdp") if mesh.get(axis, 1) > 1 and axis not in own
        )


def test_a_stack_that_devices_do_not_divide_is_filled_up_for_them():
    shapes = []
    stack = jax.ShapeDtypeStruct((3, 4, 5), "float32")
    for strategy, mesh in [("fsdp", {"fsdp": 8}), ("zero", {"data": 2}), ("fsdp", {"fsdp": 3})]:
        with collectives.optimizer_on(on_paper(strategy, mesh)):
            whole = jax.eval_shape(
                lambda x: collectives.each_layer(lambda x: shapes.append(x.shape) or x, x), stack
            )
        assert whole.shape == (3, 4, 5)
    assert shapes == [(8, 4, 5), (4, 4, 5), (3, 4, 5)]


def test_a_difference_on_any_one_device_is_a_difference(monkeypatch):
    class Parts:
        def __init__(self, *parts):
            self.addressable_shards = [types.SimpleNamespace(data=np.array(part)) for part in parts]

    monkeypatch.setattr(jax, "Array", Parts)
    assert layouts.equal(Parts(1, 2), Parts(1, 2))
    assert not layouts.equal(Parts(1, 2), Parts(1, 3))
    assert not layouts.equal(Parts(1, 2), Parts(0, 2))


def test_bad_layouts_in_one_sentence():
    # four stand-ins: refused before any is used
    config, devices = Config(**CONFIG), jax.devices() * 4
    for strategy, mesh, change, said in [
        ("dp", {"data": 8}, {}, "data=8 needs 8 devices, and there are 4"),
        ("ddp", None, {}, "ddp"),
        ("dp", {"pipe": 4}, {}, "pipe"),
        ("dp", {"tensor": 4}, {}, "splits nothing over the mesh axis tensor=4"),
        ("dp", None, dict(microbatch=2), "microbatch=2 rows cannot be split over 4 devices"),
        ("dp", None, dict(microbatch=6, total_batch_size=384), "microbatch=6 rows cannot be split"),
        ("tp", None, dict(n_kv_head=2), "n_kv_head=2"),
        ("fsdp", None, dict(n_embd=66), "axis embed of blocks.w_in has 66 entries"),
    ]:
        with pytest.raises(UserError, match=said):
            parallel.make_layout(strategy, config.replace(**change), devices, mesh)


def test_every_group_that_will_talk_is_introduced(monkeypatch):
    met = []
    monkeypatch.setattr(layouts, "_meeting", lambda layout, group: lambda: met.append(group))
    monkeypatch.setattr(layouts, "from_each", lambda what, value: [value])
    sizes = dict(data=2, fsdp=1, tensor=4)
    layouts._introduce(types.SimpleNamespace(size=sizes.get))
    assert met == [("data",), ("tensor",), ("data", "tensor")]


def test_all_processes_stop_two_steps_after_the_first_that_wants_to(monkeypatch):
    """None is further ahead than that, so all of them still ask about that step."""
    told = {}
    store = types.SimpleNamespace(
        key_value_set=told.__setitem__,
        key_value_dir_get=lambda folder: [kv for kv in told.items() if kv[0].startswith(folder)],
    )
    monkeypatch.setattr(hosts, "_store", lambda: store)
    monkeypatch.setattr(hosts, "_rounds", {})

    def ended(wanted):
        stop = hosts.stopping_together()
        return [stop(step, step == wanted) for step in range(3, 9)]

    assert ended(wanted=5) == [False, False, False, False, True, True]
    # what was wanted of one training is not wanted of the next one of these processes
    assert ended(wanted=None) == [False] * 6
    assert ended(wanted=4) == [False, False, False, True, True, True]
    # and all of one training have one key, whoever asks
    assert sorted(told) == ["rawchat/stop/" + number for number in ("0/at", "2/at")]


def test_who_is_no_process_of_the_job_is_not_counted():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = s.getsockname()
    said = {}

    def call(name):
        deadline = time.monotonic() + 10
        said[name] = hosts._report(address, 2, int(name), deadline)

    def one_after_another():
        for name in ("0", "7", "1"):
            callers.append(threading.Thread(target=call, args=(name,), daemon=True))
            callers[-1].start()
            time.sleep(0.2)

    callers = []
    threading.Thread(target=one_after_another, daemon=True).start()
    assert hosts._count_heads(address, 2, time.monotonic() + 10) == "go"
    callers[-1].join(10)
    assert said["1"] == "go"


@pytest.mark.slow
def test_missing_processes_are_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    jobs = [programs.start("join_hosts", address, i, stderr=subprocess.PIPE) for i in (0, 1)]
    for job in jobs:
        assert (
            "process 2 of 3 never joined within 4 s"
            in job.communicate(timeout=60)[1].splitlines()[-1]
        )
    for arguments in (("nowhere", 2, 0), ("host:1", 2, 2), ("host:1", 0, 0)):
        with pytest.raises(UserError, match="host:port"):
            parallel.start_hosts(*arguments)
