"""`glmctl doctor`: what this machine offers, and how to get the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)

LEVELS = {
    "B": "bubblewrap, seccomp, own uid, control group, rlimits: the default",
    "C": "Landlock, seccomp, own uid, rlimits: for the code of a model that you train yourself",
    "http": "an executor elsewhere (gVisor or a virtual machine): for hostile code; --set sandbox.level=http",
}


@app.command()
def doctor() -> None:
    """Say which sandbox levels, devices and optional packages are here, and how to get what is not."""
    from glmctl.rl.sandbox import boxes, cgroups

    sandbox: dict[str, Any] = {}
    for level, what in LEVELS.items():
        lacks = [] if level == "http" else list(boxes.missing(level))
        sandbox[level] = {"offered": not lacks, "what": what, "lacks": lacks}
    groups = bool(cgroups.parents())
    packages = {name: _version(name) for name in ("torch", "math-verify", "reasoning-gym")}
    body: dict[str, Any] = {
        "machine": {"system": platform.platform(), "processors": os.cpu_count(), "python": platform.python_version()},
        "sandbox": sandbox,
        "control_groups": groups,
        "devices": _devices(),
        "compiler": shutil.which("g++") or shutil.which("clang++"),
        "packages": packages,
    }
    rows = []
    for level, one in sandbox.items():
        answer = "yes" if one["offered"] else "no: it lacks " + "; ".join(one["lacks"])
        rows.append([f"sandbox {level}", answer, one["what"]])
    bounded = "yes" if groups else "no: run as root, or with a delegated cgroup"
    rows.append(["control groups", bounded, "bound the memory of all processes of a box together"])
    rows.append(["GPUs", ", ".join(body["devices"]) or "no: torch sees none", "everything but the sandbox"])
    rows.append(["C++ compiler", body["compiler"] or "no: apt install g++", "the native kernels"])
    for name, version in packages.items():
        rows.append([name, version or f"no: pip install {name}", ""])
    console.table("", ["what", "here", "for"], rows)
    console.result(body, text="")


def _devices() -> list[str]:
    """Names of the CUDA devices that torch can use."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
