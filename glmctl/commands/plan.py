"""`glmctl plan`: what a recipe needs of N devices, before they are rented. Arithmetic only."""

from __future__ import annotations

from typing import Annotated

import typer

from glmctl import console
from glmctl.commands import _stage as stage

app = typer.Typer(**stage.PLAIN)

TINY = 1e-6
"""smallest figure of a device: any that is not zero"""


@app.command()
def plan(
    recipe: stage.RecipeArgument,
    devices: Annotated[int, typer.Option("--devices", metavar="N", help="How many devices (cpu: processes).")] = 1,
    kind: Annotated[
        str,
        typer.Option("--kind", metavar="NAME", help="a100, h100, h200, b200, mi300x; cpu is this machine, measured."),
    ] = "h100",
    model: Annotated[
        str | None, typer.Option("--model", help="A preset, folder or run in place of the recipe's model.")
    ] = None,
    efficiency: Annotated[
        float, typer.Option("--efficiency", min=0.01, max=1.0, help="Share of the peak FLOP/s that products reach.")
    ] = 0.5,
    headroom: Annotated[
        float, typer.Option("--headroom", min=0.0, max=0.9, help="Share of each device's memory to leave free.")
    ] = 0.05,
    price: Annotated[float | None, typer.Option("--price", min=0.0, help="Of a device-hour, in any currency.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List every layout that fits.")] = False,
    weights: Annotated[str | None, typer.Option("--weights", help="serve: fp32, bf16, fp8 or int8.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=2, help="serve: tokens of a request.")] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", metavar="GB", min=TINY, help="Of a device, if not as sold.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option("--tflops", min=TINY, help="Peak of a device, if not as sold.")
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option("--bandwidth", metavar="GB/S", min=TINY, help="Of a device's memory, if not as sold."),
    ] = None,
    link: Annotated[
        float | None, typer.Option("--link", metavar="GB/S", min=TINY, help="Between devices of a node.")
    ] = None,
    network: Annotated[
        float | None, typer.Option("--network", metavar="GB/S", min=TINY, help="Between nodes, a device.")
    ] = None,
    runtime: Annotated[
        float | None, typer.Option("--runtime", metavar="GB", min=0.0, help="Memory gone before the first tensor.")
    ] = None,
    overrides: stage.SetOption = None,
) -> None:
    """Memory by part, communication, step time and days of a recipe on N devices; the layouts that fit, and their cost.

    For a serve recipe: room for keys and values, requests at once, tokens a second. Nothing is run.
    """
    from glmctl.errors import unknown
    from glmctl.recipe.load import load
    from glmctl.run.plan.devices import check_devices, find_device
    from glmctl.run.plan.plan import BYTES
    from glmctl.run.plan.plan import plan as make
    from glmctl.run.plan.text import lines

    check_devices(devices)
    if weights is not None and weights not in BYTES:
        raise unknown("format", weights, BYTES, where="--weights")
    giga = {"memory": memory, "bandwidth": bandwidth, "link": link, "network": network}
    figures = {name: None if value is None else value * 1e9 for name, value in giga.items()}
    device = find_device(kind, **figures, flops=None if tflops is None else tflops * 1e12)
    body = make(
        load(recipe, overrides or ()),
        devices,
        device,
        model=model,
        runtime=None if runtime is None else runtime * 1e9,
        efficiency=efficiency,
        headroom=headroom,
        price=price,
        every=every,
        weights=weights,
        context=context,
    )
    console.result(body, text="\n".join(lines(body)))
