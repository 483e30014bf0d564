"""SIGKILL in the middle of a preparation: finished units are kept, no worker stays, the shards are the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from glmctl.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
UNITS = 12


def command(run: str) -> list[str]:
    return [sys.executable, "-m", "glmctl", "data", "prepare", "r.yaml", "--run", run, "--workers", "2"]


def start(home: Path, run: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(run), cwd=home, env=environment, stderr=subprocess.PIPE)


def until(done: Callable[[], bool]) -> None:
    """Wait for an event; the deadline only keeps a broken test from hanging."""
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children(pid: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.add(int(entry.name))
    return found


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def prepared(home: Path, tokenizer: Tokenizer) -> None:
    """A recipe of `UNITS` sources, a quarter of them repositories: a source is at least one unit."""
    tokenizer.save(home / "tokenizer")
    rng = random.Random(0)
    sources: list[dict[str, object]] = []
    for number in range(UNITS):
        rows = [" ".join(f"word{rng.randrange(500)}" for _ in range(200)) for _ in range(150)]
        if number % 4 == 3:
            (home / str(number)).mkdir()
            for at, row in enumerate(rows):
                (home / str(number) / f"m{at}.py").write_text(f"import m{(at + 7) % 150}\n# {row}\n")
            sources.append({"type": "source_tree", "domain": "c", "root": str(number), "context_tokens": 4096})
            continue
        (home / f"{number}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        sources.append({"type": "jsonl", "domain": "d", "paths": [f"{number}.jsonl"]})
    body = {"type": "data", "name": "d", "tokenizer": "tokenizer", "sources": sources, "stages": [{"type": "minhash"}]}
    (home / "r.yaml").write_text(json.dumps(body))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["scan", "measure", "encode"])
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path, tiny_tokenizer: Tokenizer, where: str) -> None:
    prepared(tmp_path, tiny_tokenizer)
    straight = start(tmp_path, "straight")
    assert straight.wait() == 0

    killed = start(tmp_path, "killed")
    work = tmp_path / "killed/work"
    until(lambda: len(list(work.glob(f"*/{where}/0*"))) >= 2)
    workers = children(killed.pid)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/export").exists()
    until(lambda: not any(map(alive, workers)))
    ready = len(list(work.glob(f"*/{where}/0*")))

    again = start(tmp_path, "killed")
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert f"{where}: {ready} of {UNITS} units are there from before" in said.decode()
    one, two = tmp_path / "straight/export", tmp_path / "killed/export"
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert not work.exists()


@pytest.mark.slow
def test_a_killed_worker_is_the_machines_trouble_and_costs_its_unit(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    prepared(tmp_path, tiny_tokenizer)
    running = start(tmp_path, "run")
    work = tmp_path / "run/work"
    until(lambda: len(list(work.glob("*/scan/0*"))) >= 2)
    for pid in children(running.pid):
        if b"spawn_main" in (Path("/proc") / str(pid) / "cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    _, said = running.communicate()
    assert running.returncode == 4, said
    assert b"a worker died (out of memory?)" in said
    assert b"fewer --workers; the same command continues" in said
    again = start(tmp_path, "run")
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert b"units are there from before" in said
