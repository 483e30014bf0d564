"""Preparing raw text (quality rules, exact and MinHash duplicates, tokens): rate and peak memory, beside datatrove.

    python benchmarks/data.py --megabytes 50
    python benchmarks/data.py --megabytes 1000 --datatrove /path/to/venv/bin/python

The corpus is made from Python sources and documentation of this machine: paragraphs in new combinations, a tenth of the
documents exact copies, a tenth near copies. The tokenizer is trained before the clock starts. Both programs get the
same files and the same number of processes; datatrove runs its four MinHash steps only (no quality rules, no exact
duplicates, no tokens). Memory is the largest sum of resident sizes of the whole process tree, sampled at 20 Hz, so
pages that processes share are counted once for each. The corpus goes to a temporary folder and is deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

FILE_BYTES = 50_000_000

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.hashing import HashConfig

if __name__ == "__main__":
    source, out, workers, tasks = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    config = MinhashConfig(hash_config=HashConfig(precision=64), n_grams=5, num_buckets=14, hashes_per_bucket=8)
    reader = JsonlReader(source, glob_pattern="*.jsonl")
    log = dict(skip_completed=False)
    steps = [
        (tasks, [reader, MinhashDedupSignature(output_folder=f"{out}/sig", config=config, language="eng")]),
        (config.num_buckets, [MinhashDedupBuckets(f"{out}/sig", f"{out}/buckets", config=config)]),
        (1, [MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config=config)]),
        (tasks, [reader, MinhashDedupFilter(f"{out}/remove"), JsonlWriter(f"{out}/kept", compression=None)]),
    ]
    for number, (count, pipeline) in enumerate(steps):
        LocalPipelineExecutor(
            pipeline, tasks=count, workers=min(workers, count), logging_dir=f"{out}/log{number}", **log).run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--datatrove", help="python of an environment with datatrove and spacy")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glmctl-data-") as name:
        home = Path(name)
        size, documents = build(home / "corpus", args.megabytes * 1_000_000)
        (home / "tokenizer.yaml").write_text(
            f"type: tokenizer\nname: tok\nvocab_size: 8192\nsources: [{source(home, max_bytes=5_000_000)}]\n"
        )
        glmctl(home, "data", "tokenizer", "tokenizer.yaml")
        rows = []
        for turn in range(args.repeat):
            rows.append({"program": "glmctl", **ours(home, turn, args.workers)})
            print(rows[-1], file=sys.stderr)
            if args.datatrove:
                rows.append({"program": "datatrove", **theirs(home, turn, args.workers, args.datatrove)})
        report(rows, size, documents, args)


def paragraphs() -> list[str]:
    """Distinct paragraphs of 200 to 2000 characters: documentation and the text of Python sources."""
    found: set[str] = set()
    texts = list(topics.values())
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*.py"))[:6000]:
            if path.stat().st_size < 400_000:
                texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    for text in texts:
        found.update(part.strip() for part in text.split("\n\n") if 200 <= len(part) <= 2000)
    return sorted(found)


def build(folder: Path, size: int) -> tuple[int, int]:
    """Write JSON lines of about `size` bytes; returns bytes and documents."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    written = documents = 0
    stream: Any = None
    for text in pages(paragraphs(), rng):
        if stream is None or stream.tell() > FILE_BYTES:
            if stream is not None:
                stream.close()
            stream = open(folder / f"part-{written // FILE_BYTES:03d}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
        stream.write(line)
        written += len(line.encode())
        documents += 1
        if written >= size:
            break
    stream.close()
    return sum(path.stat().st_size for path in folder.iterdir()), documents


def pages(pool: list[str], rng: random.Random) -> Iterator[str]:
    """Documents of two to eight paragraphs, a tenth copies of recent ones, a tenth copies with a few words changed."""
    recent: list[str] = []
    while True:
        draw = rng.random()
        if recent and draw < 0.1:
            text = rng.choice(recent)
        elif recent and draw < 0.2:
            words = rng.choice(recent).split(" ")
            for at in rng.sample(range(len(words)), max(1, len(words) // 200)):
                words[at] = "changed"
            text = " ".join(words)
        else:
            text = "\n\n".join(rng.choices(pool, k=rng.randint(2, 8)))
            recent.append(text)
            if len(recent) > 2000:
                recent.pop(0)
        yield text


def source(home: Path, **fields: Any) -> str:
    body = {"type": "jsonl", "domain": "web", "paths": [str(home / "corpus")], **fields}
    return json.dumps(body)


def ours(home: Path, turn: int, workers: int) -> dict[str, Any]:
    stages = [
        {"type": "web_rules", "min_words": 20, "mean_word_length": [2, 20], "min_alphabetic_words": 0.3},
        {"type": "exact"},
        {"type": "minhash"},
        {
            "type": "score",
            "name": "quality",
            "scorer": {"type": "heuristic", "what": "web"},
            "cut_by": "quantile",
            "cuts": [0.1, 0.5, 0.9],
            "epochs": [0, 1, 1, 1],
        },
    ]
    (home / "data.yaml").write_text(
        f"type: data\nname: data-{turn}\ntokenizer: runs/tok\nsources: [{source(home)}]\nstages: {json.dumps(stages)}\n"
    )
    command = ["data", "prepare", "data.yaml", "--json", "--workers", str(workers)]
    seconds, peak, out = glmctl(home, *command)
    found = json.loads(out.strip().splitlines()[-1])["summary"]
    stats = json.loads(glmctl(home, "data", "stats", f"runs/data-{turn}", "--json")[2])
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "tokens": found["tokens_train"] + found["tokens_validation"],
        "dropped": stats["dropped"],
    }


def theirs(home: Path, turn: int, workers: int, python: str) -> dict[str, Any]:
    out = home / f"datatrove-{turn}"
    (home / "theirs.py").write_text(DATATROVE)
    files = len(list((home / "corpus").iterdir()))
    command = [python, "theirs.py", str(home / "corpus"), str(out), str(workers), str(max(workers, files))]
    seconds, peak, _ = measured(command, home)
    kept = sum(1 for path in (out / "kept").rglob("*.jsonl") for _ in path.open(encoding="utf-8"))
    return {"seconds": seconds, "peak_bytes": peak, "kept": kept}


def glmctl(home: Path, *words: str) -> tuple[float, int, str]:
    return measured([sys.executable, "-m", "glmctl", *words], home)


def measured(command: list[str], home: Path) -> tuple[float, int, str]:
    """(seconds, largest resident size of the process tree in bytes, stdout)."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    began = time.perf_counter()
    log = open(home / "log.txt", "w", encoding="utf-8")  # noqa: SIM115 - closed with the process
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    peak, over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.05):
            peak = max(peak, tree_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, _ = process.communicate()
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    log.close()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{(home / 'log.txt').read_text()[-3000:]}")
    return seconds, peak, out


def tree_bytes(root: int) -> int:
    """Resident bytes of a process and its descendants."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended since it was listed
        parents[int(entry)], sizes[int(entry)] = int(fields[1]), int(fields[21]) * page
    total = 0
    for pid, size in sizes.items():
        above = pid
        while above not in (root, 0, 1) and above in parents:
            above = parents[above]
        total += size if above == root else 0
    return total


def report(rows: list[dict[str, Any]], size: int, documents: int, args: argparse.Namespace) -> None:
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    print(f"{size / 1e6:.0f} MB, {documents:,} documents, {args.workers} processes, {args.repeat} runs")
    print(f"{'program':<10} {'seconds':>8} {'MB/s':>7} {'peak MB':>8}")
    for program in dict.fromkeys(row["program"] for row in rows):
        mine = [row for row in rows if row["program"] == program]
        seconds = statistics.median(row["seconds"] for row in mine)
        peak = max(row["peak_bytes"] for row in mine)
        print(f"{program:<10} {seconds:>8.1f} {size / 1e6 / seconds:>7.2f} {peak / 1e6:>8.0f}")
    print(json.dumps({"machine": machine, "bytes": size, "documents": documents, "rows": rows}))


if __name__ == "__main__":
    main()
