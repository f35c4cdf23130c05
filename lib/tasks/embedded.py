"""Tasks made here by seeded generators: always there, offline.

What is held out is decided by the hash of what a question is about, never by chance: the numbers of
a sum, the word to spell, a fact together with the way it is asked for. So no test item, in whatever
wording, has a twin in training. Words are those of the standard library's sources, and in training
also ones coined from their parts; a word is a test word in all tasks or in none.
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
from collections.abc import Callable, Sequence

from lib import data
from lib.tasks.answers import last_number, number, said
from lib.tasks.items import Task

# one thing to ask about in so many is for tests
HELD_OUT = 10
TEST_ITEMS = 1000
# the model's own
NAME = "rawchat"


def held_out(about: str) -> bool:
    """Whether questions about this belong to the test split."""
    digest = hashlib.sha256(about.encode()).hexdigest()
    return int(digest[:8], 16) % HELD_OUT == 0


def make_items(name: str, one: Callable, train_items: int, split: str) -> list[dict]:
    """Items from `one(rng, split)`, which returns what it is about, a question, the answer's parts
    and its value, or None.
    """
    is_test = split == "test"
    size = TEST_ITEMS if is_test else train_items
    rng, distinct = random.Random(f"{name} {split}"), {}

    # so often at most: a small world (such as greetings) has fewer items than asked for
    for _ in range(20 * size):
        drawn = one(rng, split)
        if not drawn:
            continue
        about, question, parts, answer = drawn
        if held_out(about) != is_test:
            continue
        # questions of a test are independent: one about each thing
        distinct.setdefault(about if is_test else question, drawn)
        if len(distinct) == size:
            break

    items = []
    for i, (about, question, parts, answer) in enumerate(distinct.values()):
        asked = dict(role="user", content=question)
        answered = dict(role="assistant", content=parts)
        item = dict(
            id=f"{name}/{split}/{i}",
            about=about,
            answer=answer,
            messages=[asked, answered],
        )
        items.append(item)
    return items


def text(*words) -> dict:
    """A part of an answer that is plain text."""
    return dict(type="text", text=" ".join(map(str, words)))


def call(expression: str, result) -> list[dict]:
    """A use of the calculator and what it answers."""
    return [dict(type="python", text=expression), dict(type="python_output", text=str(result))]


# ---- what was answered ---------------------------------------------------------------------------


def same_number(item: dict, answer: str) -> bool:
    """The last number of the answer is the expected one."""
    return last_number(said(answer)) == number(item["answer"])


def same_end(item: dict, answer: str) -> bool:
    """The answer ends with the expected words, whatever its full stop and quotes; where they spell
    a word, with no letter more, and where they say one several times, not once more.
    """
    given, wanted = bare_words(said(answer)), bare_words(item["answer"])
    before, end = given[: -len(wanted)], given[-len(wanted) :]
    if end != wanted:
        return False
    if len(wanted) == 1 or not before:
        return True

    # "s c a t" does not spell cat, and "cat cat cat" is not cat twice
    spells = len(wanted[0]) == 1 and wanted[0].isalpha()
    repeats = len(set(wanted)) == 1
    letter_more = spells and len(before[-1]) == 1
    word_more = repeats and before[-1] == wanted[0]
    return not (letter_more or word_more)


def bare_words(text: str) -> list[str]:
    """The words of a text without quotes and stops."""
    return re.sub(r"[\s.!?\"'`,:]+", " ", text).split()


# ---- arithmetic through the calculator -----------------------------------------------------------

# ways to write each operation
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
# ways to ask for a result
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
# the same as stories from life, with their operation
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
# ways to say the result
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
    """Two or three numbers and what is done with them, through the calculator."""
    # the second number is short where the result would be long
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
        # nobody loses more than there is
        if sign in "-//":
            a, b = max(a, b), min(a, b)
        first, second = _written(a, commas), _written(b, commas)
        things, who = rng.choice(THINGS), rng.choice(PEOPLE)
        question = story.format(a=first, b=second, things=things, who=who)
    else:
        first, second = _written(a, commas), _written(b, commas)
        ask, term = rng.choice(ASK), rng.choice(WORDS_FOR[sign])
        question = ask.format(term.format(a=first, b=second))

    # the call first, then what it has answered
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
    ask = rng.choice(ASK)
    question = ask.format(rng.choice([f"{a} {sign} {b} {second} {c}", expression]))
    # at times in words
    if second == sign == "+" and rng.random() < 0.3:
        question = rng.choice(ASK).format(f"the sum of {a}, {b} and {c}")
    n = _evaluate(a, sign, b, second, c)
    answer = [*call(expression, n), text(rng.choice(RESULT).format(n))]
    return f"{sorted((a, b, c))}", question, answer, str(n)


def _evaluate(a, sign, b, second, c) -> int:
    """What three numbers come to: products before sums, else from left to right."""
    if second == "*" and sign != "*":
        return APPLY[sign](a, b * c)
    return APPLY[second](APPLY[sign](a, b), c)


# ---- words: spelling, counting, strings ----------------------------------------------------------


@functools.cache
def words() -> list[str]:
    """Lower-case words of 3 to 10 letters that the standard library's sources use at least three
    times, commonest first.
    """
    count = collections.Counter()
    for document in data.documents("stdlib", "train"):
        count.update(re.findall(r"\b[a-z]{3,10}\b", document))
    common = [word for word, n in count.items() if n >= 3]
    return sorted(common, key=lambda word: (-count[word], word))


# the commonest words, most of which are one token each
COMMONEST = 1500


def _word(rng, split) -> str:
    """A word: in tests a real one; in training mostly one coined, so that tokens' letters are
    learnt, not words.

    A token's letters can only be learnt where it is spelled, and a common word is a single token:
    so the beginning of a coined word is often a whole one, and often a common one. That may be a
    word of the tests, which is never asked about by itself.
    """
    word = rng.choice(words())
    if split == "test":
        return word

    other = rng.choice(words())
    how = rng.random()
    if how < 0.15:
        first_half = word[: rng.randrange(1, len(word))]
        second_half = other[rng.randrange(1, len(other)) :]
        return (first_half + second_half)[:10]
    if how < 0.75:
        if how < 0.45:
            word = words()[rng.randrange(COMMONEST)]
        return word + other[-rng.randint(1, 3) :]
    return word


def _shown(rng, word: str, split: str) -> str:
    """A word as people write it in a question, in training more often without quotes, for the blank
    before it makes other tokens of it. An answer says it in the same way, so that it is the same
    tokens again.
    """
    if split == "test":
        return rng.choice([f'"{word}"', f'"{word}"', f'"{word}"', f"'{word}'", word, word])
    return rng.choice([f'"{word}"', f"'{word}'", word, word, word])


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
    """A word with a blank after each letter: every letter is a token of its own."""
    return " ".join(word)


def spelling(rng, split):
    """A word, letter by letter."""
    word = _word(rng, split)
    shown = _shown(rng, word, split)
    question = rng.choice(SPELL).format(shown)
    answer = letters(word)
    return word, question, [text(f"{_named(shown)}:", answer)], answer


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
# where the letter is without quotes too
COUNT_BARE = [
    *COUNT,
    "How many {c}s are in {w}?",
    "How many {c}'s are in {w}?",
    "how many {c}'s are there in {w}",
]


def counting(rng, split):
    """How often a letter is in a word, counted by Python."""
    # how often is drawn first: else the answer would be 1 most of the time
    word, n = _word(rng, split), rng.choice([0, 1, 2, 2, 3])
    fitting = [c for c in "abcdefghijklmnopqrstuvwxyz" if word.count(c) == n]
    if not fitting:
        return None
    letter = rng.choice(fitting)

    # word and letter in the same quotes
    shown = _shown(rng, word, split)
    ask = rng.choice(COUNT_BARE if shown == word else COUNT)
    question = ask.format(c=shown.replace(word, letter), w=shown)

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
    "Say {w} {n} times.",
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
    """What can be done with a word, in the model's head: most ways begin by spelling it."""
    kind = rng.choice("upper join repeat reverse end end length".split())
    word, other = _word(rng, split), _word(rng, split)
    w = f'"{word}"' if kind == "join" else _shown(rng, word, split)
    spelt = f"{_named(w)}: {letters(word)}"

    # of the letters
    if kind == "upper":
        answer = letters(word.upper())
        question, stated = rng.choice(UPPER).format(w), f"{spelt}. In capital letters: {answer}"
    elif kind == "reverse":
        answer = letters(word[::-1])
        question, stated = rng.choice(REVERSE).format(w), f"{spelt}. Backwards: {answer}"
    elif kind == "end":
        end, verb, answer = rng.choice([("first", "start", word[0]), ("last", "end", word[-1])])
        question = rng.choice(END).format(w=w, e=end, v=verb)
        stated = f'{spelt}. The {end} letter is "{answer}".'
    elif kind == "length":
        counted = " ".join(f"{i} {c}" for i, c in enumerate(word, 1))
        answer = f"{len(word)} letters"
        question, stated = rng.choice(LENGTH).format(w), f"{_named(w)}: {counted}. It has {answer}."

    # of whole words, of which the second must be of the same split
    elif kind == "join":
        if held_out(other) != (split == "test"):
            return None
        answer = word + other
        question = rng.choice(JOIN).format(w, f'"{other}"')
        stated = f'Together they are "{answer}".'
    else:
        # with blanks between: run together, the second would be other tokens than the first
        n = rng.randrange(2, 10)
        answer = " ".join([word] * n)
        question = rng.choice(REPEAT).format(w=w, n=n)
        stated = f"{_named(w)} {n} times: {' '.join([w] * n)}"
    return word, question, [text(stated)], answer


# ---- the running Python --------------------------------------------------------------------------

# where functions are looked for
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
    for name in MODULES:
        module = importlib.import_module(name)
        for function in getattr(module, "__all__", dir(module)):
            # "e" and "pi" say nothing, and builtins need no module
            if function.startswith("_") or len(function) <= 2 or hasattr(builtins, function):
                continue
            if callable(getattr(module, function, None)):
                homes[function].add(name)

    # what has one home only, so that there is one answer
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
        subject = rng.choice(list(functions()))
        ask, answer = rng.choice(IN_MODULE), functions()[subject]
        stated = f"{subject} is in the module {answer}."
    elif kind == "keyword":
        subject, ask, answer, stated = _membership(rng, keyword.kwlist, IS_KEYWORD, "a keyword")
    elif kind == "builtin":
        names = [name for name in dir(builtins) if not name.startswith("_")]
        subject, ask, answer, stated = _membership(rng, names, IS_BUILTIN, "built in")
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
        subject, ask = str(items), rng.choice(ITEMS)
        # counted aloud
        counted = " ".join(f"{i}: {n}" for i, n in enumerate(items, 1))
        answer = f"{len(items)} item{'s' * (len(items) != 1)}"
        stated = f"{counted}. It has {answer}."
    return f"{subject} {ask}", ask.format(subject), [text(stated)], answer


def _membership(rng, names: Sequence[str], asks: list[str], what: str) -> tuple[str, str, str, str]:
    """(word, way to ask, answer, the answer as a sentence) of whether a word is one of `names`."""
    yes = rng.random() < 0.5
    # of more words, no would be the answer nearly always
    word = rng.choice(names if yes else words()[: 2 * len(names)])
    ask = rng.choice(asks)
    if word in names:
        return f'"{word}"', ask, "yes", f'Yes, "{word}" is {what}.'
    return f'"{word}"', ask, "no", f'No, "{word}" is not {what}.'


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
# subject: (ways to ask, what is answered, the word that the answer must have)
ABOUT = {
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


# a question with a greeting before it, with the model's name, or neither; and a greeting alone
GREETED = ["{hello}, {ask}", "{hello}! {ask}", "{hello} {name}, {ask}", "{ask}", "{ask} {name}"]
GREETING = ["{hello}", "{hello}!", "{hello} {name}", "{hello}, {name}!", "{hello}."]


def identity(rng, split):
    """Greetings, thanks, and who it is that answers."""
    subject = rng.choice(list(ABOUT))
    asks, answer, mark = ABOUT[subject]
    ask, hello = rng.choice(asks), rng.choice(HELLO)
    form = rng.choice(GREETED if ask else GREETING)
    question = form.format(hello=hello, ask=ask, name=NAME)

    # as people type: with a capital letter, or without the sign at the end
    capital = question[0].upper() + question[1:]
    question = rng.choice([question, capital, question.rstrip(".?!")])
    return question.lower(), question, [text(answer)], mark


def mentions(item: dict, answer: str) -> bool:
    """The answer has the word that it must have."""
    return item["answer"] in said(answer).lower()


def _task(name: str, one: Callable, train_items: int, grade: Callable) -> Task:
    """A task whose items are made when they are first asked for, once for each split."""
    items = functools.cache(functools.partial(make_items, name, one, train_items))
    return Task("generate", items, grade=grade)


TASKS: dict[str, Task] = {
    "arithmetic": _task("arithmetic", arithmetic, 15_000, same_number),
    "spelling": _task("spelling", spelling, 18_000, same_end),
    "counting": _task("counting", counting, 15_000, same_number),
    "strings": _task("strings", strings, 8_000, same_end),
    "pyfacts": _task("pyfacts", pyfacts, 8_000, fact),
    "identity": _task("identity", identity, 2_000, mentions),
}


# ---- several turns -------------------------------------------------------------------------------


@functools.cache
def dialogues(split: str) -> list[dict]:
    """Chats of two to four of the other tasks' items, the last of which is asked; it is in nothing
    else.
    """
    rng = random.Random(f"dialogues {split}")
    parts = [(name, task.items(split)) for name, task in TASKS.items() if name != "dialogues"]
    size = 6_000 if split == "train" else TEST_ITEMS
    made = []
    for i in range(size):
        # tasks first, then an item of each
        chosen = rng.choices(parts, k=rng.choice([2, 2, 3, 4]))
        turns = [rng.choice(items) for _, items in chosen]
        messages = []
        for turn in turns:
            messages += turn["messages"]

        # the last turn is the question
        task, _ = chosen[-1]
        item = dict(
            id=f"dialogues/{split}/{i}",
            about=turns[-1]["about"],
            answer=turns[-1]["answer"],
            task=task,
            messages=messages,
        )
        made.append(item)
    return made


def grade_dialogue(item: dict, answer: str) -> bool:
    """The last question is graded as its own task does."""
    grade = TASKS[item["task"]].grade
    return grade is not None and grade(item, answer)


TASKS["dialogues"] = Task("generate", dialogues, grade=grade_dialogue)
