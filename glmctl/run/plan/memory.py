"""Memory of one device at each moment of a training step, by part; the peak is the largest moment.

Two implementations are described. With one shard this is the trainer as it is: fp32 weights, gradients and optimizer
state in every process, bf16 by autocast, gradients flattened into buckets where there are several processes (DDP); its
figures are held against measured runs by `benchmarks/plan.py`. With several shards it is the same network under FSDP2
(weights, gradients and state divided, a layer gathered in bf16 while it is computed) and expert and context
parallelism as torchtitan arranges them, which this version does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from glmctl.model.config import ModelConfig
from glmctl.model.cost import kv_bytes_per_token
from glmctl.recipe.derive import memory as model_bytes
from glmctl.recipe.schema import AdamWSpec, MuonSpec
from glmctl.run.plan import activations
from glmctl.run.plan.shape import Run, layer_runs, muon_shapes

MASTER = 4
"""bytes of a weight, of its gradient and of a number of optimizer state"""
CACHE_BYTES = 4 << 30
"""most that the rollout engine keeps for keys and values (`engine.engine`)"""
NEWTON_SCHULZ_ELEMENTS = 1 << 24
"""largest batch of matrices that Muon orthogonalises at once (`training.optim.BATCH_ELEMENTS`)"""
LOGITS_ROWS = {"cpu": 256}
"""rows of logits at a time (`kernels.linear_cross_entropy`)"""
LOGITS_ROWS_ELSEWHERE = 4096


class Layout(NamedTuple):
    """How `devices` devices share a step: data x shard x context; experts divide within shard x context."""

    data: int = 1
    shard: int = 1
    expert: int = 1
    context: int = 1

    @property
    def devices(self) -> int:
        return self.data * self.shard * self.context

    @property
    def parts(self) -> int:
        """Devices that one copy of weights, gradients and optimizer state is divided over."""
        return self.shard * self.context

    @property
    def data_ranks(self) -> int:
        """Devices, or groups of `context` of them, that see different rows."""
        return self.data * self.shard

    @property
    def runs_here(self) -> bool:
        """Whether this version trains with it."""
        return self.parts == 1


ONE = Layout()
"""a device on its own"""


@dataclass(frozen=True)
class Work:
    """What one device does in one step."""

    config: ModelConfig
    optimizer: MuonSpec | AdamWSpec
    rows: int
    """sequences in a micro-batch of one data rank"""
    length: int
    """tokens of a sequence"""
    micro_batches: int = 1
    sequences: int | None = None
    """of the whole step, where the last micro-batch is smaller than the others"""
    mtp: bool = True
    balance: bool = True
    recompute: bool = False
    precision: str = "fp32"
    device: str = "cpu"
    kv_tokens: int = 0
    """places of keys and values that the rollout engine keeps beside the trainer"""

    @property
    def number(self) -> int:
        """Bytes of a number in the matrix products."""
        return 2 if self.precision == "bf16" else 4

    @property
    def step_tokens(self) -> int:
        """Tokens of one data rank's step."""
        sequences = self.rows * self.micro_batches if self.sequences is None else self.sequences
        return sequences * self.length

    @property
    def has_mtp(self) -> bool:
        return self.mtp and self.config.num_nextn_predict_layers > 0

    @property
    def sizes(self) -> Sizes:
        return sizes(self.config, self.optimizer, self.has_mtp)


@dataclass
class Moment:
    """Bytes by part at one moment of a step."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())


PARTS = ("runtime", "weights", "gradients", "optimizer", "activations", "kv", "buffers", "checkpoint")


class Sizes(NamedTuple):
    """What of a model does not depend on the layout; bytes of the whole of it."""

    weights: int
    gradients: int
    optimizer: int
    runs: list[Run]
    matrices: int
    """elements that Muon updates"""
    scratch: float
    """bytes of the largest batch of matrices in Newton-Schulz"""


@lru_cache(maxsize=32)
def sizes(config: ModelConfig, optimizer: MuonSpec | AdamWSpec, mtp: bool) -> Sizes:
    """The model's sizes; `mtp`: its MTP layer takes part in the step."""
    # a parameter without a gradient has no optimizer state either
    trained = config if mtp else config.model_copy(update={"num_nextn_predict_layers": 0})
    held = model_bytes(trained, optimizer)
    shapes = muon_shapes(trained, optimizer) if isinstance(optimizer, MuonSpec) else {}
    return Sizes(
        config.parameter_counts().total * MASTER,
        held["bytes_gradients"],
        held["bytes_optimizer"],
        layer_runs(config, mtp=mtp),
        sum(a * b * count for (a, b), count in shapes.items()),
        max((_newton_schulz(shape, count) for shape, count in shapes.items()), default=0.0),
    )


def _newton_schulz(shape: tuple[int, int], count: int) -> float:
    """Bytes of one batch: the stacked inputs, X at first, before and after an iteration, X X^T and its polynomial."""
    short, long = shape
    together = min(count, max(1, NEWTON_SCHULZ_ELEMENTS // (short * long)))
    return 4.0 * together * (4 * short * long + 2 * short * short)


def moments(work: Work, layout: Layout = ONE, *, runtime: float = 0.0, saving: bool = False) -> list[Moment]:
    """Every moment at which a step may need most. `runtime`: bytes of interpreter, libraries and driver.

    saving: a checkpoint's copy of weights and optimizer state is being written while the step runs, as the process
    that saves has it on a CPU. Elsewhere the copy is in the host's memory.
    """
    held = work.sizes
    copy = held.weights + held.optimizer if work.device == "cpu" else 0
    base = {
        "runtime": runtime,
        "weights": held.weights / layout.parts,
        "optimizer": held.optimizer / layout.parts,
        "kv": min(CACHE_BYTES, work.kv_tokens * kv_bytes_per_token(work.config, work.number)),
        "checkpoint": copy * saving,
    }
    gradients = held.gradients / layout.parts
    found = [*_Pass(work, layout, gradients).moments(), _update(work, layout, gradients)]
    buffers = _standing_buffers(work, layout)
    for moment in found:
        moment.parts["buffers"] += buffers
    found.append(Moment("save", {"checkpoint": copy, "buffers": _buckets(work, layout)}))
    for moment in found:
        moment.parts = {name: {**base, **moment.parts}.get(name, 0.0) for name in PARTS}
    return found


def peak(found: Sequence[Moment]) -> Moment:
    """The moment that needs most."""
    return max(found, key=lambda moment: moment.total)


def _standing_buffers(work: Work, layout: Layout) -> float:
    """Bytes of communication and precision that last for the whole step."""
    if layout.parts == 1:
        # autocast keeps its copies of the weights until the pass has ended
        return _buckets(work, layout) + (work.sizes.weights / 2 if work.precision == "bf16" else 0)
    gathered = max(run.part.rest + run.part.experts / layout.expert for run in work.sizes.runs)
    head = work.config.vocab_size * work.config.hidden_size
    # the layer that computes, the next one on its way, and the output matrix
    return (2 * gathered + head) * work.number


def _buckets(work: Work, layout: Layout) -> int:
    """The flat copy of all gradients that DDP sums over processes; it is never given back."""
    return work.sizes.gradients if layout.parts == 1 and layout.data > 1 else 0


class _Pass:
    """Forward and backward of one micro-batch: activations come, then go layer by layer while gradients come."""

    def __init__(self, work: Work, layout: Layout, gradients: float) -> None:
        c, n = work.config, work.number
        self.work, self.layout, self.gradients = work, layout, gradients
        self.tokens = work.rows * work.length / layout.context
        self.heads = 2 if work.has_mtp else 1
        self.before = gradients if work.micro_batches > 1 else 0.0
        around = activations.shared_kept(c, passes=self.heads) + activations.final_kept(c, n)
        self.around = self.tokens * (around + (activations.mtp_kept(c, n) if work.has_mtp else 0))
        self.head = activations.head_kept(c, round(self.tokens), n)
        self.table = c.vocab_size * c.hidden_size * MASTER

    def moments(self) -> list[Moment]:
        kept = sum(self._kept(run) * run.layers for run in self.work.sizes.runs)
        full = kept + self.around + self.heads * self.head
        logits = (
            min(self.tokens, LOGITS_ROWS.get(self.work.device, LOGITS_ROWS_ELSEWHERE)) * self.work.config.vocab_size
        )
        found = [self._moment("forward", 0.0, full, logits * 4)]
        # a head's gradients are scaled into new tensors before the first ones go
        found.append(self._moment("backward", 0.0, full, self.head))
        grown = 0.0
        for run in reversed(self.work.sizes.runs):
            # within a run everything grows or falls evenly, so its ends are enough
            for done in {1, run.layers}:
                left = kept - self._kept(run) * (done - 1)
                found.append(self._layer(run, grown + done * self._gradient(run), left))
            kept -= self._kept(run) * run.layers
            grown += run.layers * self._gradient(run)
        return found

    def _layer(self, run: Run, grown: float, kept: float) -> Moment:
        """During the backward of a layer: `grown` bytes of layers' gradients are there, `kept` of activations left."""
        work, layout = self.work, self.layout
        # the first head's are kept until the MTP layer is done; both matrices' gradients wait for the embedding's
        heads = self.head if run.mtp else 0.0
        waiting = self.table * (self.heads if not run.mtp else 1)
        again = self._layer_kept(run) * work.recompute
        working = self.tokens * activations.layer_work(work.config, run.part.moe, work.number) + again
        arriving = 0.0
        if layout.parts > 1:
            whole = run.part.rest + run.part.experts / layout.expert
            arriving = whole * (work.number + MASTER) + waiting
        else:
            grown += waiting
        return self._moment("backward", grown, kept + self.around + heads + working, arriving)

    def _moment(self, name: str, grown: float, kept: float, buffers: float) -> Moment:
        return Moment(name, {"gradients": max(self.before, grown), "activations": kept, "buffers": buffers})

    def _gradient(self, run: Run) -> float:
        return run.part.total * MASTER / self.layout.parts

    def _kept(self, run: Run) -> float:
        """What one layer of the run keeps."""
        if self.work.recompute:
            return self.tokens * self.work.config.hidden_size * self.work.number
        return self._layer_kept(run)

    def _layer_kept(self, run: Run) -> float:
        w = self.work
        scores = activations.whole_scores(w.config, w.device, w.length)
        return self.tokens * activations.layer_kept(w.config, run.part.moe, w.number, balance=w.balance, scores=scores)


def _update(work: Work, layout: Layout, gradients: float) -> Moment:
    """The optimizer's step. Muon's inputs are made of gradients and momenta in two steps: momentum times its factor
    and the sum live together for a moment; then the sum and the scratch of a batch of matrices."""
    inputs = MASTER * work.sizes.matrices / layout.parts
    buffers = max(2 * inputs, inputs + work.sizes.scratch)
    return Moment("update", {"gradients": gradients, "buffers": buffers})
