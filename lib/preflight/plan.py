"""What a training run will take, before it is paid for: tokens, epochs, hours and money."""

import math
from typing import NamedTuple

from lib import chips
from lib.chips import Chip
from lib.config import Config
from lib.data.packing import epochs
from lib.data.tokens import Tokens
from lib.files import UserError

# share of a chip's FLOPs assumed where nobody has measured:
# what a healthy single-chip run of this size reaches
MFU = 0.4

# hours after which Colab ends a session, whoever pays for it; the run goes on in the next
SESSION_HOURS = 24

CHECK = "lib/chips.py, table of {date}: check the price before you pay"


class Payment(NamedTuple):
    """How a device is paid for.

    pay: on-demand, flex-start, spot or colab; price: dollars per chip and hour (0: lib/chips.py's);
    units: Colab's compute units per hour (0: likewise).
    """

    pay: str = "on-demand"
    price: float = 0.0
    units: float = 0.0

    def at(self, place: str) -> "Payment":
        """The same in a place such as "colab", where only its own units buy anything."""
        return self._replace(pay="colab") if place == "colab" else self


class Plan(NamedTuple):
    """What is planned; None where it is not known. `to_dict` is what results.json keeps."""

    tokens: int
    steps: int
    mfu: float
    pay: str
    # when the table of prices was last touched
    prices_of: str
    # that the training text has
    tokens_there: int | None = None
    memory_bytes: int | None = None
    hours: float | None = None
    # of all chips: dollars, and Colab's compute units
    price_per_hour: float | None = None
    cost: float | None = None
    units_per_hour: float | None = None
    units: float | None = None
    # of SESSION_HOURS at most, resumed from one to the next
    sessions: int | None = None

    def to_dict(self) -> dict:
        """What is known, as JSON."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def plan(
    config: Config,
    chip: Chip | None,
    count: int = 1,
    mfu: float = MFU,
    pay: Payment | None = None,
    memory: int | None = None,
    tokens_there: int | None = None,
) -> Plan:
    """The plan of a run on `count` chips of a kind (None: not in the table, so no time and no
    money).

    memory: bytes of a step per device. tokens_there: how many the training text has, if known.
    """
    pay = pay or Payment()
    _check(mfu, pay)
    tokens = config.num_steps * config.total_batch_size
    made = Plan(
        tokens=tokens,
        steps=config.num_steps,
        mfu=mfu,
        pay=pay.pay,
        prices_of=chips.PRICES_DATE,
        tokens_there=tokens_there,
        memory_bytes=memory,
    )
    if chip is None:
        return made

    # time
    hours = config.flops_per_token * tokens / (chip.flops * count * mfu) / 3600
    made = made._replace(hours=hours, sessions=math.ceil(hours / SESSION_HOURS))

    # money
    price = pay.price or chips.price_per_hour(chip.name, pay.pay, pay.units)
    if price:
        made = made._replace(price_per_hour=price * count, cost=price * count * hours)
    units = pay.units or chips.COLAB_UNITS.get(chip.name)
    if pay.pay == "colab" and units:
        made = made._replace(units_per_hour=units * count, units=units * count * hours)
    return made


def _check(mfu: float, pay: Payment):
    """UserError for what no plan can be made of; NaN is such a number too."""
    if not 0 < mfu <= 1:
        raise UserError(f"mfu is a share, above 0 and at most 1, not {mfu}")
    for name, value in (("price", pay.price), ("units", pay.units)):
        if not 0 <= value < math.inf:
            raise UserError(f"{name} must be 0 (not known) or more, not {value}")


def plan_text(plan: Plan) -> str:
    """A plan as lines of text."""
    lines = [f"tokens      {plan.tokens:,} in {plan.steps:,} steps"]
    if plan.tokens_there is not None:
        lines.append(epochs_text(plan))
    if plan.hours is not None:
        assumed = f"if {plan.mfu:.0%} MFU is reached (assumed, not promised)"
        lines.append(f"time        {plan.hours:.2f} h {assumed}")
        if plan.sessions and plan.sessions > 1:
            limit = f"where one lasts {SESSION_HOURS} h at most, as Colab's do"
            lines.append(
                f"sessions    {plan.sessions} {limit}: each goes on exactly where one ended"
            )
        lines.append(_cost_line(plan))
    return "\n".join(lines)


def count_tokens(tokens: Tokens, shards: int = 4) -> int:
    """How many tokens a text has; of more than `shards` shards, as if all were like the first ones.

    It waits until those are tokenised, and no more of them; of a corpus of records all are known.
    """
    if tokens.sizes:
        return sum(tokens.sizes)
    first = range(min(shards, len(tokens)))
    counted = sum(tokens[i].size for i in first)
    return counted * len(tokens) // len(first)


def epochs_text(plan: Plan) -> str:
    """How often the text is gone through, and a warning where that is too often."""
    passes, warning = epochs(plan.tokens, plan.tokens_there or 0)
    line = f"epochs      {passes:.2f} passes over {plan.tokens_there:,} tokens of text"
    return f"{line}\nWARNING     {warning}" if warning else line


def _cost_line(plan: Plan) -> str:
    """What it costs, in the coin of the place, or why that is not known."""
    check = CHECK.format(date=plan.prices_of)
    if plan.units is not None and plan.cost is not None:
        rate = f"at {plan.units_per_hour:.2f} an hour, about ${plan.cost:.2f}"
        return f"cost        {plan.units:.1f} of Colab's compute units {rate} ({check})"
    if plan.cost is not None:
        rate = f"at ${plan.price_per_hour:.2f} an hour, {plan.pay}"
        return f"cost        ${plan.cost:.2f} {rate} ({check})"
    if plan.pay == "colab":
        return (
            f"cost        {plan.hours:.2f} times the compute units per hour that Colab's Resources "
            "panel shows (not known here: Colab publishes no rates)"
        )
    return (
        f"cost        not known: lib/chips.py has no {plan.pay} price of this chip: "
        "give one in dollars per chip and hour"
    )


def compare(
    plan: Plan, seconds: float, tokens: int, flops_per_token: int, flops: float | None
) -> str:
    """What came of a plan, in a sentence.

    After `tokens` were trained in `seconds` on devices that make `flops` a second.
    """
    hours = seconds / 3600
    parts = [f"took {hours:.2f} h for the steps, not planned"]
    if plan.hours is not None:
        parts = [f"planned {plan.hours:.2f} h, took {hours:.2f} h for the steps"]
    if flops and seconds:
        reached = tokens * flops_per_token / seconds / flops
        parts.append(f"planned {plan.mfu:.0%} MFU, reached {reached:.1%}")
    if plan.units is not None and plan.units_per_hour is not None:
        spent = hours * plan.units_per_hour
        parts.append(f"planned {plan.units:.1f} compute units, spent {spent:.1f} on them")
    elif plan.cost is not None and plan.price_per_hour is not None:
        spent = hours * plan.price_per_hour
        parts.append(f"planned ${plan.cost:.2f}, spent ${spent:.2f} on them")
    return "; ".join(parts)
