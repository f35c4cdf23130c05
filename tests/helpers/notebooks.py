"""The notebooks as scripts:

their smallest settings, what they leave behind, how tests start them.
"""

import os
import subprocess
import sys
import sysconfig

from lib.data import documents, head
from lib.data.tokenizer import Tokenizer
from tests.helpers import ROOT

NOTEBOOKS = sorted(ROOT.glob("0*.py"))
CORPUS = f"{sysconfig.get_path('stdlib')}/[a-c]*.py"
TINY = (
    "total_batch_size=256 microbatch=4 sequence_len=64 n_embd=64 n_head=2 n_kv_head=1 head_dim=32 "
    "mlp_dim=128 "
    ""
    "warmup_steps=1"
)
# Smallest settings that still run every cell; the notebooks run in this order, each on what the
# last one left.
SMOKE = {
    "01_tokenizer": dict(run="smoke", source=CORPUS, vocab_size=512),
    "02_train": dict(
        run="smoke",
        source=CORPUS,
        preset="cpu_demo",
        depth=2,
        num_steps=4,
        overrides=TINY,
        eval_bytes=4000,
        eval_every=4,
        sample_every=4,
        save_every=2,
    ),
    "03_worker": dict(run="smoke", source=CORPUS, sweep="isoflop", budget="smoke", count=12),
    "04_eval_chat": dict(
        run="smoke",
        eval_bytes=4000,
        max_tokens=4,
        num_samples=1,
        mid="identity:0.02 spelling:0.001",
        sft_mixture="identity:0.01",
        tasks="identity spelling",
        task_items=4,
        say="Hi | What is 2+3?",
    ),
    "05_rl": dict(
        run="smoke",
        task="identity",
        reward=f"{ROOT / 'tests/programs/reward_of_length.py'}:of_length",
        num_steps=2,
        questions=4,
        samples=4,
        max_tokens=8,
        test_items=4,
        test_samples=2,
    ),
    "06_speed": dict(
        run="smoke", preset="cpu_demo", overrides=f"n_layer=1 {TINY}", rows="1 2", seconds=0.01
    ),
}
PRODUCTS = {
    "01_tokenizer": ["tokenizer.json", "results.json", "plots/tokenizer_compression.png"],
    "02_train": [
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "plots/training.png",
        "plots/masks.png",
    ],
    "03_worker": [
        f"sweeps/*/{name}"
        for name in (
            "trials.csv",
            "curves.csv",
            "curves.png",
            "best.png",
            "parallel.png",
            "importance.png",
            "isoflop.png",
            "frontier.png",
            "held_out.csv",
            "laws.json",
        )
    ],
    "04_eval_chat": [
        "plots/surprise.png",
        "plots/attention.png",
        "plots/fine_tuning.png",
        "plots/tasks.png",
        "mid",
        "sft",
        "evals/base.json",
        "evals/sft.json",
    ],
    "06_speed": ["cpu.json", "plots/products.png", "plots/roofline.png"],
    "05_rl": ["plots/reinforcement.png", "rl/step_00000002", "evals/rl.json"],
}


def save_tokenizer(run):
    """What 01 leaves in a run's folder and the others need: a small tokenizer of CORPUS."""
    tokenizer = Tokenizer.train(head(documents(CORPUS, "train"), 200_000), 512)
    tokenizer.save(run / "tokenizer.json")


def check_products(stem, run):
    assert [p for p in PRODUCTS[stem] if not list(run.glob(p))] == []


def words_of(settings):
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def script(source, *args, cwd):
    return subprocess.run(
        [sys.executable, source, *args],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
