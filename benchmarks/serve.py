"""The server under load: throughput and waiting by number of clients, and its memory over many
requests.

    python -m benchmarks.serve --run demo --clients 1 8 32 --requests 1000 --json out.json

Starts a server of its own on a free port; clients are streaming HTTP requests from one asyncio loop
in this process, so on few cores they take some of the machine's time from it.
"""


async def ask(client, question: str, seed: int, max_tokens: int) -> tuple[float, float, int]:
    """One streamed answer: seconds to the first text, seconds in all, tokens."""
    import json
    import time

    body = {
        "messages": [{"role": "user", "content": question}],
        "seed": seed,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first, tokens = time.perf_counter(), None, None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if (
                    first is None
                    and event["choices"]
                    and event["choices"][0]["delta"].get("content")
                ):
                    first = time.perf_counter() - began
                tokens = event["usage"]["completion_tokens"] if event.get("usage") else tokens
    if tokens is None:
        raise RuntimeError("a stream ended before its usage")
    return first or time.perf_counter() - began, time.perf_counter() - began, tokens


async def crowd(
    url: str, clients: int, requests: int, max_tokens: int, after=lambda done: None
) -> list[tuple[float, float, int]]:
    """`requests` answers asked for by so many clients, each beginning its next when the last is
    there.
    """
    import asyncio

    import httpx

    results, left = [], iter(range(requests))
    questions = [
        "What is 37 plus 85?",
        'How many "r" are in "strawberry"?',
        'Spell the word "elephant".',
        "Who are you?",
    ]
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one():
            for i in left:
                results.append(await ask(client, questions[i % len(questions)], i, max_tokens))
                after(len(results))

        await asyncio.gather(*(one() for _ in range(clients)))
    return results


def memory_mb(pid: int) -> float:
    """Resident megabytes of a process on Linux."""
    from pathlib import Path

    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6


def main(
    run: str,
    stage: str = "",
    clients: tuple[int, ...] = (1, 8, 32),
    slots: int = 8,
    max_tokens: int = 64,
    requests: int = 1000,
    json: str = "",
) -> dict:
    """Serve a run and load it; prints a table, and the server's memory while `requests` requests go
    through.

    Args:
        run: run folder, runs/NAME or a path
        stage: base, mid, sft or rl; empty for the furthest that the run has
        clients: numbers of clients at once to measure
        slots: answers that the server writes at the same time
        max_tokens: longest answer
        requests: requests of the memory test, by the largest number of clients; 0 leaves it out
        json: file to write the figures to
    """
    import asyncio
    import os
    import re
    import statistics
    import subprocess
    import sys
    import time

    import httpx

    from lib.files import write_json

    command = [
        sys.executable,
        "-m",
        "lib.serve",
        "--run",
        run,
        "--stage",
        stage,
        "--port",
        "0",
        "--slots",
        str(slots),
        "--queue",
        str(max(clients) + 8),
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        if not (found := re.search(r"http://\S+", line)):
            raise SystemExit("the server did not start")
        url, rows, memory = found[0], [], []
        print(f"{line.strip()}, {slots} slots, {os.cpu_count()} cores")
        # compiles what several prompts at once need
        asyncio.run(crowd(url, max(clients), 4 * max(clients), max_tokens))
        # and the server by itself what single ones need
        while httpx.get(f"{url}/health").json()["warming"]:
            time.sleep(0.2)
        print(
            f"{'clients':>8} {'answers/s':>10} {'tokens/s':>9} {'first text s: median':>21} "
            f"{'worst':>6} {'answer s: median':>17} "
            f"{'worst':>6}"
        )
        for n in clients:
            began = time.perf_counter()
            results = asyncio.run(crowd(url, n, max(16, 4 * n), max_tokens))
            seconds = time.perf_counter() - began
            firsts, wholes = [r[0] for r in results], [r[1] for r in results]
            rows.append(
                dict(
                    clients=n,
                    answers_per_s=len(results) / seconds,
                    tokens_per_s=sum(r[2] for r in results) / seconds,
                    first_median=statistics.median(firsts),
                    first_worst=max(firsts),
                    whole_median=statistics.median(wholes),
                    whole_worst=max(wholes),
                )
            )
            print(
                "{clients:8} {answers_per_s:10.1f} {tokens_per_s:9.0f} {first_median:21.3f} "
                "{first_worst:6.2f} {whole_median:17.2f} "
                ""
                "{whole_worst:6.2f}".format(**rows[-1])
            )
        if requests:
            every = max(1, requests // 10)

            def after(done):
                if done % every == 0:
                    memory.append((done, memory_mb(server.pid)))
                    print(f"after {done:5} requests: {memory[-1][1]:7.1f} MB")

            print(
                f"memory of the server, {max(clients)} clients: {memory_mb(server.pid):.1f} MB "
                "before"
            )
            asyncio.run(crowd(url, max(clients), requests, max_tokens, after))
            late = memory[len(memory) // 2 :]
            print(f"growth over the second half: {late[-1][1] - late[0][1]:+.1f} MB")
    finally:
        server.terminate()
        server.wait()
    figures = dict(run=run, slots=slots, max_tokens=max_tokens, load=rows, memory_mb=memory)
    if json:
        write_json(json, figures)
    return figures


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
