"""A script without a main guard that reads texts as tokens, and has no jax.

Argument: the texts; the tokenizer and the cache are in the current folder.
"""

import sys

from lib.data import Tokenizer, open_tokens

assert "jax" not in sys.modules
print("top level")
tokens = open_tokens(sys.argv[1], "train", Tokenizer.load("tokenizer.json"), cache_dir="cache")
print(tokens[0].ids.size > 100)
