#!/usr/bin/env bash
# Sets up .venv and runs the tests on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup.sh

usage="usage: bash run_tests.sh [--fast | --colab | --interop | --setup-only] [ARGUMENTS FOR PYTEST]

  (nothing)     all tests, but those that rebuild Colab's machines
  --fast        what takes no notebook, browser, sandbox wall, second process or TPU compiler: three minutes on two cores
  --colab       the notebooks on Colab's and Kaggle's own package versions (needs a network)
  --interop     exports and imports by the programs that they are for; installs transformers, torch (1 GB), llama.cpp,
                onnxruntime, LiteRT
  --setup-only  stop after the set-up

such as: bash run_tests.sh --fast -k optim      bash run_tests.sh tests/data"

which=(-m "not colab")
case ${1:-} in
    --help | -h) echo "$usage"; exit ;;
    --fast) shift; which=(-m "not slow and not tpu and not colab") ;;
    --colab) shift; which=(-m colab) ;;
    --interop) shift; which=(tests/interop); set_up=interop ;;
esac
setup dev
if [ "${set_up:-}" = interop ]; then
    # torch's usual build brings 3 GB of CUDA: without a GPU it is the other that is wanted, from no further index
    if [ "$device" = cpu ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        index=https://download.pytorch.org/whl/cpu
        PIP_EXTRA_INDEX_URL=$index .venv/bin/python -m pip install --quiet --no-deps --index-url $index torch
    fi
    setup dev hf gguf onnx
    # not as an extra: the converter names xdsl, which it does not use, and which holds much else at old versions
    if ! .venv/bin/python -c 'import litert_converter, ai_edge_quantizer' 2>/dev/null; then
        .venv/bin/python -m pip install --quiet ai-edge-litert ai-edge-quantizer
        .venv/bin/python -m pip install --quiet --no-deps litert-converter
    fi
fi
[ "${1:-}" != --setup-only ] || exit 0

cores=$(getconf _NPROCESSORS_ONLN)
export JAX_PLATFORMS=cpu
# one worker more than cores, as many tests wait for processes; tests/conftest.py says which files begin first
exec .venv/bin/python -m pytest -q -n $((cores < 8 ? cores + 1 : 8)) --dist loadfile --no-loadscope-reorder "${which[@]}" "$@"
