"""A plan's tokens, epochs, hours and money add up, and what is not known is said."""

from types import SimpleNamespace

import pytest

from lib import chips
from lib.config import Config
from lib.files import UserError
from lib.preflight.plan import Payment, compare, count_tokens, plan, plan_text

CONFIG = Config.preset("cpu_demo", num_steps=1000, total_batch_size=4096)
TOKENS = 1000 * 4096


def hours(mfu):
    """Of the run on four v6e."""
    return CONFIG.flops_per_token * TOKENS / (4 * mfu * 918e12) / 3600


@pytest.mark.parametrize(
    "name, topology, count",
    [
        ("v5e-1", "v5e:1x1", 1),
        ("v6e-4", "v6e:2x2", 4),
        ("v6e-8", "v6e:2x4", 8),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v4-8", "v4:2x2x1", 4),
        ("v6e:4x4", "v6e:4x4", 16),
        # whose chips are two devices each
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),
        ("h100-8", "h100", 8),
        ("a100-40gb-2", "a100-40gb", 2),
    ],
)
def test_names_are_topologies(name, topology, count):
    where = chips.rented(name)
    assert (where.topology, where.chips) == (topology, count)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5p", "TPU v5p"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("Tesla T4", "T4"),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_their_kind(kind, name):
    known = chips.chip(kind)
    assert (known.name if known else None) == name


def test_hours_and_dollars():
    made = plan(CONFIG, chips.V6E, 4, mfu=0.5, pay=Payment(price=2.0), memory=7)
    assert made.tokens == TOKENS and made.steps == 1000 and made.memory_bytes == 7
    assert made.hours == pytest.approx(hours(0.5))
    assert made.price_per_hour == 8 and made.cost == pytest.approx(8 * hours(0.5))
    text = plan_text(made)
    assert "4,096,000 in 1,000 steps" in text and "at $8.00 an hour, on-demand" in text
    assert "check the price" in text and "epochs" not in text


def test_colab_counts_in_its_own_units():
    paid = Payment("on-demand", units=4.0).at("colab")
    made = plan(CONFIG, chips.V6E, 4, mfu=0.5, pay=paid)
    assert made.units_per_hour == 16 and made.units == pytest.approx(16 * hours(0.5))
    assert made.price_per_hour == pytest.approx(16 * chips.COLAB_UNIT)
    assert "of Colab's compute units at 16.00 an hour" in plan_text(made)

    # where nobody knows the rate, what to multiply is said
    unknown = plan(CONFIG, chips.V6E, pay=Payment().at("colab"))
    assert unknown.cost is None and unknown.units is None
    assert "times the compute units per hour that Colab's Resources panel" in plan_text(unknown)

    # and elsewhere dollars stay
    assert Payment().at("kaggle") == Payment()


def test_a_long_run_takes_sessions():
    at_half = plan(CONFIG, chips.V6E, mfu=0.5)
    assert at_half.sessions == 1 and "sessions" not in plan_text(at_half)
    # 59 hours take three days
    slow = plan(CONFIG, chips.V6E, mfu=0.5 * hours(0.5) * 4 / 59)
    assert slow.hours == pytest.approx(59) and slow.sessions == 3
    assert "3 where one lasts 24 h" in plan_text(slow)


def test_what_is_not_known_is_not_invented():
    spot = plan(CONFIG, chips.V4, pay=Payment("spot"))
    assert "no spot price" in plan_text(spot)
    nothing = plan(CONFIG, None)
    assert set(nothing.to_dict()) == {"tokens", "steps", "mfu", "pay", "prices_of"}
    assert plan_text(nothing) == "tokens      4,096,000 in 1,000 steps"
    with pytest.raises(UserError, match="flex-start, on-demand, spot"):
        plan(CONFIG, chips.V6E, pay=Payment("barter"))


@pytest.mark.parametrize("there, epochs, warns", [(TOKENS, 1.0, False), (TOKENS // 5, 5.0, True)])
def test_more_than_four_epochs_are_warned_of(there, epochs, warns):
    made = plan(CONFIG, None, tokens_there=there)
    text = plan_text(made)
    assert f"{epochs:.2f} passes over {there:,} tokens of text" in text
    assert ("WARNING" in text) == warns


def test_tokens_are_counted_in_few_shards_and_estimated_in_many():
    lengths = [100, 50, 90, 60, 1000, 1000]
    waited = []

    def shard(i):
        waited.append(i)
        return SimpleNamespace(size=lengths[i])

    class Text(list):
        sizes = None

        def __getitem__(self, i):
            return shard(i)

    assert count_tokens(Text(range(2))) == 150
    # of six, as if all were like the first four
    assert count_tokens(Text(range(6))) == 300 * 6 // 4
    assert max(waited) == 3

    # of a corpus of records it is known
    known = Text(range(6))
    known.sizes = lengths
    assert count_tokens(known) == sum(lengths) and max(waited) == 3


def test_what_came_of_it():
    made = plan(CONFIG, chips.V6E, 4, mfu=0.5, pay=Payment(price=2.0))
    seconds = 2 * made.hours * 3600
    told = compare(made, seconds, TOKENS, CONFIG.flops_per_token, 4 * chips.V6E.flops)
    assert "planned 50% MFU, reached 25.0%" in told
    assert f"spent ${16 * made.hours:.2f}" in told
    assert compare(plan(CONFIG, None), 1800, TOKENS, 6, None) == (
        "took 0.50 h for the steps, not planned"
    )
    paid = plan(CONFIG, chips.V6E, 4, mfu=0.5, pay=Payment("colab", units=4.0))
    assert f"spent {32 * made.hours:.1f} on them" in compare(paid, seconds, TOKENS, 6, None)
