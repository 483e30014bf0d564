"""How long a step takes: a roofline of arithmetic and memory traffic, and what is sent between devices.

Seconds and bytes are those of one device. Gathering weights and reducing gradients overlap with the layers' work (the
longer of the two counts); tokens on their way to experts, keys and values on their way to other parts of a context, and
the optimizer do not. Latencies are left out: a step of a large model moves gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from glmctl.model.cost import forward_flops
from glmctl.recipe.schema import MuonSpec
from glmctl.run.plan import activations
from glmctl.run.plan.devices import DeviceKind
from glmctl.run.plan.memory import MASTER, Layout, Work
from glmctl.run.plan.shape import muon_shapes


@dataclass
class StepTime:
    """Seconds by part, and bytes sent by purpose, of one step on one device."""

    seconds: dict[str, float] = field(default_factory=dict)
    sent: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0

    @property
    def total(self) -> float:
        """The step: layers beside the traffic that overlaps with them, then everything that does not."""
        s = self.seconds
        layers = max(s["arithmetic"], s["memory"])
        return max(layers, s["weights"] + s["gradients"]) + s["experts"] + s["context"] + s["optimizer"]


def step_time(work: Work, layout: Layout, device: DeviceKind, efficiency: float) -> StepTime:
    """One step of `work.micro_batches` micro-batches. `efficiency`: share of the peak FLOP/s that products reach."""
    tokens = work.step_tokens / layout.context
    flops = tokens * trained_flops(work)
    speed = device.flops(work.precision) * efficiency
    found = StepTime(flops=flops)
    found.seconds = {"arithmetic": flops / speed, "memory": _traffic(work, layout, tokens) / device.bandwidth}
    _send_weights(work, layout, device, found)
    _send_tokens(work, layout, device, tokens, found)
    found.seconds["optimizer"] = _optimizer(work, layout, device, speed, found)
    return found


def trained_flops(work: Work) -> float:
    """FLOPs of a trained token: forward, twice that backward, and the layers' forward again when recomputing."""
    seen = (work.length + 1) / 2
    main = forward_flops(work.config, seen)
    flops = 3 * main.total + work.recompute * (main.matrices + main.attention)
    if work.has_mtp:
        mtp = forward_flops(work.config, seen, mtp=True)
        flops += 3 * mtp.total + work.recompute * (mtp.matrices + mtp.attention)
    return flops


def _passes(work: Work) -> int:
    return 3 + work.recompute


def _traffic(work: Work, layout: Layout, tokens: float) -> float:
    """Bytes between the device's memory and its arithmetic: weights in every pass, activations written and read."""
    weights = sum(run.layers * (run.part.rest + run.part.experts / layout.expert) for run in work.sizes.runs)
    weights += (2 if work.has_mtp else 1) * work.config.vocab_size * work.config.hidden_size
    kept = sum(run.layers * activations.layer_kept(work.config, run.part.moe, work.number) for run in work.sizes.runs)
    return work.micro_batches * _passes(work) * weights * work.number + _passes(work) * tokens * kept


def _send_weights(work: Work, layout: Layout, device: DeviceKind, found: StepTime) -> None:
    """FSDP: gathered before forward and backward of each micro-batch, gradients scattered after; then replicas sum."""
    rest = sum(run.layers * run.part.rest for run in work.sizes.runs) + work.config.parameter_counts().vocabulary
    experts = sum(run.layers * run.part.experts for run in work.sizes.runs)
    gathered = scattered = gather_s = scatter_s = 0.0
    # experts are divided first by expert parallelism; what is left of the group shards them further
    for elements, size, stride in (
        (rest, layout.parts, 1),
        (experts / layout.expert, layout.parts // layout.expert, layout.expert),
    ):
        share = elements * (size - 1) / size
        speed = collective_bandwidth(device, size, stride)
        gathered += 2 * work.micro_batches * share * work.number
        scattered += work.micro_batches * share * MASTER
        gather_s += 2 * work.micro_batches * share * work.number / speed
        scatter_s += work.micro_batches * share * MASTER / speed
    r = layout.data
    summed = 2 * (r - 1) / r * work.sizes.gradients / layout.parts
    found.sent |= {"weights": gathered, "gradients": scattered + summed}
    found.seconds["weights"] = gather_s
    found.seconds["gradients"] = scatter_s + summed / collective_bandwidth(device, r, layout.parts)


def _send_tokens(work: Work, layout: Layout, device: DeviceKind, tokens: float, found: StepTime) -> None:
    """Hidden states to their experts and back, and keys and values to the other parts of a context."""
    c, n = work.config, work.number
    moe_layers = c.num_moe_layers + (1 if work.has_mtp else 0)
    layers = c.num_hidden_layers + (1 if work.has_mtp else 0)
    # there and back, in the forward and in the backward, and in the forward that is done again
    trips = 4 + 2 * work.recompute
    routed = trips * moe_layers * tokens * c.num_experts_per_tok * c.hidden_size * n
    inside, outside = _split_traffic(layout.expert, device)
    found.sent["experts"] = routed * (inside + outside)
    found.seconds["experts"] = routed * (inside / device.link + outside / device.network)
    # gathered in the forward (each time) and the backward, their gradients scattered
    times = _passes(work)
    numbers = times * layers * tokens * c.cache_spec.numbers * n * (layout.context - 1)
    found.sent["context"] = numbers
    found.seconds["context"] = numbers / collective_bandwidth(device, layout.context, 1)


def _split_traffic(group: int, device: DeviceKind) -> tuple[float, float]:
    """Shares of an all-to-all over neighbouring devices that stay in the node and that leave it."""
    inside = min(group, device.per_node)
    return (inside - 1) / group, (group - inside) / group


def _optimizer(work: Work, layout: Layout, device: DeviceKind, speed: float, found: StepTime) -> float:
    """Seconds to update a device's share. Muon needs whole matrices: each is orthogonalised by one device of the
    group, which is sent its momentum and sends the update back."""
    gradients = work.sizes.gradients / layout.parts
    # weight, gradient and momentum read, weight and momentum written, Muon's input written and read
    seconds = 7 * gradients / device.bandwidth
    if isinstance(work.optimizer, MuonSpec):
        steps = work.optimizer.ns_steps
        shapes = muon_shapes(work.config, work.optimizer)
        flops = sum(count * steps * (4 * a * a * b + 2 * a**3) for (a, b), count in shapes.items())
        seconds += flops / layout.parts / speed
        share = 2 * MASTER * work.sizes.matrices / layout.parts * (layout.parts - 1) / layout.parts
        found.sent["optimizer"] = share
        seconds += share / collective_bandwidth(device, layout.parts, 1)
    return seconds


def collective_bandwidth(device: DeviceKind, size: int, stride: int) -> float:
    """Bytes/s at which a device of a group of `size`, every `stride`-th device, gathers or scatters.

    A ring that leaves the node enters and leaves it once for all its members there, over all their network ports.
    """
    if size * stride <= device.per_node:
        return device.link
    inside = max(1, min(size, device.per_node // stride))
    return min(device.link, inside * device.network)
