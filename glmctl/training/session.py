"""What every training driver has besides its loop: resume, log, checkpoint, stop, export.

One `Session` per run and process. Under several processes all ranks call everything; only rank 0 writes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from glmctl import console
from glmctl.data.tokenizer import Tokenizer
from glmctl.errors import DataError, DivergedError, EnvironmentProblem, Interrupted
from glmctl.kernels.fused.library import library
from glmctl.kernels.registry import compiling_small
from glmctl.model.folder import save_model
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import wait_for_all
from glmctl.recipe.schema import AdamWSpec, CheckpointPolicy, MuonSpec
from glmctl.run import atomic
from glmctl.run.directory import Run
from glmctl.run.fingerprint import input_files
from glmctl.run.metrics import MetricsLog
from glmctl.run.signals import StopFlag
from glmctl.training import checkpoint
from glmctl.training.balance import dead_experts, expert_load, max_vio
from glmctl.training.guard import StepGuard
from glmctl.training.optim import build_optimizer
from glmctl.training.step import StepMetrics, Stepper
from glmctl.training.tracking import Tracking

LOAD_EVERY = 20
"""steps between rows that carry every expert's load (for the report's heat map)"""

SAMPLE_TOKENS = 64


class Session:
    """A model in training inside a run."""

    def __init__(
        self,
        model: GlmMoe,
        run: Run,
        accelerator: Accelerator,
        *,
        optimizer: MuonSpec | AdamWSpec,
        grad_clip: float,
        policy: CheckpointPolicy,
        trackers: Sequence[str] = (),
        spike_factor: float | None = None,
        driver_state: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        """driver_state: what the driver wants in every checkpoint, JSON-able; `driver` holds it after a resume."""
        self.model = model
        self.run = run
        self.accelerator = accelerator
        self.policy = policy
        self.optimizer = build_optimizer(model, optimizer)
        self.skips = MetricsLog(run.path / "skipped.jsonl", writable=run.writer)
        guard = StepGuard(spike_factor, self.skips)
        self.stepper = Stepper(model, self.optimizer, accelerator, grad_clip=grad_clip, guard=guard)
        self.samples = MetricsLog(run.samples, writable=run.writer)
        self.driver: dict[str, Any] | None = None
        """what `driver_state` gave when the checkpoint was taken that `resume` has loaded"""
        self._driver_state = driver_state
        self._inputs = input_files(run.recipe.model_dump(mode="json")) if run.writer else {}
        self._arithmetic = {
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            # not asked for where they cannot be used: asking compiles them
            "kernels": "C++" if accelerator.device.type == "cpu" and library() is not None else "torch",
            "compile": compiling_small(),
        }
        self._writer = checkpoint.BackgroundWriter()
        self._tracking = Tracking(accelerator, run, trackers)
        run.before_close(self._close)

    def resume(self) -> int:
        """Load the newest intact checkpoint, if there is one, and return how many steps are done.

        Rows of steps that the checkpoint does not know are dropped; those steps are done again, bit for bit. Another
        number of processes or threads, or other kernels, are said: they change the last bits of what follows.

        Raises:
            DataError: a file or folder that the recipe names is not what it was.
            EnvironmentProblem: the ranks see different checkpoints.
        """
        # rank 0 may just have moved an earlier run aside
        wait_for_all(self.accelerator)
        found = checkpoint.load_latest(self.run.checkpoints, self.model, self.optimizer)
        done = 0 if found is None else int(found[0]["step"])
        self._agree_on(done)
        if found is not None:
            state, _ = found
            self._compare_inputs(state["inputs"])
            self._compare_arithmetic(state["arithmetic"])
            self.stepper.guard.load_state(state["stepper"])
            self.driver = state.get("driver")
            if self.run.writer:
                # a kill while old ones were removed left some, and the last step may write no other
                checkpoint.prune(self.run.checkpoints, done, keep=self.policy.keep, keep_every=self.policy.keep_every)
            console.note(f"resuming after step {done}")
        # -1: without a checkpoint even the samples from before the first step are written again
        after = done if found is not None else -1
        self.run.metrics.truncate("step", after)
        self.samples.truncate("step", after)
        self.skips.truncate("step", after)
        if self.run.writer:
            self._say_lost_rows(done)
        wait_for_all(self.accelerator)
        self._tracking.begin(done)
        return done

    def _close(self) -> None:
        """However a driver ends, nothing is written or kept back any more when the run gives its lock back."""
        try:
            self._writer.wait()
        finally:
            self._tracking.end()

    def _agree_on(self, done: int) -> None:
        """EnvironmentProblem on all ranks unless all have loaded the checkpoint of the same step."""
        if self.accelerator.num_processes == 1:
            return
        wait_for_all(self.accelerator)
        steps = self.accelerator.gather(torch.tensor([done], device=self.accelerator.device)).tolist()
        if len(set(steps)) > 1:
            other = next(rank for rank, step in enumerate(steps) if step != steps[0])
            raise EnvironmentProblem(
                f"{self.run.checkpoints}: rank 0 finds step {steps[0]}, rank {other} finds step {steps[other]}",
                hint="the run folder must be shared by all ranks; GLMCTL_RUNS or --run names one that is",
            )

    def _say_lost_rows(self, done: int) -> None:
        last = (self.run.metrics.last() or {}).get("step", 0)
        if last < done:
            console.note(
                f"{self.run.metrics.path}: the last row is of step {last}, the checkpoint of step {done}: "
                "the rows between are lost, the training is not"
            )

    def _compare_inputs(self, before: Mapping[str, str]) -> None:
        changed = [name for name, digest in before.items() if self._inputs.get(name) != digest]
        if self.run.writer and changed:
            raise DataError(
                f"{self.run.path}: {changed[0]} is not what it was when this run began",
                hint="put it back, or start again with --fresh",
            )

    def _compare_arithmetic(self, before: Mapping[str, Any]) -> None:
        for name, now in self._arithmetic.items():
            if before[name] != now:
                console.warn(
                    f"{name}: {before[name]} before, {now} now: the run goes on, but not to the same last bits"
                )

    def log(self, step: int, total: int, metrics: StepMetrics, row: Mapping[str, Any]) -> dict[str, Any]:
        """Append one row of metrics.jsonl (and tell the trackers); returns it."""
        body: dict[str, Any] = {
            "step": step,
            "loss": metrics.loss,
            "mtp_loss": metrics.mtp_loss,
            "balance_loss": metrics.balance_loss,
            "grad_norm": metrics.grad_norm,
            "max_vio": max_vio(metrics.counts_LE),
            "dead_experts": dead_experts(metrics.counts_LE),
            "targets": metrics.targets,
            **row,
        }
        if metrics.skipped:
            body["skipped"] = True
        if step == 1 or step == total or step % LOAD_EVERY == 0:
            body["expert_load"] = expert_load(metrics.counts_LE)
        self.run.metrics.append(body)
        self._tracking.log(step, body)
        return body

    @contextmanager
    def stopping(self) -> Iterator[StopFlag]:
        """Around the loop of steps. A signal asks it to stop at the end of one (see `end_step`).

        A rank that left would have torchrun end the others. So when training diverges, which all ranks see in the
        same step, none leaves before what rank 0 is writing is on the disk.
        """
        with StopFlag() as stop:
            try:
                yield stop
            except DivergedError:
                self._writer.wait()
                wait_for_all(self.accelerator)
                raise

    def end_step(self, step: int, total: int, stop: StopFlag) -> None:
        """Checkpoint when it is due, at the end, or when a signal asks to stop; then raise Interrupted."""
        self._writer.check()
        exit_code = self._agreed(stop.raised)
        if step % self.policy.every_steps == 0 or step == total or exit_code:
            self.save(step)
        if exit_code:
            self._writer.wait()
            # the first rank that leaves has torchrun end the others
            wait_for_all(self.accelerator)
            raise Interrupted(
                f"{self.run.path}: interrupted, saved after step {step} of {total}",
                exit_code=exit_code,
                hint="the same command continues",
            )

    def save(self, step: int) -> None:
        """Copy this moment and write it as a checkpoint in the background; `export` and the run's end wait for it."""
        if self.run.writer:
            config = self.model.config.model_dump(mode="json")
            state: dict[str, Any] = {"step": step, "stepper": self.stepper.guard.state(), "model": config}
            state |= {"inputs": self._inputs, "arithmetic": self._arithmetic}
            if self._driver_state is not None:
                state["driver"] = dict(self._driver_state())
            # before the copy: two copies at once would double the memory that this needs
            self._writer.wait()
            # a machine that fails may forget what it has not been asked to keep: the checkpoint counts these steps
            for log in (self.run.metrics, self.samples, self.skips):
                log.sync()
            taken = checkpoint.snapshot(self.model, self.optimizer, state)
            keep, for_good = self.policy.keep, self.policy.keep_every
            self._writer.submit(lambda: checkpoint.write(self.run.checkpoints, taken, keep=keep, keep_every=for_good))
            self.run.record_time()
        wait_for_all(self.accelerator)

    def sample(self, step: int, prompts: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer, **fields: Any) -> None:
        """Continue each (shown text, token ids) greedily and append the texts to the run's samples."""
        if self.run.writer:
            for shown, tokens in prompts:
                made = generate(self.model, tokens, SAMPLE_TOKENS, stop_ids=tokenizer.eos_ids)
                self.samples.append({"step": step, "prompt": shown, "text": tokenizer.decode(made), **fields})
        wait_for_all(self.accelerator)

    def publish(self, tokenizer_folder: Path, target: Path, *, write: Callable[[Path], None] | None = None) -> None:
        """Publish the model as it is now with its tokenizer as a Hugging Face folder.

        `write(folder)` fills the folder in place of that, for a driver whose result is not a plain model.
        """
        self._writer.wait()
        if self.run.writer:
            with atomic.publish(target) as folder:
                if write is None:
                    save_model(self.model, folder, tokenizer_folder=tokenizer_folder)
                else:
                    write(folder)
        wait_for_all(self.accelerator)

    def export(self, tokenizer_folder: Path, *, write: Callable[[Path], None] | None = None) -> None:
        """Publish the finished model (or what `write` writes, see `publish`) as the run's export."""
        self.publish(tokenizer_folder, self.run.export, write=write)

    def _agreed(self, exit_code: int | None) -> int:
        """The largest exit code any rank was asked to end with, 0 for none: ranks stop at the same step or not at all.

        A signal reaches the ranks of a job at different moments.
        """
        if self.accelerator.num_processes == 1:
            return exit_code or 0
        mine = torch.tensor([exit_code or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())


class Clock:
    """Seconds and tokens per second of a step."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def read(self, tokens: int) -> dict[str, float]:
        """`seconds` since this was made and `tokens_per_second`."""
        seconds = time.perf_counter() - self._began
        return {"seconds": seconds, "tokens_per_second": tokens / max(seconds, 1e-9)}


def peak_memory(device: torch.device) -> str:
    """The most memory this process has had, for a person: of the device on CUDA, else resident."""
    if device.type == "cuda":
        size = torch.cuda.max_memory_allocated(device)
    else:
        # kilobytes everywhere but on macOS
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{size / 2**30:.2f} GiB"


def rate(rows: Sequence[Mapping[str, Any]], tokens: int) -> float:
    """Tokens per second over all steps of a run, validation and checkpoints left out."""
    return tokens / max(sum(float(row["seconds"]) for row in rows), 1e-9)
