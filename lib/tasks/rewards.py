"""What an answer is worth: reward(item, answer) -> a number, beside each task that can be checked.

A reward is paid for what it measures, so whatever earns it without being right will be learnt. So
graders here are stricter than those of an evaluation: one number and no other, said and not hidden
in a call of a tool. `answer` is what the model said (lib.data.speech.said), and an answer that was
cut before its end is not graded at all (lib.train.rollouts).
"""

import contextlib
import importlib.util
import math
import re
import reprlib
from collections.abc import Callable
from decimal import Decimal
from typing import cast

from lib.files import UserError, local_path
from lib.tasks.answers import number, numbers, said
from lib.tasks.embedded import bare_words, same_end

Reward = Callable[[dict, str], float]

# characters: no answer that is checked for a number needs more to say it
LONGEST = 200


# ---- graders -------------------------------------------------------------------------------------


def only_this_number(item: dict, answer: str) -> bool:
    """Whether the answer says the right number and no other: a list of guesses, or the question's
    numbers repeated, is worth nothing.
    """
    spoken = said(answer)
    values = numbers(spoken)
    if not values or len(spoken) > LONGEST:
        return False
    wanted = number(item["answer"])
    return wanted is not None and all(value == wanted for value in values)


def only_these_letters(item: dict, answer: str) -> bool:
    """Whether the answer spells the word, once, and spells nothing else."""
    spoken = said(answer)
    if len(spoken) > LONGEST:
        return False
    letters = [word for word in bare_words(spoken) if len(word) == 1]
    return letters == item["answer"].split()


def ends_so(item: dict, answer: str) -> bool:
    """Whether the answer ends with the right words, and is no longer than it takes to say them."""
    return len(said(answer)) <= LONGEST and same_end(item, answer)


# what may stand around a number behind the mark: blanks, emphasis, a currency
_AROUND = r"[\s*_$€£¥]*"
_GROUPED = r"\d{1,3}(?:,\d{3})+|\d+"
_AFTER_MARK = re.compile(rf"{_AROUND}([-+]?){_AROUND}((?:{_GROUPED})?(?:\.\d+)?)(.*)")


def careful_number(text: str) -> Decimal | None:
    """The number behind the last ####, as a careful reader takes it; None where there is none, or
    more than one (a fraction, a time, a list, "3 or 4").
    """
    _, mark, after = re.sub(r"<\|\w+\|>", " ", text).rpartition("####")
    match = _AFTER_MARK.match(after.replace("−", "-"))
    if not mark or match is None or not match[2]:
        return None
    sign, digits, rest = match.groups()
    # whatever else on this line has a digit makes it ambiguous
    if re.search(r"\d", rest):
        return None
    return Decimal(sign + digits.replace(",", ""))


def gsm8k(item: dict, answer: str) -> bool:
    """Whether the number behind #### is the item's, numbers compared as numbers."""
    value = careful_number(answer)
    return value is not None and value == number(item["answer"])


def nanochat_text(text: str) -> str | None:
    """What nanochat's grader takes as the answer: the text of digits, points and commas behind the
    first "#### ".
    """
    match = re.search(r"#### (-?[0-9.,]+)", text)
    return match[1].strip().replace(",", "") if match else None


def gsm8k_as_nanochat(item: dict, answer: str) -> bool:
    """nanochat's grader, for comparison: it compares texts, so that 5.0 is not 5, and 1/2 is 1."""
    value = nanochat_text(answer)
    return value is not None and value == item["answer"]


# ---- by name -------------------------------------------------------------------------------------

# task -> its reward, where that is stricter than the task's own grade
REWARDS: dict[str, Callable[[dict, str], float]] = {
    "arithmetic": only_this_number,
    "arithmetic_beyond": only_this_number,
    "two_steps": only_this_number,
    "counting": only_this_number,
    "spelling": only_these_letters,
    "strings": ends_so,
    "gsm8k": gsm8k,
    "gsm8k_as_nanochat": gsm8k_as_nanochat,
}


def reward_of(name: str, grade: Callable | None = None) -> Reward:
    """The reward of a task, or "FILE.py:FUNCTION" for the user's own.

    grade: the task's, which is the reward where REWARDS has none.
    """
    if ".py:" in name:
        return own_reward(name)
    reward = REWARDS.get(name, grade)
    if reward is None:
        known = ", ".join(REWARDS)
        raise UserError(
            f"task {name} has no reward: choose one of {known}, a task whose answers are graded, "
            "or your own as FILE.py:FUNCTION"
        )
    return reward


def own_reward(where: str) -> Reward:
    """The function of a file of the user's own, by "FILE.py:FUNCTION"."""
    file, _, name = where.rpartition(":")
    path = local_path(file)
    if not path.is_file():
        raise UserError(f"reward {where}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"reward {where}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    # a script's own end must not be ours
    except (Exception, SystemExit) as e:
        raise UserError(f"reward {where}: {path} cannot be run ({type(e).__name__}: {e})") from e
    reward = getattr(module, name, None)
    if not callable(reward):
        raise UserError(f"reward {where}: {path} has no function {name}(item, answer)")
    return cast(Reward, reward)


def score(reward: Reward, item: dict, answer: str) -> float:
    """What an answer is worth; UserError with the item's id where the reward raises or gives no
    number.
    """
    try:
        value = reward(item, answer)
    except (Exception, SystemExit) as e:
        raise UserError(f"the reward of item {item['id']} raised {type(e).__name__}: {e}") from e
    worth = math.nan
    # text could be read as a number too, and several numbers are none; 10**400 is beyond floats
    if isinstance(value, (bool, int, float)) or hasattr(value, "__float__"):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            worth = float(value)
    if not math.isfinite(worth):
        raise UserError(
            f"the reward of item {item['id']} is {shown(value)}: it must be a number, and finite"
        )
    return worth


def shown(value) -> str:
    """A value for a sentence, however long it is."""
    try:
        return reprlib.repr(value).replace("\n", " ")
    except ValueError:
        # Python does not write integers of thousands of digits
        return type(value).__name__
