#!/usr/bin/env bash
# Sets up .venv and runs all tests on the CPU. `--setup-only` stops after set-up; all other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup.sh

case ${1:-} in
    --help | -h)
        echo "usage: bash run_tests.sh [--setup-only | ARGUMENTS FOR PYTEST, such as -k optim or tests/test_data.py]"
        exit ;;
esac
setup dev
[ "${1:-}" != --setup-only ] || exit 0

cores=$(getconf _NPROCESSORS_ONLN)
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$PWD/.cache/jax"
exec .venv/bin/python -m pytest -q -n $((cores < 8 ? cores : 8)) --dist loadfile "$@"
