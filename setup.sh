# Sourced by speedrun.sh and run_tests.sh, in the repository root: `setup [EXTRA…]` makes .venv and installs into it what
# pyproject.toml asks for, plus the named extras and the one for the device found. A second run finds all done.

supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
fail() { echo "error: $*" >&2; exit "${code:-1}"; }

# the first python in the supported range that really runs and can make virtual environments
find_python() {
    local p
    for p in python3.13 python3.12 python3.11 python3 python; do
        "$p" -c "import venv, ensurepip; $supported" 2>/dev/null && { command -v "$p"; return; }
    done
    fail "no working Python 3.11, 3.12 or 3.13 with its venv module here: install one (on Debian and Ubuntu:" \
         "apt install python3 python3-venv), then run this again"
}

# sets $device to tpu, gpu or cpu; TPUs show as PCI devices of Google (0x1ae0) with these ids
find_device() {
    local pci why gpus
    device=cpu why="no TPU on the PCI bus, no GPU listed by nvidia-smi"
    for pci in /sys/bus/pci/devices/*; do
        case $(cat "$pci/vendor" "$pci/device" 2>/dev/null | tr '\n' ' ') in
            "0x1ae0 0x0027 " | "0x1ae0 0x005e " | "0x1ae0 0x0062 " | "0x1ae0 0x0063 " | "0x1ae0 0x006f " | \
                "0x1ae0 0x0076 ")
                device=tpu why="a TPU is on the PCI bus" ;;
        esac
    done
    # all of the list is read: who leaves at its first line ends nvidia-smi, and then pipefail finds no GPU
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
    if [ $device = cpu ] && [ "$gpus" -gt 0 ]; then
        device=gpu why="nvidia-smi lists $gpus of them"
    fi
    echo "device: $device ($why)"
}

setup() {
    local extras base wanted log=.venv/install.log python=.venv/bin/python
    find_device
    extras=$(IFS=,; echo "$*${1:+,}$device"); extras=${extras%cpu}; extras=${extras%,}
    if [ -e .venv ] && ! $python -c '' 2>/dev/null; then
        echo "set-up: the python in .venv does not run (half made, or its base is gone): making .venv again"
        rm -rf .venv
    fi
    if [ ! -e .venv ]; then
        base=$(find_python) || exit 1
        echo "set-up: making .venv with $("$base" --version)"
        "$base" -m venv .venv || fail "could not make .venv with $base: is the disk full, or this folder not writable?"
    fi
    $python -c "$supported" ||
        fail ".venv has $($python --version), rawchat needs 3.11 to 3.13: delete .venv, then run this again"
    wanted="$(cksum < pyproject.toml) [$extras]"
    grep -qsxF "$wanted" .venv/rawchat-installed && { echo "set-up: .venv is up to date"; return; }
    echo "set-up: installing rawchat${extras:+[$extras]} into .venv (log: $log)"
    {
        { command -v uv && uv pip install --compile-bytecode --python $python -e ".${extras:+[$extras]}"; } || {
            $python -m pip --version || $python -m ensurepip
            $python -m pip install --disable-pip-version-check -e ".${extras:+[$extras]}"
        }
    } > $log 2>&1 || {
        tail -n 3 $log >&2
        grep -qiE 'connection|resolution|resolve host|dns|timed out|unreachable|network' $log \
            && fail "the package index cannot be reached: connect this machine to a network, then run this again"
        fail "the installation failed, $log has all of it: mend what it names, or delete .venv, then run this again"
    }
    # extras add up, but not those of another pyproject.toml
    { grep -sF "${wanted%%[*}" .venv/rawchat-installed || true; echo "$wanted"; } > .venv/rawchat-installed.new
    mv .venv/rawchat-installed.new .venv/rawchat-installed
}
