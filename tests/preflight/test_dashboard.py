"""The dashboard's page says what lib.preflight says, in a real browser."""

import itertools
import json
import shutil

import pytest

from lib import chips
from lib.config import Config
from lib.files import UserError
from lib.params import count_params
from lib.preflight import cache
from lib.preflight.compile import for_chip, question
from lib.preflight.dashboard import data, write_dashboard
from lib.preflight.estimate import estimate
from lib.preflight.plan import Payment, plan

# every value of every setting is somewhere in the grid, each with others
SHAPES = [
    dict(),
    dict(head_dim=256, n_kv_head=1, sequence_len=4096, vocab_size=50304),
    dict(n_embd=1152, mlp="swiglu", value_embeds=False, optimizer="adamw"),
    dict(total_batch_size=2**20, sequence_len=512, remat="layer", smear=False, backout=False),
    dict(n_kv_head=1, remat="dots", tied_head=True, mlp="gelu", vocab_size=200064),
    dict(window_pattern="L", resid_scales=False, x0_scales=False, loss_chunk=8192),
]
DEPTHS = (4, 13, 32)
PLACES = [
    ("v6e", "v6e-1", "dp"),
    ("v5e", "v5e-8", "zero"),
    ("v5p", "v5p-16", "fsdp"),
    ("tpu7x", "tpu7x-8", "dp"),
    ("v4", "v4-8", "tp"),
    ("h100", "h100-8", "fsdp"),
    ("t4", "t4-2", "zero"),
]
MFU = 0.35


def grid():
    """(depth, overrides, kind of chip, slice, strategy) of every point."""
    points = []
    settings = itertools.product(DEPTHS, SHAPES)
    for (depth, shape), place in zip(settings, itertools.cycle(PLACES)):
        kind, name, strategy = place
        rows = 2 * (1 if strategy == "tp" else chips.rented(name).chips)
        # the first shape with nothing but what the rule says
        shape = shape | dict(microbatch=rows) if shape else {}
        points.append((depth, shape, kind, name, strategy))
    return points


def expected(depth, overrides, kind, name, strategy):
    """What lib.preflight says of a point."""
    where = chips.rented(name)
    config = for_chip(Config.from_depth(depth, **overrides), where.chip)
    report = estimate(config, where, strategy)
    made = plan(config, where.chip, where.chips, MFU)
    # 0 where a price is not known
    costs = {
        how: plan(config, where.chip, where.chips, MFU, Payment(how)).cost or 0
        for how in ("on-demand", "spot")
    }
    return dict(
        parameters=count_params(config),
        memory=report.memory,
        peak=report.peak,
        available=report.available,
        seconds=report.bound["step"].seconds,
        flops=report.bound["step"].flops,
        mfu=report.mfu,
        tokens_per_s=report.tokens_per_s,
        tokens=made.tokens,
        steps=made.steps,
        run_flops=float(config.flops_per_token * made.tokens),
        hours=made.hours,
        cost=costs,
    )


# the same of the page
SAID = """([points, mfu]) => points.map(([depth, overrides, kind, name, strategy]) => {
  const where = DATA.slices.find((s) => s.name === name);
  const config = from_depth(depth, overrides);
  const {fits, ...report} = estimate(config, where, strategy);
  const {flops: run_flops, ...planned} = plan(config, where, mfu);
  for (const how in planned.cost) planned.cost[how] ??= 0;
  const reason = why_not(config, where.chips, strategy);
  return {parameters: count_params(config), ...report, run_flops, ...planned, why_not: reason};
})"""


def test_every_chip_of_the_table_is_there_and_only_what_is_known_is_priced():
    tables = data(cache=None)
    listed = {c.name for c in chips.CHIPS.values()}
    assert {c["name"] for c in tables["chips"].values()} == listed
    assert len({s["name"] for s in tables["slices"]}) == len(tables["slices"])
    assert tables["chips"]["v6e"]["prices"]["on-demand"] == chips.PRICES["TPU v6e"]["on-demand"]
    assert tables["chips"]["tpu7x"]["prices"]["on-demand"] is None
    assert "float32" in tables["chips"]["t4"]["note"] and not tables["chips"]["l4"]["note"]
    assert tables["compiled"] == []
    json.dumps(tables, allow_nan=False)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium on this machine: apt install chromium")
    folder = tmp_path_factory.mktemp("dashboard")

    # one answer of the compiler, which is not what the estimate says
    where = chips.rented("v6e-8")
    config = for_chip(Config.from_depth(20, microbatch=32, remat="dots"), where.chip)
    asked = question(config, where, "zero")
    answer = estimate(config, where, "zero").to_dict()
    answer |= dict(peak=3 * 2**30, source="compiled by libtpu 9", asked=asked)
    cache.kept(folder, asked, lambda: answer)
    # and one of another code, which counts no more
    (folder / "0123456789abcdef.json").write_text(json.dumps(answer | dict(peak=2**30)))

    path = write_dashboard(folder / "page.html", cache=folder)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        opened = browser.new_page(viewport=dict(width=390, height=844))
        opened.complaints = []
        opened.asked = []
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.on("request", lambda request: opened.asked.append(request.url))
        opened.goto(path.as_uri())
        yield opened
        browser.close()


@pytest.mark.slow
def test_its_numbers_are_those_of_the_estimate(page):
    points = grid()
    said = page.evaluate(SAID, [points, MFU])
    possible = 0
    for point, answer in zip(points, said):
        # what the page says is not possible, the estimate refuses
        if why_not := answer.pop("why_not"):
            with pytest.raises(UserError, match="must divide|cannot be split|not divide"):
                expected(*point)
            assert "do not divide" in why_not
            continue
        possible += 1
        wanted = expected(*point)
        for name, value in wanted.items():
            assert answer[name] == pytest.approx(value, rel=1e-9), (point, name)
    assert possible > 0.8 * len(points)


@pytest.mark.slow
def test_sliders_and_menus_change_what_is_shown(page):
    # it asks for nothing but itself, and fits a phone
    assert page.complaints == [] and len(page.asked) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    def facts():
        return dict(zip(page.locator("dt").all_inner_texts(), page.locator("dd").all_inner_texts()))

    before = facts()
    config = for_chip(Config.from_depth(20, remat="dots", microbatch=4), chips.V6E)
    assert before["parameters"] == f"{count_params(config)['total'] / 1e6:.0f}M"
    assert page.locator("#verdict").inner_text().startswith("Fits: 18.7 of 31.2 GiB")

    # four layers more do not fit one chip, by keyboard
    page.locator("#set-depth").focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    assert page.locator("#set-depth-value").inner_text() == "28"
    assert page.locator("#verdict").inner_text().startswith("Does not fit")
    assert facts()["parameters"] != before["parameters"]

    # but eight, and a cell of the table takes them
    cell = page.locator("tbody tr", has_text="TPU v6e").get_by_role("button", name="fsdp")
    cell.first.click()
    assert page.locator("#set-strategy").input_value() == "fsdp"
    assert page.locator("#verdict").inner_text().startswith("Fits")

    # what does not divide is said
    page.locator("#set-strategy").select_option("tp")
    assert "do not divide" in page.locator("#note").inner_text()
    page.locator("#set-kind").select_option("t4")
    assert "float32" in page.locator("#note").inner_text()
    assert page.complaints == []


@pytest.mark.slow
def test_what_was_compiled_is_marked(page):
    page.reload()
    assert page.locator("#truth").inner_text() == ""
    page.locator("#set-chips").select_option("8")
    page.locator("#set-strategy").select_option("zero")
    assert "compiled by libtpu 9 says 3.00 GiB" in page.locator("#truth").inner_text()
    assert page.locator("#verdict").inner_text().startswith("Fits: 3.00 of")
    # another step is another question
    page.locator("#set-remat").select_option("none")
    assert page.locator("#truth").inner_text() == ""
    assert page.complaints == []
