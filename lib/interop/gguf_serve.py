"""Serves one GGUF file by llama.cpp until its input ends: `gguf_serve.py FILE CONTEXT`.

A process of its own, since llama.cpp may end or hang the one that it runs in. It prints where it
listens. Needs xllamacpp, and nothing of ours.
"""

import os
import sys

import xllamacpp  # pyright: ignore[reportMissingImports]


def settings(path: str, context: int) -> xllamacpp.CommonParams:
    """One row on the CPU, on any free port of this machine."""
    chosen = xllamacpp.CommonParams()
    chosen.model.path = path
    chosen.n_ctx = context
    chosen.n_parallel = 1
    chosen.n_gpu_layers = 0
    chosen.port = 0
    chosen.warmup = False
    chosen.verbosity = -1
    # as exact as it can: keys and values of the cache in float32, plain attention
    chosen.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    chosen.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    chosen.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return chosen


if __name__ == "__main__":
    server = xllamacpp.Server(settings(sys.argv[1], int(sys.argv[2])))
    print(server.listening_address, flush=True)
    # the end of the input: who started this has what it wanted, or is gone
    sys.stdin.read()
    # at once, for taking the server down was seen to wait for ever
    os._exit(0)
