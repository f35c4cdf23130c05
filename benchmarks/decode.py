"""Speed of decoding against what the device allows: `python -m benchmarks.decode --help`.

A token needs every matrix of the blocks and the head read once, so at best bandwidth / bytes tokens
a second come out of one row. The bandwidth is measured here, between the runs, on as many bytes as
the weights have (they may stay in a cache) and on far more.
"""

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from lib.runtime import keep_memory


@dataclass
class Args:
    config: str = "small"
    """small (of benchmarks.train_step) or a preset of lib.config, with random weights"""
    overrides: str = ""
    """Config fields by name, like: n_kv_head=1 compute_dtype=bfloat16"""
    run: str = ""
    """Take a trained run's model instead; needed for the drafts' shares and for the quality of
    int8
    """
    draft: str = ""
    """A second run with the same tokenizer whose model drafts for the first"""
    prompt: int = 64
    """Prompt tokens"""
    new: int = 128
    """New tokens"""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Rows decoded together, one line each: samples of one prompt"""
    speculate: int = 4
    """Tokens drafted ahead in the speculative lines"""
    repeats: int = 5
    """Rounds; each measures everything once, in turns, and the best of each counts"""
    first: int = 512
    """Prompt tokens for the time to first token"""
    nanochat: str = ""
    """A checkout of nanochat, to time its engine on the same shapes in the same rounds"""
    torch_python: str = "python"
    """A Python that has torch, for nanochat"""
    json: str = ""
    """Also write the result to this file"""


NANOCHAT = """
import json, sys, time
path, new = sys.argv[1], int(sys.argv[4])
shape, prompt = json.loads(sys.argv[2]), json.loads(sys.argv[3])
sys.path.insert(0, path)
import torch
from nanochat.gpt import GPT, GPTConfig
from nanochat.engine import Engine
class Words:
    encode_special = staticmethod(lambda name: -1)
    get_bos_token_id = staticmethod(lambda: -1)
torch.manual_seed(0)
model = GPT(GPTConfig(**shape)); model.init_weights(); model.eval()
engine, result = Engine(model, Words()), {}
for rows in (1, 8):
    times = []
    for _ in range(3):
        clock = time.perf_counter()
        samples = engine.generate(prompt, num_samples=rows, max_tokens=new, temperature=0.0)
        made = sum(1 for _ in samples)
        times.append(time.perf_counter() - clock)
    result[rows] = rows * made / min(times)
print(json.dumps(result))
"""


def nanochat_speed(args: Args, config, prompt) -> dict[str, float]:
    """Tokens a second of nanochat's cached engine by number of rows, prefill included."""
    from lib.files import UserError

    shape = dict(
        sequence_len=config.sequence_len,
        vocab_size=config.vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_kv_head=config.n_kv_head,
        n_embd=config.n_embd,
        window_pattern=config.window_pattern,
    )
    command = [
        args.torch_python,
        "-c",
        NANOCHAT,
        args.nanochat,
        json.dumps(shape),
        json.dumps(prompt),
        str(args.new),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.splitlines() or ["no message"])[-1]
        raise UserError(f"nanochat at {args.nanochat} did not run with {args.torch_python}: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args):
    import jax
    import numpy as np

    from benchmarks.train_step import CONFIGS
    from lib import data, evals, model
    from lib.config import PRESETS, Config
    from lib.files import UserError, choose, write_json
    from lib.generate import Engine, Engines, Sampling
    from lib.generate.engine import WHOLE_CHUNK, sides_for
    from lib.notebook import parse_overrides
    from lib.runs import load_model
    from lib.speed import LARGE, read_bandwidth

    if args.draft and not args.run:
        raise UserError("a draft model needs a trained model to draft for: pass --run too")
    text = None
    if args.run:
        loaded = load_model(Path(args.run))
        params, config, tokenizer = loaded.params, loaded.config, loaded.tokenizer
        if args.overrides:
            config = config.replace(**parse_overrides(args.overrides, Config))
        text = list(data.head(data.documents("stdlib", "val"), 400_000))
        prompts = [tokenizer.encode(t, bos=True)[: args.prompt] for t in text]
        prompts = [p for p in prompts if len(p) == args.prompt]
    else:
        config = Config.from_depth(
            **choose("config", args.config, CONFIGS | PRESETS)
            | parse_overrides(args.overrides, Config)
        )
        params = model.init_params(0, config)
        prompts = []
    rng = np.random.default_rng(0)
    prompts += [rng.integers(0, config.vocab_size, args.prompt).tolist()]
    ready = model.decoding_params(params, config)
    small = model.decoding_params(model.quantized(params, config), config)
    mixed = config.replace(compute_dtype="mixed")
    halves = model.decoding_params(params, mixed)
    read = lambda p: sum(
        a.nbytes for a in jax.tree.leaves([p["blocks"], p.get("head", p["embed"])])
    )
    weights = read(ready)
    draft = None
    if args.draft:
        other = load_model(Path(args.draft))
        draft = (other.params, other.config)

    engines = {}

    def decode(name, rows, params=ready, config=config, **options):
        """(tokens a second with prefill, milliseconds per step without) of greedy decoding."""
        if name not in engines:
            engines[name] = Engines(params, config, rows, args.prompt + args.new, **options)
            decode(name, rows)  # compiles
            for part in engines[name].parts:
                part.drafted = part.accepted = 0
        engine, clock = engines[name], time.perf_counter()
        engine.add_many(prompts[:1] * rows, [Sampling(args.new, temperature=0)] * rows)
        engine.step()
        begun, made, steps = time.perf_counter(), 0, 0
        while engine.free < rows:
            new = engine.step(WHOLE_CHUNK)
            made += sum(len(tokens) for tokens, _ in new.values())
            steps += max(len(tokens) for tokens, _ in new.values())
        end = time.perf_counter()
        assert made == rows * (args.new - 1)
        return rows * args.new / (end - clock), 1e3 * (end - begun) / steps

    length = min(args.first, config.sequence_len)
    long = rng.integers(0, config.vocab_size, length).tolist()
    first_engine = Engine(ready, config, 1, length + 8)
    whole = jax.jit(model.forward, static_argnums=1)

    def first_token():
        clock = time.perf_counter()
        slot = first_engine.add(long, Sampling(8, temperature=0))
        first_engine.step()
        passed = time.perf_counter() - clock
        first_engine.cancel(slot)
        return passed

    def one_forward():
        clock = time.perf_counter()
        jax.block_until_ready(whole(params, config, np.array([long]))[0])
        return time.perf_counter() - clock

    # what the others are compared with is always there
    lines = {f"batch {b}": dict(rows=b) for b in sorted({1, *args.batches})}
    lines |= {
        f"batch {b}, one engine": dict(rows=b, sides=1)
        for b in args.batches
        if sides_for(ready, b) > 1
    }
    for b in sorted({1, *args.batches} & {1, 8}):
        # only a CPU's decoding reads what the mixed mode rounds
        if jax.default_backend() == "cpu":
            lines[f"bfloat16, batch {b}"] = dict(rows=b, params=halves, config=mixed)
        lines[f"int8, batch {b}"] = dict(rows=b, params=small)
    lines[f"look-up {args.speculate}, batch 1"] = dict(rows=1, speculate=args.speculate)
    if draft:
        lines[f"draft {args.speculate}, batch 1"] = dict(
            rows=1, speculate=args.speculate, draft=draft
        )
    best, width, theirs, ttft, forward = {}, {}, {}, [], []
    for _ in range(args.repeats):
        for name, line in lines.items():
            best.setdefault(name, []).append(decode(name, **line))
        for size in (weights, LARGE):
            width[size] = max(width.get(size, 0), read_bandwidth(size))
        # the first, after other work, is slower: the best of all is that of a warm process
        for _ in range(3):
            ttft.append(first_token()), forward.append(one_forward())
        if args.nanochat:
            for rows, speed in nanochat_speed(args, config, prompts[0]).items():
                theirs[rows] = max(theirs.get(rows, 0), speed)
    result = dict(
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        dtype=str(config.dtype),
        config=args.run or args.config,
        overrides=args.overrides,
        prompt=args.prompt,
        new=args.new,
        repeats=args.repeats,
        weights_MB=round(weights / 1e6, 2),
        read_GBps={
            "weights": round(width[weights] / 1e9, 1),
            "large": round(width[LARGE] / 1e9, 1),
        },
        lines=[],
    )
    print(
        f"{result['device']}, {result['dtype']}: {weights / 1e6:.1f} MB of weights per step; the "
        f"device reads {LARGE >> 20} MiB at "
        ""
        f"{width[LARGE] / 1e9:.1f} GB/s, and as much as the weights, again and again, at "
        f"{width[weights] / 1e9:.1f} "
        "GB/s\n"
    )
    print(
        f"{'':22} {'tok/s':>8} {'ms/step':>8} {'GB/s':>7} {'of memory':>10} {'of cached':>10} "
        f"{'sides':>6} {'batch 1':>10}   "
        ""
        f"best of {args.repeats}; GB/s with the kv cache, shares for the weights alone"
    )
    best_of = lambda name: max(s for s, _ in best.get(name, [(float("nan"), 0)]))
    for name, line in lines.items():
        speed, step = max(s for s, _ in best[name]), min(ms for _, ms in best[name])
        engine = engines[name]
        cache = sum(
            a.nbytes
            for part in engine.parts
            for a in jax.tree.leaves([part.caches[0].k, part.caches[0].v])
        )
        need = sum(read(part.params[0]) for part in engine.parts)  # each reads the weights
        row = dict(
            name=name, sides=len(engine.parts), tokens_per_s=round(speed, 1), step_ms=round(step, 3)
        )
        row["median_tokens_per_s"] = round(float(np.median([s for s, _ in best[name]])), 1)
        if engine.parts[0].speculate:
            row |= dict(
                accepted=round(engine.accepted / engine.drafted, 3),
                speedup=round(speed / best_of("batch 1"), 3),
            )
            extra = f"   {row['accepted']:.0%} of drafts accepted, {row['speedup']:.2f} x batch 1"
        else:
            row |= dict(
                GBps=round((need + cache) / step / 1e6, 1),
                of_memory=round(need / width[LARGE] * 1e3 / step, 3),
                of_cached=round(need / width[weights] * 1e3 / step, 3),
            )
            row["of_batch_1"] = round(speed / best_of("batch 1"), 2)
            shares = f"{row['of_memory']:10.0%} {row['of_cached']:10.0%}"
            extra = f"{row['GBps']:7.1f} {shares} {row['sides']:6} {row['of_batch_1']:8.2f} x"
        print(f"{name:22} {speed:8.0f} {step:8.3f} {extra}")
        result["lines"].append(row)
    result |= dict(
        first_token_ms=round(1e3 * min(ttft), 2), forward_ms=round(1e3 * min(forward), 2)
    )
    print(
        f"\ntime to first token, {length} tokens: {1e3 * min(ttft):.1f} ms; one training forward "
        f"of them: {1e3 * min(forward):.1f} ms "
        ""
        f"({min(ttft) / min(forward):.2f} x)"
    )
    for rows, speed in theirs.items():
        ours = [line["tokens_per_s"] for line in result["lines"] if line["name"] == f"batch {rows}"]
        print(
            f"nanochat's engine, batch {rows}: {speed:.0f} tok/s"
            + (f" (ours {ours[0] / speed:.2f} x)" if ours else "")
        )
    result["nanochat_tokens_per_s"] = {rows: round(speed, 1) for rows, speed in theirs.items()}
    if text:
        held_out = data.tokens_of(text, tokenizer)
        batches = lambda: data.batches(held_out, config.microbatch, config.sequence_len, loop=False)
        bpb = {
            name: evals.bits_per_byte(p, config, batches(), tokenizer.token_bytes)
            for name, p in (("exact", ready), ("int8", small))
        }
        result["bits_per_byte"] = {name: b.bpb for name, b in bpb.items()}
        exact, int8 = bpb["exact"].bpb, bpb["int8"].bpb
        print(
            f"bits per byte of {bpb['exact'].bytes:,} held-out bytes: {exact:.5f}, int8 "
            f"{int8:.5f} "
            f"({int8 - exact:+.5f})"
        )
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    keep_memory()
    main(args)
