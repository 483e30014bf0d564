"""Devices as their makers describe them, and this machine as it measures itself. Figures are per device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from glmctl.errors import GlmctlError, unknown


@dataclass(frozen=True)
class DeviceKind:
    """What a roofline needs to know. Bandwidths of links count one direction."""

    name: str
    memory: float
    """bytes"""
    bf16_flops: float
    """dense bf16 matrix products with fp32 sums, FLOP/s"""
    fp32_flops: float
    """fp32 products as torch computes them by default (no TF32), FLOP/s"""
    bandwidth: float
    """of the device's own memory, bytes/s"""
    link: float
    """to the devices of the same node, bytes/s"""
    network: float
    """to other nodes, bytes/s a device"""
    per_node: int
    """devices that `link` connects"""

    def flops(self, precision: str) -> float:
        """Peak FLOP/s of the recipe's precision."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


KINDS = {
    kind.name: kind
    for kind in (
        # NVIDIA A100 data sheet (SXM, 80 GB): NVLink 600 GB/s both ways; DGX A100: one 200 Gb/s adapter a GPU
        DeviceKind("a100", 80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, 8),
        # NVIDIA H100 data sheet (SXM): 1,979 TFLOPS bf16 with sparsity, NVLink 900 GB/s; DGX H100: 400 Gb/s a GPU
        DeviceKind("h100", 80e9, 989.4e12, 67e12, 3.35e12, 450e9, 50e9, 8),
        # NVIDIA H200 data sheet (SXM): the H100's arithmetic, 141 GB at 4.8 TB/s
        DeviceKind("h200", 141e9, 989.4e12, 67e12, 4.8e12, 450e9, 50e9, 8),
        # NVIDIA DGX B200 data sheet: 1,440 GB, 64 TB/s and 14.4 TB/s of NVLink over 8 GPUs; HGX B200: 2.25 PFLOPS
        # dense bf16 and 75 TFLOPS fp32 a GPU; 400 Gb/s a GPU
        DeviceKind("b200", 180e9, 2250e12, 75e12, 8e12, 900e9, 50e9, 8),
        # AMD Instinct MI300X data sheet: 7 Infinity Fabric links of 128 GB/s both ways; 400 Gb/s a GPU by platform
        DeviceKind("mi300x", 192e9, 1307.4e12, 163.4e12, 5.3e12, 448e9, 50e9, 8),
    )
}
"""name -> kind; `cpu` is measured (`this_machine`)"""

_SIDE = 1024
_COPIED = 1 << 27
_REPEATS = 3


def find_device(name: str, **figures: float | None) -> DeviceKind:
    """The kind of this name, with `figures` (fields of DeviceKind that are not None) in place of its own.

    `cpu` is this machine: what of its speed is not given is measured, in about a second. RecipeError for an unknown
    name.
    """
    given: dict[str, Any] = {key: value for key, value in figures.items() if value is not None}
    if name == "cpu":
        return this_machine(**given)
    if name not in KINDS:
        raise unknown("device kind", name, [*KINDS, "cpu"])
    if "flops" in given:
        given["bf16_flops"] = given["fp32_flops"] = given.pop("flops")
    return replace(KINDS[name], **given)


def this_machine(
    *, memory: float | None = None, flops: float | None = None, bandwidth: float | None = None, **links: float
) -> DeviceKind:
    """All cores of this machine as one device. bf16 counts as fp32: few CPUs have faster products for it.

    Processes on it share its memory, arithmetic and bandwidth (`split`), and talk through that memory.
    """
    if memory is None:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    flops = flops or _measured_flops()
    bandwidth = bandwidth or _measured_bandwidth()
    shared = {"link": bandwidth / 2, "network": bandwidth / 2, **links}
    return DeviceKind("cpu", memory, flops, flops, bandwidth, shared["link"], shared["network"], 1 << 20)


def split(device: DeviceKind, processes: int) -> DeviceKind:
    """One process's share of the machine; accelerators are not shared."""
    if device.name != "cpu":
        return device
    shared = ("memory", "bf16_flops", "fp32_flops", "bandwidth", "link", "network")
    parts = {name: getattr(device, name) / processes for name in shared}
    return replace(device, **parts)


def _measured_flops() -> float:
    """FLOP/s of the best of a few fp32 products, by numpy's BLAS on all cores."""
    import numpy as np

    a = np.ones((_SIDE, _SIDE), np.float32)
    out = np.empty_like(a)
    return 2.0 * _SIDE**3 / _fastest(lambda: np.matmul(a, a, out=out))


def _measured_bandwidth() -> float:
    """Bytes/s read and written by the best of a few copies of more than any cache holds."""
    import numpy as np

    a = np.ones(_COPIED // 4, np.float32)
    b = np.empty_like(a)
    return 2.0 * _COPIED / _fastest(lambda: np.copyto(b, a))


def _fastest(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def check_devices(count: int) -> None:
    """GlmctlError for a number that no cluster has."""
    if not 1 <= count <= 1 << 20:
        raise GlmctlError(f"--devices: {count} given, expected 1 to {1 << 20}")
