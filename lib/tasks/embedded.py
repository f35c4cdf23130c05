"""Tasks made here by seeded generators: always there, offline.

What is held out is decided by the hash of what a question is about, never by chance: the numbers of
a sum, the word to spell, a fact together with the way it is asked for. So no test item, in whatever
wording, has a twin in training. Words are those of the standard library's sources, and in training
also ones coined from their halves; a word is a test word in all tasks or in none.
"""

import ast
import builtins
import collections
import functools
import hashlib
import importlib
import keyword
import operator
import random
import re
from collections.abc import Callable

from lib import data
from lib.tasks.answers import last_number, number, said
from lib.tasks.items import Task

HELD_OUT = 10  # one thing to ask about in so many is for tests
TEST_ITEMS = 1000
NAME = "rawchat"


def held_out(about: str) -> bool:
    """Whether questions about this belong to the test split."""
    return int(hashlib.sha256(about.encode()).hexdigest()[:8], 16) % HELD_OUT == 0


def make_items(name: str, one: Callable, train_items: int, split: str) -> list[dict]:
    """Items from `one(rng, split)`, which returns what it is about, a question, the answer's parts
    and its value, or None.
    """
    rng, found = random.Random(f"{name} {split}"), {}
    size = train_items if split == "train" else TEST_ITEMS
    for _ in range(20 * size):  # a small world (such as greetings) has fewer items than asked for
        drawn = one(rng, split)
        if drawn and held_out(drawn[0]) == (split == "test"):
            about, question, parts, answer = drawn
            distinct = about if split == "test" else question  # questions of a test are independent
            found.setdefault(distinct, (about, question, parts, answer))
            if len(found) == size:
                break
    return [
        dict(
            id=f"{name}/{split}/{i}",
            about=about,
            answer=answer,
            messages=[dict(role="user", content=question), dict(role="assistant", content=parts)],
        )
        for i, (about, question, parts, answer) in enumerate(found.values())
    ]


def text(*words) -> dict:
    return dict(type="text", text=" ".join(map(str, words)))


def call(expression: str, result) -> list[dict]:
    """A use of the calculator and what it answers."""
    return [dict(type="python", text=expression), dict(type="python_output", text=str(result))]


# ---- what was answered ---------------------------------------------------------------------------


def same_number(item: dict, answer: str) -> bool:
    return last_number(said(answer)) == number(item["answer"])


def same_end(item: dict, answer: str) -> bool:
    """The answer ends with the expected words, whatever its full stop and quotes; where they spell
    a word, with no letter more.
    """
    given, wanted = (
        re.sub(r"[\s.!?\"'`,:]+", " ", s).split() for s in (said(answer), item["answer"])
    )
    before, end = given[: -len(wanted)], given[-len(wanted) :]
    letter_more = (
        len(wanted) > 1
        and len(wanted[0]) == 1
        and wanted[0].isalpha()
        and before
        and len(before[-1]) == 1
    )
    return end == wanted and not letter_more


# ---- arithmetic through the calculator -----------------------------------------------------------

WORDS_FOR = {
    "+": [
        "{a} + {b}",
        "{a}+{b}",
        "{a} plus {b}",
        "the sum of {a} and {b}",
        "{a} and {b} added together",
        "{b} more than {a}",
    ],
    "-": [
        "{a} - {b}",
        "{a}-{b}",
        "{a} minus {b}",
        "the difference between {a} and {b}",
        "{a} less {b}",
        "{b} taken away from {a}",
    ],
    "*": [
        "{a} * {b}",
        "{a}*{b}",
        "{a} times {b}",
        "the product of {a} and {b}",
        "{a} multiplied by {b}",
        "{a} x {b}",
    ],
    "//": [
        "{a} // {b}",
        "{a}//{b}",
        "{a} divided by {b}, rounded down",
        "the whole part of {a} divided by {b}",
    ],
    "%": ["{a} % {b}", "{a} modulo {b}", "the remainder of {a} divided by {b}"],
}
ASK = [
    "What is {}?",
    "what is {}",
    "Calculate {}.",
    "Compute {}.",
    "How much is {}?",
    "Please work out {}.",
    "{}",
    "{} = ?",
    "Can you tell me {}?",
    "I need {}.",
    "Tell me {}, please.",
    "What do you get for {}?",
    "Give me {}.",
    "Find {}.",
]
STORIES = [
    ("+", "I have {a} {things} and get {b} more. How many do I have?"),
    ("+", "{who} has {a} {things} and finds {b} more. How many {things} does {who} have now?"),
    ("+", "There are {a} {things} in one box and {b} in another. How many are there in all?"),
    ("-", "I had {a} {things} and gave away {b}. How many are left?"),
    ("-", "{who} has {a} {things} and loses {b}. How many {things} does {who} have now?"),
    ("*", "A box holds {a} {things}. How many {things} are in {b} boxes?"),
    ("*", "{who} buys {a} bags of {b} {things} each. How many {things} is that?"),
    ("//", "{who} shares {a} {things} evenly among {b} friends. How many does each get?"),
]
THINGS = "apples books coins stones stamps cards shells pens eggs files tokens letters".split()
PEOPLE = "Ada Alan Grace Edsger Barbara Guido Donald Margaret Linus Katherine".split()
RESULT = ["The answer is {}.", "That is {}.", "It is {}.", "That makes {}.", "The result is {}."]
APPLY = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


def random_number(rng, digits: int) -> int:
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _written(n: int, commas: bool) -> str:
    """A number as people write it, at times with commas between its thousands."""
    return f"{n:,}" if commas else str(n)


def arithmetic(rng, split):
    kind = rng.random()
    sign = rng.choice(["+", "+", "-", "-", "*", "*", "//", "%"])
    a = random_number(rng, rng.choice([1, 2, 2, 3, 3, 4]))
    digits = [1, 2, 2, 3, 3, 4] if sign in "+-" else [1, 1, 2, 2, 3]
    b = random_number(rng, rng.choice(digits))
    if 0.2 <= kind < 0.35:
        return _of_three(rng, a, b)

    # a third of the large numbers have commas, which the calculator drops
    commas = (a + b) % 3 == 0
    if kind < 0.2:
        sign, story = rng.choice(STORIES)
        a, b = (max(a, b), min(a, b)) if sign in "-//" else (a, b)
        first, second = _written(a, commas), _written(b, commas)
        things, who = rng.choice(THINGS), rng.choice(PEOPLE)
        question = story.format(a=first, b=second, things=things, who=who)
    else:
        first, second = _written(a, commas), _written(b, commas)
        question = rng.choice(ASK).format(rng.choice(WORDS_FOR[sign]).format(a=first, b=second))
    if sign in ("//", "%") and b == 0:
        return None
    n = APPLY[sign](a, b)
    answer = [*call(f"{first}{sign}{second}", n), text(rng.choice(RESULT).format(n))]
    return f"{sorted((a, b))}", question, answer, str(n)


def _of_three(rng, a: int, b: int):
    """An expression of three numbers."""
    c, second = random_number(rng, rng.choice([1, 2, 3])), rng.choice("+-*")
    sign = rng.choice("+-*")
    expression = f"{a}{sign}{b}{second}{c}"
    question = rng.choice(ASK).format(rng.choice([f"{a} {sign} {b} {second} {c}", expression]))
    if second == sign == "+" and rng.random() < 0.3:
        question = rng.choice(ASK).format(f"the sum of {a}, {b} and {c}")
    n = _evaluate(a, sign, b, second, c)
    answer = [*call(expression, n), text(rng.choice(RESULT).format(n))]
    return f"{sorted((a, b, c))}", question, answer, str(n)


def _evaluate(a, sign, b, second, c) -> int:
    if second == "*" and sign != "*":
        return APPLY[sign](a, b * c)
    return APPLY[second](APPLY[sign](a, b), c)


# ---- words: spelling, counting, strings ----------------------------------------------------------


@functools.cache
def words() -> list[str]:
    """Lower-case words of 3 to 10 letters that the standard library's sources use at least three
    times, commonest first.
    """
    count = collections.Counter(
        w for d in data.documents("stdlib", "train") for w in re.findall(r"\b[a-z]{3,10}\b", d)
    )
    return sorted((w for w, n in count.items() if n >= 3), key=lambda w: (-count[w], w))


def _word(rng, split) -> str:
    """A word: in tests a real one, in training at times one coined from two halves, so that tokens'
    letters are learnt, not words.
    """
    word = rng.choice(words())
    if split == "train" and rng.random() < 0.4:
        other = rng.choice(words())
        word = word[: rng.randrange(1, len(word))] + other[rng.randrange(1, len(other)) :]
        word = word[:10]
    return word


def _shown(rng, word: str) -> str:
    """A word as people write it in a question. An answer says it in the same way, so that it is the
    same tokens again.
    """
    return rng.choice([f'"{word}"', f'"{word}"', f'"{word}"', f"'{word}'", word, word])


def _named(shown: str) -> str:
    """A word at the beginning of an answer: one without quotes follows other words, because a blank
    before it is part of its tokens.
    """
    return shown if shown[0] in "\"'" else f"The word {shown}"


SPELL = [
    "Spell {}.",
    "How do you spell {}?",
    "Spell the word {}.",
    "Please spell {}.",
    "Spell {} letter by letter.",
    "Which letters are in {}, in order?",
    "What are the letters of {}?",
    "Can you spell {} for me?",
    "spell {}",
    "Write {} one letter at a time.",
    "List the letters of the word {}.",
    "Break {} into its letters.",
]


def letters(word: str) -> str:
    return " ".join(word)


def spelling(rng, split):
    word = _word(rng, split)
    shown = _shown(rng, word)
    return (
        word,
        rng.choice(SPELL).format(shown),
        [text(f"{_named(shown)}:", letters(word))],
        letters(word),
    )


COUNT = [
    "How many {c} are in {w}?",
    "How many times does {c} appear in {w}?",
    "Count the {c} in {w}.",
    "How often does {w} contain {c}?",
    "How many times is the letter {c} in the word {w}?",
    "how many {c} in {w}",
    "Count the letter {c} in the word {w}.",
    "In {w}, how many {c} are there?",
    "How often is {c} in {w}?",
    "What is the number of {c} in {w}?",
    "How many letters {c} does {w} have?",
]
COUNT_BARE = [
    *COUNT,
    "How many {c}s are in {w}?",
    "How many {c}'s are in {w}?",
    "how many {c}'s are there in {w}",
]


def counting(rng, split):
    # else the answer would be 1 most of the time
    word, n = _word(rng, split), rng.choice([0, 1, 2, 2, 3])
    fitting = [c for c in "abcdefghijklmnopqrstuvwxyz" if word.count(c) == n]
    if not fitting:
        return None
    letter = rng.choice(fitting)
    shown = _shown(rng, word)
    question = rng.choice(COUNT_BARE if shown == word else COUNT).format(
        c=shown.replace(word, letter), w=shown
    )
    # what stands there in the tokens that the call needs
    counted = word if shown[0] == '"' else letters(word)
    parts = [
        text(f"{_named(shown)}:", letters(word)),
        *call(f'"{counted}".count("{letter}")', n),
        text(f'The letter "{letter}" appears {n} time{"s" * (n != 1)}.'),
    ]
    return word, question, parts, str(n)


# ---- strings -------------------------------------------------------------------------------------

UPPER = [
    "Write {} in upper case.",
    "Put {} in capital letters.",
    "What is {} in upper case?",
    "Uppercase {}.",
    "Capitalize all of {}.",
]
JOIN = [
    "Join {} and {}.",
    "Concatenate {} and {}.",
    "What is {} followed by {}?",
    "Put {} and {} together.",
    "What is {} + {}?",
]
REPEAT = [
    "Repeat {w} {n} times.",
    "Write {w} {n} times in a row.",
    "What is {w} * {n}?",
    "What is {w} repeated {n} times?",
]
REVERSE = [
    "Reverse {}.",
    "Spell {} backwards.",
    "Write the letters of {} in reverse order.",
    "What is {} backwards?",
]
END = [
    "What is the {e} letter of {w}?",
    "Which letter does {w} {v} with?",
    "Tell me the {e} letter of {w}.",
    "{e} letter of {w}?",
]
LENGTH = [
    "How many letters does {} have?",
    "How long is {}?",
    "What is the length of {}?",
    "How many letters are there in {}?",
]


def strings(rng, split):
    kind, word, other = (
        rng.choice("upper join repeat reverse end end length".split()),
        _word(rng, split),
        _word(rng, split),
    )
    w = _shown(rng, word) if kind not in ("join", "repeat") else f'"{word}"'
    spelt = f"{_named(w)}: {letters(word)}"
    if kind == "upper":
        answer = letters(word.upper())
        return (
            word,
            rng.choice(UPPER).format(w),
            [text(f"{spelt}. In capital letters:", answer)],
            answer,
        )
    if kind == "join":
        if held_out(other) != (split == "test"):
            return None
        answer = word + other
        return (
            word,
            rng.choice(JOIN).format(w, f'"{other}"'),
            [text(f'Together they are "{answer}".')],
            answer,
        )
    if kind == "repeat":
        n = rng.randrange(2, 5)
        answer = word * n
        return word, rng.choice(REPEAT).format(w=w, n=n), [text(f'That is "{answer}".')], answer
    if kind == "reverse":
        answer = letters(word[::-1])
        return word, rng.choice(REVERSE).format(w), [text(f"{spelt}. Backwards:", answer)], answer
    if kind == "end":
        end, verb, answer = rng.choice([("first", "start", word[0]), ("last", "end", word[-1])])
        question = rng.choice(END).format(w=w, e=end, v=verb)
        return word, question, [text(f'{spelt}. The {end} letter is "{answer}".')], answer
    counted = " ".join(f"{i} {c}" for i, c in enumerate(word, 1))
    answer = f"{len(word)} letters"
    return (
        word,
        rng.choice(LENGTH).format(w),
        [text(f"{_named(w)}: {counted}. It has {answer}.")],
        answer,
    )


# ---- the running Python --------------------------------------------------------------------------

MODULES = """
math cmath random statistics itertools functools operator collections string re textwrap json csv
time calendar os.path shutil glob fnmatch heapq bisect copy pprint base64 binascii hashlib secrets
struct inspect ast tokenize difflib gzip bz2 lzma zipfile tarfile tempfile threading subprocess
socket select signal contextlib dataclasses enum decimal fractions urllib.parse html getpass
locale traceback warnings weakref gc pickle shelve
""".split()
OPERATORS = {
    "+": "addition",
    "-": "subtraction",
    "*": "multiplication",
    "/": "division",
    "//": "floor division",
    "%": "remainder",
    "**": "power",
    "==": "equality",
    "!=": "inequality",
    "<": "less than",
    ">": "greater than",
    "<=": "at most",
    ">=": "at least",
    "&": "bitwise and",
    "|": "bitwise or",
    "^": "bitwise exclusive or",
    "~": "bitwise inversion",
    "<<": "left shift",
    ">>": "right shift",
    "@": "matrix multiplication",
    ":=": "assignment within an expression",
}
IN_MODULE = [
    "Which module has {}?",
    "In which module is {}?",
    "Where do I import {} from?",
    "What module is {} in?",
    "Which Python module defines {}?",
    "Where is {} in the standard library?",
]
IS_KEYWORD = [
    "Is {} a Python keyword?",
    "Is {} a keyword?",
    "Is {} a reserved word in Python?",
    "Can I not use {} as a name in Python?",
]
IS_BUILTIN = [
    "Is {} a builtin?",
    "Is {} built into Python?",
    "Can I use {} without importing it?",
    "Is {} a built-in name?",
]
OPERATOR = [
    "What does {} do in Python?",
    "What does the operator {} mean?",
    "Which operation is {}?",
    "What is {} in Python?",
]
TYPE = ["What is the type of {}?", "What type has {}?", "type({})?", "Which type is {}?"]
ITEMS = [
    "How many items has {}?",
    "What is len({})?",
    "What is the length of the list {}?",
    "len({}) = ?",
]


@functools.cache
def functions() -> dict[str, str]:
    """Public function -> the one module of MODULES that has it, as the running Python says."""
    homes = collections.defaultdict(set)
    for module in MODULES:
        found = importlib.import_module(module)
        for name in getattr(found, "__all__", dir(found)):
            public = not name.startswith("_") and len(name) > 2 and not hasattr(builtins, name)
            if public and callable(getattr(found, name, None)):
                homes[name].add(module)
    return {name: min(modules) for name, modules in sorted(homes.items()) if len(modules) == 1}


def _literal(rng) -> str:
    """A small Python literal or collection of literals."""

    def number() -> str:
        return str(random_number(rng, rng.choice([1, 2, 3])))

    def word() -> str:
        return f'"{rng.choice(words())}"'

    return rng.choice(
        [
            number,
            lambda: f"{number()}.{number()}",
            word,
            lambda: rng.choice(["True", "False", "None"]),
            lambda: f"[{number()}, {number()}]",
            lambda: f"({word()}, {number()})",
            lambda: f"{{{word()}: {number()}}}",
            lambda: f"{{{number()}, {number()}}}",
            lambda: f"b{word()}",
            lambda: f"{number()}j",
        ]
    )()


def pyfacts(rng, split):
    """Facts are few, so what is held out is a fact asked in one of its ways; the facts themselves
    are there to be learnt.
    """
    kind = rng.choice("module module keyword builtin operator type type items".split())
    if kind == "module":
        name = rng.choice(list(functions()))
        ask, answer = rng.choice(IN_MODULE), functions()[name]
        stated, subject = f"{name} is in the module {answer}.", name
    elif kind in ("keyword", "builtin"):
        yes = rng.random() < 0.5
        inside = (
            keyword.kwlist
            if kind == "keyword"
            else [n for n in dir(builtins) if not n.startswith("_")]
        )
        # of more words, no would be the answer nearly always
        subject = rng.choice(inside if yes else words()[: 2 * len(inside)])
        yes = subject in inside
        ask, what = (IS_KEYWORD, "a keyword") if kind == "keyword" else (IS_BUILTIN, "built in")
        ask, answer = rng.choice(ask), "yes" if yes else "no"
        stated = f'{answer.title()}, "{subject}" is {"" if yes else "not "}{what}.'
        subject = f'"{subject}"'
    elif kind == "operator":
        subject = rng.choice(list(OPERATORS))
        ask, answer = rng.choice(OPERATOR), OPERATORS[subject]
        stated = f"{subject} is {answer}."
    elif kind == "type":
        subject = _literal(rng)
        ask, answer = rng.choice(TYPE), type(ast.literal_eval(subject)).__name__
        stated = f"{subject} is of type {answer}."
    else:
        items = [random_number(rng, rng.choice([1, 2])) for _ in range(rng.randrange(1, 9))]
        subject, ask, answer = (
            str(items),
            rng.choice(ITEMS),
            f"{len(items)} item{'s' * (len(items) != 1)}",
        )
        stated = " ".join(f"{i}: {n}" for i, n in enumerate(items, 1)) + f". It has {answer}."
    return f"{subject} {ask}", ask.format(subject), [text(stated)], answer


def fact(item: dict, answer: str) -> bool:
    """Yes and no are said first, everything else last."""
    if item["answer"] in ("yes", "no"):
        return re.match(rf"{item['answer']}\b", said(answer).lower()) is not None
    return same_end(item, answer)


# ---- greetings and who it is ---------------------------------------------------------------------

HELLO = [
    "hi",
    "hello",
    "hey",
    "good morning",
    "good evening",
    "good afternoon",
    "greetings",
    "hi there",
    "hello there",
    "hey there",
    "howdy",
]
ABOUT = {  # subject: (ways to ask, what is answered, the word that the answer must have)
    "name": (
        [
            "who are you?",
            "what is your name?",
            "what are you called?",
            "tell me your name.",
            "do you have a name?",
            "introduce yourself.",
            "what should I call you?",
            "and who are you?",
            "may I ask who you are?",
        ],
        f"I am {NAME}, a small language model.",
        NAME,
    ),
    "nature": (
        [
            "are you a human?",
            "are you a person?",
            "are you real?",
            "what are you?",
            "are you a robot?",
            "are you an AI?",
            "am I talking to a machine?",
            "are you a computer program?",
        ],
        f"I am a computer program: a small language model called {NAME}.",
        "program",
    ),
    "maker": (
        [
            "who made you?",
            "how were you made?",
            "where do you come from?",
            "who trained you?",
            "how were you trained?",
            "what were you trained on?",
            "what have you read?",
        ],
        "I was trained from scratch on the source code of Python's standard library.",
        "python",
    ),
    "skills": (
        [
            "what can you do?",
            "how can you help me?",
            "help",
            "what are you good at?",
            "what do you know?",
            "what can I ask you?",
        ],
        "I can calculate, spell words, count letters and tell small facts about Python.",
        "calculate",
    ),
    "thanks": (
        [
            "thanks",
            "thank you",
            "thank you very much",
            "thanks a lot",
            "great, thanks",
            "cheers",
            "many thanks",
            "ok thanks",
        ],
        "You are welcome!",
        "welcome",
    ),
    "leaving": (
        [
            "bye",
            "goodbye",
            "see you",
            "see you later",
            "good night",
            "bye bye",
            "I have to go",
            "until next time",
        ],
        "Goodbye!",
        "goodbye",
    ),
    "feeling": (
        [
            "how are you?",
            "how are you doing?",
            "how is it going?",
            "are you well?",
            "how do you do?",
            "what's up?",
        ],
        "I am fine, thank you. What can I do for you?",
        "fine",
    ),
    "hello": (
        ["", "nice to meet you.", "is anyone there?", "can you hear me?", "are you there?"],
        "Hello! How can I help you?",
        "hello",
    ),
}


def identity(rng, split):
    subject = rng.choice(list(ABOUT))
    asks, answer, mark = ABOUT[subject]
    ask, hello = rng.choice(asks), rng.choice(HELLO)
    question = rng.choice(
        ["{hello}, {ask}", "{hello}! {ask}", "{hello} {name}, {ask}", "{ask}", "{ask} {name}"]
        if ask
        else ["{hello}", "{hello}!", "{hello} {name}", "{hello}, {name}!", "{hello}."]
    )
    question = question.format(hello=hello, ask=ask, name=NAME)
    question = rng.choice([question, question[0].upper() + question[1:], question.rstrip(".?!")])
    return question.lower(), question, [text(answer)], mark


def mentions(item: dict, answer: str) -> bool:
    return item["answer"] in said(answer).lower()


TASKS: dict[str, Task] = {
    name: Task(
        "generate", functools.cache(functools.partial(make_items, name, one, size)), grade=grade
    )
    for name, (one, size, grade) in dict(
        arithmetic=(arithmetic, 15_000, same_number),
        spelling=(spelling, 18_000, same_end),
        counting=(counting, 15_000, same_number),
        strings=(strings, 8_000, same_end),
        pyfacts=(pyfacts, 8_000, fact),
        identity=(identity, 2_000, mentions),
    ).items()
}


# ---- several turns -------------------------------------------------------------------------------


@functools.cache
def dialogues(split: str) -> list[dict]:
    """Chats of two to four of the other tasks' items, the last of which is asked; it is in nothing
    else.
    """
    rng = random.Random(f"dialogues {split}")
    parts = [(name, task.items(split)) for name, task in TASKS.items() if name != "dialogues"]
    made = []
    for i in range(6_000 if split == "train" else TEST_ITEMS):
        turns = [
            (name, rng.choice(items))
            for name, items in rng.choices(parts, k=rng.choice([2, 2, 3, 4]))
        ]
        name, last = turns[-1]
        made.append(
            dict(
                id=f"dialogues/{split}/{i}",
                about=last["about"],
                answer=last["answer"],
                task=name,
                messages=[m for _, item in turns for m in item["messages"]],
            )
        )
    return made


def grade_dialogue(item: dict, answer: str) -> bool:
    """The last question is graded as its own task does."""
    grade = TASKS[item["task"]].grade
    return grade is not None and grade(item, answer)


TASKS["dialogues"] = Task("generate", dialogues, grade=grade_dialogue)
