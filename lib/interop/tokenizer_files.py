"""Our tokenizer in the files that transformers reads: the same ids, and chats rendered alike."""

import json
from pathlib import Path

from lib.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from lib.files import to_json

# what render_conversation does, in Jinja: the system's words join the first user message, and an
# assistant's message may be a list of text, calls and results
CHAT_TEMPLATE = """\
{{- '<|bos|>' -}}
{%- set system = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set system.text = message['content'] + '\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<|user_start|>' + system.text + message['content'] + '<|user_end|>' -}}
{%- set system.text = '' -%}
{%- elif message['content'] is string -%}
{{- '<|assistant_start|>' + message['content'] + '<|assistant_end|>' -}}
{%- else -%}
{{- '<|assistant_start|>' -}}
{%- for part in message['content'] -%}
{%- if part['type'] == 'python' -%}
{{- '<|python_start|>' + part['text'] + '<|python_end|>' -}}
{%- elif part['type'] == 'python_output' -%}
{{- '<|output_start|>' + part['text'] + '<|output_end|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{{- '<|assistant_end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte, as GPT-2 chose them: JSON can hold no lone bytes."""
    # letters that stand for themselves: no blanks, no control characters
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    letters = {byte: chr(byte) for byte in printable}
    # the others take letters beyond the first 256, in order
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


LETTERS = byte_letters()


def spelled(token: bytes) -> str:
    """A token's bytes as letters of `byte_letters`."""
    return "".join(LETTERS[byte] for byte in token)


def merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """The pairs that merging joins, in order: of each token the two parts that make it.

    The parts are what the older merges alone leave of its bytes. A token that they leave in more
    than two parts is reached by no merge, only as a whole word; it has no pair.
    """
    ranks = {token: rank for rank, token in enumerate(tokenizer.tokens)}
    pairs = []
    for rank, token in enumerate(tokenizer.tokens):
        parts = merged_below(token, ranks, rank)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def merged_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """What merges of ranks below `limit` leave of a token's bytes, the lowest rank first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        # the rank that each pair of neighbours would make
        joined = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:])]
        best = min(joined)
        if best >= limit:
            break
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The tokenizer as the `tokenizers` library reads it: BPE on the bytes of a pattern's words."""
    # text is cut into words by the pattern, words are spelled as letters for their bytes
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    as_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(name, i) for name, i in tokenizer.special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "post_processor": _bos_first(tokenizer),
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # a word that is a token is taken whole, as tiktoken does
            "ignore_merges": True,
            "vocab": {spelled(token): i for i, token in enumerate(tokenizer.tokens)},
            "merges": [[spelled(a), spelled(b)] for a, b in merges(tokenizer)],
        },
    }


def _special_token(name: str, i: int) -> dict:
    """A token that is found in text by its name, exactly as it is written."""
    return dict(
        id=i,
        content=name,
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
    )


def _bos_first(tokenizer: Tokenizer) -> dict:
    """What puts <|bos|> before every text, as every document that was trained on has it."""
    bos = SPECIAL_TOKENS[0]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path, length: int):
    """tokenizer.json, its config and the chat template, as transformers looks for them."""
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer_json(tokenizer), ensure_ascii=False), "utf-8"
    )
    # an answer ends with its own mark; what is left of a batch is filled up with the same
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(to_json(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
