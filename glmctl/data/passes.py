"""Passes over work units in parallel processes, resumable: a unit whose result is on disk is not done again.

A pass calls one function on every unit; the function writes its files into a folder that appears complete or not at
all, so a kill costs the units that were under way. Results do not depend on who makes them, or in what order.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import glmctl
from glmctl import console
from glmctl.data.units import Unit
from glmctl.errors import DataError, EnvironmentProblem, RecipeError
from glmctl.run import atomic

WORKERS_VARIABLE = "GLMCTL_WORKERS"
_ROOT = str(Path(glmctl.__file__).parents[1])
POOL_BYTES = 32 * 1024 * 1024
"""less text than this is done sooner than processes are started, unless workers were asked for"""


class Passes:
    """The units of one preparation, and the folder in which their results gather. Make one with `opened`."""

    def __init__(self, home: Path, units: Sequence[Unit], pool: ProcessPoolExecutor | None) -> None:
        self.units = units
        self._home = home
        self._pool = pool

    def run(self, name: str, work: Callable[..., None], arguments: Callable[[int], tuple[Any, ...]]) -> list[Path]:
        """`work(folder, *arguments(unit's number))` for every unit; returns the folders in the units' order.

        `work` is a module's function, and what it is given can be sent to another process.
        """
        home = self._home / name
        home.mkdir(parents=True, exist_ok=True)
        atomic.remove_stale(home)
        folders = [home / f"{number:06d}" for number in range(len(self.units))]
        ready = [_is_done(folder) for folder in folders]
        done = sum(unit.size for unit, is_done in zip(self.units, ready, strict=True) if is_done)
        if done:
            console.note(f"{name}: {sum(ready)} of {len(ready)} units are there from before")
        todo = [number for number, is_done in enumerate(ready) if not is_done]
        with console.progress(name, max(1, sum(u.size for u in self.units)), "byte", start=done) as progress:
            for number in self._done(work, folders, arguments, todo):
                progress.advance(self.units[number].size)
        return folders

    def _done(
        self,
        work: Callable[..., None],
        folders: Sequence[Path],
        arguments: Callable[[int], tuple[Any, ...]],
        todo: Sequence[int],
    ) -> Iterator[int]:
        """Numbers of the units as they become ready."""
        if self._pool is None:
            for number in todo:
                _do(work, folders[number], arguments(number))
                yield number
            return
        waiting: dict[Future[None], int] = {}
        try:
            with _findable():  # submitting is what starts the processes
                for number in todo:
                    waiting[self._pool.submit(_do, work, folders[number], arguments(number))] = number
            for future in as_completed(waiting):
                future.result()
                yield waiting[future]
        except BrokenProcessPool as error:
            raise EnvironmentProblem(
                "a worker died (out of memory?)", hint="fewer --workers; the same command continues"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def opened(home: Path, key: str, units: Sequence[Unit]) -> Iterator[Passes]:
    """Passes whose results lie in `home`/`key`; those of another key are removed, all are once the body is done."""
    folder = home / key
    for other in sorted(home.iterdir()) if home.is_dir() else []:
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    count = workers()
    big = sum(unit.size for unit in units) >= POOL_BYTES or WORKERS_VARIABLE in os.environ
    pool = None
    if count > 1 and len(units) > 1 and big:
        # spawned, not forked: the tokenizer's threads would not survive a fork
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(count, len(units)), mp_context=context, initializer=_start_worker, initargs=(sys.path,)
        )
    try:
        yield Passes(folder, units, pool)
    except (DataError, RecipeError):
        shutil.rmtree(home)  # it would go wrong in the same way again
        raise
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
    shutil.rmtree(home)


def workers() -> int:
    """Processes to use: GLMCTL_WORKERS, else one a core that this process may run on."""
    given = os.environ.get(WORKERS_VARIABLE)
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise EnvironmentProblem(f"{WORKERS_VARIABLE} is '{given}', not a number of processes")
    return int(given)


def _do(work: Callable[..., None], folder: Path, arguments: tuple[Any, ...]) -> None:
    with atomic.publish(folder) as out:
        work(out, *arguments)


def _is_done(folder: Path) -> bool:
    """Whether a result of an earlier process is there and undamaged."""
    if not folder.is_dir():
        return False
    try:
        atomic.verify(folder)
    except DataError:
        console.warn(f"{folder}: damaged, done again")
        shutil.rmtree(folder)
        return False
    return True


@contextmanager
def _findable() -> Iterator[None]:
    """Put the folder that holds glmctl on the path that started processes inherit.

    `python -m glmctl` takes a checkout's root off its own path, because of the names at that root; without it a worker
    could not import what it is to do. The worker takes it off again.
    """
    added = _ROOT not in sys.path
    if added:
        sys.path.append(_ROOT)
    try:
        yield
    finally:
        if added:
            sys.path.remove(_ROOT)


def _start_worker(path: list[str]) -> None:
    """One thread a worker, Ctrl-C left to the parent, and no life after the parent's."""
    sys.path[:] = path
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by a pool"

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
