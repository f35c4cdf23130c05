#!/usr/bin/env bash
# From nothing to a measured language model that chats: sets up .venv, then runs 01 → 02 → 04 (and 05 with --rl) and prints what came out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. ./setup.sh

usage() {
    cat <<'END'
usage: bash speedrun.sh [OPTIONS] [-- FLAGS FOR 02_train.py]

Makes .venv, installs, trains a tokenizer (01), pretrains a model (02), measures it, teaches it to chat and measures it
again (04), and prints a table and a talk with it. With --rl it then gets better at what can be checked (05).

  --preset NAME   model and training settings, from lib/config.py: cpu_demo, colab_free_v5e,
                  colab_free_t4, colab_v5e, colab_v6e, gpu, gpt2_like,
                  llama_like, nanochat_d12, nanochat_d20, nanochat_d24; default: the one for the device found
  --source WHAT   text to train on: stdlib (default; needs no network), stdlib_with_tests, climbmix, fineweb_edu,
                  tinystories, or your own files: a path or glob of .txt, .md, .py, .jsonl or .parquet
  --rl            reinforce it as the last stage: sums longer than it was taught (05)
  --run NAME      everything goes to runs/NAME (default: speedrun)
  --continue      take up runs/NAME where it stopped (the default); refused when it was made with other settings
  --fresh         start anew; what is in runs/NAME is moved to runs/NAME.old-1 and so on
  --help          this text

Flags after -- go to 02_train.py; `.venv/bin/python 02_train.py --help` lists them.
END
}

preset=auto source=stdlib run=speedrun fresh='' continue='' rl=''
while [ $# -gt 0 ]; do
    case $1 in
        --preset | --source | --run) [ $# -gt 1 ] || code=2 fail "$1 needs a value: see bash speedrun.sh --help"
            declare "${1#--}=$2"; shift 2 ;;
        --preset=* | --source=* | --run=*) value=${1#--}; declare "${value%%=*}=${value#*=}"; shift ;;
        --fresh) fresh=yes; shift ;;
        --rl) rl=yes; shift ;;
        --continue) continue=yes; shift ;;
        --help | -h) usage; exit ;;
        --) shift; break ;;
        *) code=2 fail "unknown argument $1: see bash speedrun.sh --help" ;;
    esac
done
[ -z "$fresh$continue" ] || [ "$fresh$continue" = yes ] ||
    code=2 fail "--fresh and --continue exclude each other: pass one"
case $run in '' | [.-]* | *[!A-Za-z0-9._-]*)
    code=2 fail "--run '$run' cannot name a folder: use letters, digits, . _ and -" ;;
esac

setup
[ "$device" = cpu ] && export JAX_PLATFORMS=cpu
python=.venv/bin/python folder=runs/$run
read -r preset vocab_size why < <($python -c '
import contextlib, sys
from lib import notebook, recipes
from lib.config import Config
notebook.setup()
with contextlib.redirect_stdout(sys.stderr):
    device = notebook.device_report()
name, why = (sys.argv[1], "asked for") if sys.argv[1] != "auto" else recipes.pick_preset(device)
print(name, Config.preset(name).vocab_size, why)
' "$preset") || exit 2
echo "preset: $preset ($why)"

if [ -n "$fresh" ] && [ -e "$folder" ]; then
    # a process that still trains there would go on writing into the new folder
    $python -c 'import sys; from lib import locks, notebook; notebook.setup(); locks.check_free(sys.argv[1])' "$folder" ||
        exit 2
    n=1
    while [ -e "$folder.old-$n" ]; do n=$((n + 1)); done
    mv "$folder" "$folder.old-$n"
    echo "run: starting anew, the old $folder is now $folder.old-$n"
elif [ -e "$folder" ]; then
    echo "run: continuing $folder"
else
    echo "run: starting $folder"
fi

stage() {
    echo; echo "== $*"
    $python "$@" || fail "$1 stopped. Run this again to go on from there, with --fresh to start anew," \
                         "or with --run OTHER beside it"
}
stage 01_tokenizer.py --run "$run" --source "$source" --vocab-size "$vocab_size"
stage 02_train.py --run "$run" --source "$source" --preset "$preset" "$@"
stage 04_eval_chat.py --run "$run"
[ -z "$rl" ] || stage 05_rl.py --run "$run"

echo
echo "report card: $folder/report.html"
echo "files: $folder    total time: $((SECONDS / 60)) min $((SECONDS % 60)) s"
