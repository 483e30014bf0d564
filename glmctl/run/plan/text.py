"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from glmctl import console

_UNTIMED = {"rl": "the time of rollouts", "distill": "the sampling of the teachers"}
"""type of recipe -> what the times leave out"""


def lines(plan: dict[str, Any]) -> Iterator[str]:
    """The plan, line by line."""
    device = plan["device"]
    yield f"{plan['recipe']} ({plan['type']}) on {plan['devices']} x {plan['kind']}"
    precision = plan.get("precision", "bf16")
    peak = device["bf16_flops" if precision == "bf16" else "fp32_flops"]
    assumed = plan["assumptions"]
    yield (
        f"  each: {_size(device['memory'])} memory at {_size(device['bandwidth'])}/s, {peak / 1e12:.4g} TFLOP/s "
        f"({precision}), links {_size(device['link'])}/s, network {_size(device['network'])}/s"
    )
    yield (
        f"  assumed: {assumed['efficiency']:.0%} of the peak FLOP/s, {_size(assumed['runtime_bytes'])} runtime, "
        f"{assumed['headroom']:.0%} of the memory left free"
    )
    model = plan["model"]
    yield f"  model: {_count(model['parameters'])} parameters, {_count(model['parameters_active'])} active a token"
    if plan["type"] in _UNTIMED:
        yield f"  not in it: {_UNTIMED[plan['type']]}"
    yield from _serving(plan) if "arrangements" in plan else _training(plan)


def _training(plan: dict[str, Any]) -> Iterator[str]:
    for stage in plan["stages"]:
        yield ""
        yield (
            f"{stage['name']}: {_count(stage['tokens'])} tokens in {stage['steps']:,} steps of up to "
            f"{_count(stage['batch_tokens'])}, sequences of {stage['sequence_length']:,}"
        )
        if not stage["fits"]:
            yield from _misfit(stage)
            continue
        yield from _layouts(stage["layouts"])
        yield from _memory(stage["layouts"][0])
        yield from _time(stage["layouts"][0])
    yield ""
    yield from _own(plan["this_version"], plan["devices"])
    if "days" in plan:
        total = f"all stages: {console.duration(plan['days'] * 86400)}, {_hours(plan['device_hours'])} device-hours"
        yield total + (f", price {plan['price']:,.0f}" if "price" in plan else "")


def _misfit(stage: dict[str, Any]) -> Iterator[str]:
    if stage["least"] is None:
        sequences = stage["batch_tokens"] // stage["sequence_length"]
        yield f"  no layout: a step has {sequences} sequences, fewer than the devices that would each need one"
        return
    layout = ", ".join(f"{name} {size}" for name, size in stage["least"]["layout"].items())
    yield f"  does not fit: {_size(stage['missing_bytes'])} too many on each device even with {layout}, recomputing"
    yield from _memory(stage["least"])


def _layouts(options: list[dict[str, Any]]) -> Iterator[str]:
    head = ["data", "shard", "expert", "context", "micro", "recompute", "memory", "step", "MFU", "time", "device-hours"]
    rows = []
    for one in options:
        layout = one["layout"]
        memory = one["memory"]["recomputed" if one["recompute"] else "kept"]["total"]
        rows.append(
            [
                *(str(layout[name]) for name in head[:4]),
                f"{one['micro_batches']} x {one['micro_batch_sequences']}",
                "yes" if one["recompute"] else "no",
                _size(memory),
                _seconds(one["step_seconds"]),
                f"{one['mfu']:.0%}",
                console.duration(one["days"] * 86400),
                _hours(one["device_hours"]),
            ]
        )
    yield from _columns(head, rows)


def _memory(option: dict[str, Any]) -> Iterator[str]:
    kept, recomputed = option["memory"]["kept"], option["memory"]["recomputed"]
    rows = [[name, _size(kept[name]), _size(recomputed[name])] for name in kept if kept[name] or recomputed[name]]
    yield ""
    yield from _columns(["memory of a device at its fullest", "activations kept", "recomputed"], rows)


def _time(option: dict[str, Any]) -> Iterator[str]:
    rows = []
    for name, seconds in option["seconds"].items():
        if not seconds:
            continue
        sent = option["sent_bytes"].get(name)
        rows.append([name, _seconds(seconds), "" if sent is None else _size(sent)])
    yield ""
    yield from _columns(["a step of the first layout", "seconds", "sent by a device"], rows)


def _own(own: dict[str, Any], processes: int) -> Iterator[str]:
    parts = ", ".join(f"{name} {_size(value)}" for name, value in own["memory"].items() if value and name != "total")
    fits = "fits" if own["fits"] else "does not fit"
    yield f"this version ({processes} processes, replicas only) {fits}: {_size(own['memory']['total'])} ({parts})"


def _serving(plan: dict[str, Any]) -> Iterator[str]:
    yield (
        f"  weights {plan['weights']}, requests of {plan['context']:,} tokens, "
        f"{_size(plan['kv_bytes_per_token'])} of keys and values a token"
    )
    if not plan["arrangements"]:
        yield f"no arrangement: neither heads nor experts divide by {plan['devices']}"
    for one in plan["arrangements"]:
        sizes = one["bytes"]
        yield ""
        yield (
            f"{one['arrangement']}: weights {_size(sizes['weights'])}, buffers {_size(sizes['buffers'])}, "
            f"a request {_size(sizes['kv_a_request'])}, of {_size(sizes['room'])} a device"
        )
        if not one["fits"]:
            yield "  does not fit: no request of this length has room"
            continue
        yield f"  at most {one['most_requests']:,} requests; prefill {one['prefill_tokens_per_second']:,.0f} tokens/s"
        rows = [
            [f"{n['requests']:,}", _seconds(n["step_seconds"]), f"{n['tokens_per_second']:,.0f}"] for n in one["decode"]
        ]
        yield from _columns(["requests", "step", "tokens/s"], rows)


def _columns(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  " + "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _size(value: float) -> str:
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def _count(value: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.0f}"


def _seconds(value: float) -> str:
    return console.duration(value) if value >= 120 else f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"
