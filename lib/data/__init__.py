"""From text to rows of tokens, and nothing here imports JAX.

A source names text; `documents` reads one side of its split, `open_tokens` tokenises it into a
cache that worker processes fill, `batches` packs the tokens into rows with an exact cursor, and
`prefetch` moves them to the device ahead of time. Conversations go the same way: `read_chats`, then
`chat_batches`. `Tokenizer` serves both.
"""

from lib.data.chats import Chats, chat_batches, read_chats, render
from lib.data.download import CACHE, fetch
from lib.data.packing import PACKING, batches, epochs, prefetch, waste
from lib.data.sources import (
    SOURCES,
    SPLITS,
    baselines,
    changes,
    check_text,
    documents,
    find_shards,
    head,
    manifest,
)
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.tokens import Tokens, TokenShard, open_tokens, tokens_of

__all__ = [
    "CACHE",
    "PACKING",
    "SOURCES",
    "SPLITS",
    "Chats",
    "TokenShard",
    "Tokenizer",
    "Tokens",
    "baselines",
    "batches",
    "changes",
    "chat_batches",
    "check_text",
    "documents",
    "epochs",
    "fetch",
    "find_shards",
    "head",
    "load_tokenizer",
    "manifest",
    "open_tokens",
    "prefetch",
    "read_chats",
    "render",
    "tokens_of",
    "waste",
]
