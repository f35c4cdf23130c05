"""Who speaks when: ONE rule that brings any chat into turns, for files, the API and the terminal.

A model learns and reads chats in one shape: maybe a system's message, then user and assistant in
turn. What people send and what their files hold is looser; `in_turns` says what is made of it.
"""

from lib.data.tokenizer import PART_TYPES
from lib.files import UserError

# keys whose loss would change what a message means
CALLS = ("tool_calls", "function_call", "tool_call_id")


class BadMessage(UserError):
    """A chat without turns: the `index` of the message at fault, its `key` or "" for all of it."""

    def __init__(self, index: int, key: str, problem: str):
        super().__init__(f"message {index} {problem}")
        self.index, self.key = index, key


def in_turns(messages: list) -> list[dict]:
    """The same chat as [{"role", "content"}, ...]: maybe system, then user and assistant in turn.

    - developer is another name of system. Other roles, and calls in other APIs' form, are refused.
    - Text parts become one text. Only an assistant's calls and results stay parts.
    - Messages of one role in a row become one, a blank line between them.
    - The system speaks before all others; what it says later is read as the user's, and so joins
      the message beside it.
    - What the assistant says before any user's message answers nothing, and is left out.
    - An assistant's "weight" of 0 stays: it is read, but not learnt.

    Raises BadMessage. The last message may be anybody's; an empty chat stays empty.
    """
    turns: list[dict] = []
    for index, message in enumerate(messages):
        role, content = _checked(index, message)
        weight = _weight(index, role, message)
        if role == "system" and turns and turns[-1]["role"] != "system":
            role = "user"
        if turns and turns[-1]["role"] == role:
            if turns[-1].get("weight", 1) != weight.get("weight", 1):
                raise BadMessage(
                    index, "weight", "has another weight than the one before it, of the same role"
                )
            turns[-1]["content"] = _joined(turns[-1]["content"], content)
        elif role != "assistant" or any(turn["role"] == "user" for turn in turns):
            turns.append({"role": role, "content": content} | weight)
    return turns


def _checked(index: int, message) -> tuple[str, str | list[dict]]:
    """(role, content) of one message: the role known, the content text or an assistant's parts."""
    if not isinstance(message, dict) or "role" not in message:
        raise BadMessage(index, "", "is not an object with role and content")
    for key in CALLS:
        if message.get(key):
            raise BadMessage(
                index,
                key,
                f"holds {key}, which is not known here: write the call as a part",
            )

    role = "system" if message["role"] == "developer" else message["role"]
    if role not in ("system", "user", "assistant"):
        raise BadMessage(
            index, "role", f"has the role {str(role)[:50]!r} where system, user or assistant is due"
        )

    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, list):
        content = _flattened(index, role, content)
    if not isinstance(content, str | list):
        raise BadMessage(index, "content", "has a content that is not text")
    return role, content


def _weight(index: int, role: str, message: dict) -> dict:
    """{"weight": 0} of an assistant's message that is not to be learnt, else nothing."""
    weight = message.get("weight")
    if weight is None or role != "assistant" or weight == 1:
        return {}
    if weight != 0:
        raise BadMessage(index, "weight", f"has weight {weight!r}, where 0 or 1 is due")
    return {"weight": 0}


def _flattened(index: int, role: str, parts: list) -> str | list[dict]:
    """Content parts as one text where all of them are text, otherwise without their other keys."""
    kinds = PART_TYPES if role == "assistant" else ("text",)
    for part in parts:
        known = isinstance(part, dict) and part.get("type") in kinds
        if not known or not isinstance(part.get("text"), str):
            raise BadMessage(
                index,
                "content",
                'has parts that are not text, of the form {"type": "text", "text": …}: '
                "this model reads nothing else",
            )
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return [{"type": part["type"], "text": part["text"]} for part in parts]


def _joined(before: str | list[dict], after: str | list[dict]) -> str | list[dict]:
    """The contents of two messages of one role as one."""
    if isinstance(before, str) and isinstance(after, str):
        return f"{before}\n\n{after}"
    return [*_parts(before), {"type": "text", "text": "\n\n"}, *_parts(after)]


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
