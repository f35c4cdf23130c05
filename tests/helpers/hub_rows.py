"""Rows as the Hub has them, and the items that they must become."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

PROMPT = (
    "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
    'def area(r):\n    """ Area of half a circle. """\n'
)
BODY = "    return half(math.pi * r * r)\n"
TEST = (
    "def check(candidate):\n"
    "    assert abs(candidate(2) - 6.2832) < 1e-3\n    assert candidate(0) == 0\n"
)
LETTER = "\n\nAnswer with the letter alone."
CHAT = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello!")]
FOUR = dict(text=["ice", " steam", "fog", "snow "], label=["1", "2", "3", "4"])

# A row as the Hub has it, and the item it must become (id apart), both written by hand.
ROWS = {
    "smoltalk": (dict(messages=CHAT, source="smol"), dict(messages=CHAT)),
    "mmlu": (
        dict(question="What is 2+2? ", subject="maths", choices=["1", "4", "5", "22"], answer=1),
        dict(
            messages=[
                dict(
                    role="user",
                    content="What is 2+2?\n\n- 1=A\n- 4=B\n- 5=C\n- 22=D" + LETTER,
                ),
                dict(role="assistant", content="B"),
            ],
            letters=["A", "B", "C", "D"],
            gold=1,
            question="What is 2+2?",
            options=["1", "4", "5", "22"],
            subject="maths",
        ),
    ),
    "arc_easy": (
        dict(id="X_1", question="What is hot?", choices=FOUR, answerKey="2"),
        dict(
            messages=[
                dict(
                    role="user",
                    content="What is hot?\n\n- ice=1\n- steam=2\n- fog=3\n- snow=4" + LETTER,
                ),
                dict(role="assistant", content="2"),
            ],
            letters=["1", "2", "3", "4"],
            gold=1,
            question="What is hot?",
            options=["ice", "steam", "fog", "snow"],
        ),
    ),
    "arc_challenge": (
        dict(
            id="X_2",
            question="Which?",
            choices=dict(text=["a", "b", "c"], label=["A", "B", "C"]),
            answerKey="C",
        ),
        dict(
            messages=[
                dict(
                    role="user",
                    content="Which?\n\n- a=A\n- b=B\n- c=C\n\nAnswer with the letter alone.",
                ),
                dict(role="assistant", content="C"),
            ],
            letters=["A", "B", "C"],
            gold=2,
            question="Which?",
            options=["a", "b", "c"],
        ),
    ),
    "gsm8k": (
        dict(
            question="How much?",
            answer="It is 12*100=<<12*100=1200>>1200.\n"
            "Less 0.5: <<1200-0.5=1199.5>>1199.5.\n#### 1,199.5",
        ),
        dict(
            messages=[
                dict(role="user", content="How much?"),
                dict(
                    role="assistant",
                    content=[
                        dict(type="text", text="It is 12*100="),
                        dict(type="python", text="12*100"),
                        dict(type="python_output", text="1200"),
                        dict(type="text", text="1200.\nLess 0.5: "),
                        dict(type="python", text="1200-0.5"),
                        dict(type="python_output", text="1199.5"),
                        dict(type="text", text="1199.5.\n#### 1,199.5"),
                    ],
                ),
            ],
            answer="1199.5",
        ),
    ),
    "humaneval": (
        dict(
            task_id="HumanEval/0",
            prompt=PROMPT,
            canonical_solution=BODY,
            test=TEST,
            entry_point="area",
        ),
        dict(
            messages=[
                dict(role="user", content=f"Complete this Python program:\n```python\n{PROMPT}```"),
                dict(role="assistant", content=f"```python\n{PROMPT}{BODY}```"),
            ],
            prompt=PROMPT,
            test=TEST,
            entry_point="area",
        ),
    ),
    "hellaswag": (
        dict(
            ind=1,
            activity_label="Cooking",
            ctx_a="A man [x] stands.",
            ctx_b="he",
            ctx="A man stands. He",
            label="2",
            endings=["eats.", "[substeps] cuts  it.", "runs [title] Then stops", "sleeps."],
        ),
        dict(
            context="Cooking: A man stands. He",
            choices=[" eats.", " cuts it.", " runs. Then stops", " sleeps."],
            gold=2,
        ),
    ),
    "piqa": (
        dict(goal="Open a jar", sol1="Twist the lid.", sol2=" Eat the lid.", label=0),
        dict(
            context="Question: Open a jar\nAnswer:",
            choices=[" Twist the lid.", " Eat the lid."],
            gold=0,
        ),
    ),
    "winogrande": (
        dict(
            sentence="The cup did not fit the bag, as the _ was too large.",
            option1="cup",
            option2="bag",
            answer="1",
        ),
        dict(
            context=[
                "The cup did not fit the bag, as the cup",
                "The cup did not fit the bag, as the bag",
            ],
            choices=[" was too large."] * 2,
            gold=0,
        ),
    ),
    "lambada": (
        dict(text="He opened the door and saw the old dog"),
        dict(context="He opened the door and saw the old", choices=[" dog"], gold=0),
    ),
    "wikitext103": (
        dict(text=" = A Title = \n"),
        dict(
            text="= A Title =\n\nIt cost 1,000 pounds (well-known), "
            'he said: "don\'t".\n== Part ==\n\n',
            words=29,
        ),
    ),
}
ARTICLE = [
    " = A Title = \n",
    " \n",
    ' It cost 1 @,@ 000 pounds ( well @-@ known ) , he said : " don \'t " . \n',
    " = = Part = = \n",
    " \n",
]


def parquet(rows) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def rows_of(name, split="test", n=5):
    """n rows like the one above in which nothing that counts differs."""
    if name == "wikitext103":
        return [dict(text=line) for line in ARTICLE * n]
    return [ROWS[name][0]] * n
