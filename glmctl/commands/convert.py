"""`glmctl convert`: a model in another format; `glmctl convert verify A B`: whether two are the same model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from glmctl import console
from glmctl.commands import _stage as stage
from glmctl.errors import DataError, GlmctlError
from glmctl.recipe import names

app = typer.Typer(**stage.PLAIN)

_SHARED = (".safetensors", ".gguf")
"""endings of large files, which the run and the destination share instead of copying"""


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC|RECIPE|verify",
            help="A run directory, a checkpoint, a model folder, a recipe, or the word verify.",
            autocompletion=names.complete,
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DST|A", help="The folder (or .gguf file) to write.", show_default=False),
    ] = None,
    other: Annotated[
        Path | None, typer.Argument(metavar="B", help="verify: what A is compared with.", show_default=False)
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="hf (default), checkpoint, gguf or megatron.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="float32, bfloat16, float16, keep (default); fp8-channel, fp8-block (hf); q8_0 (gguf)."
        ),
    ] = None,
    overrides: stage.SetOption = None,
    run: stage.RunOption = None,
    fresh: stage.FreshOption = False,
    dry_run: stage.DryRunOption = False,
) -> None:
    """Convert between run checkpoints, Hugging Face folders and GGUF files, in bounded memory, read back and compared.

    `convert verify A B` compares two models: names both ways, shapes, dtypes, hashes and logits; exit code 3 if they
    differ.
    """
    if source == "verify":
        _verify(destination, other)
        return
    if other is not None:
        raise GlmctlError(f"unexpected argument '{other}'", hint="`glmctl convert SRC DST`")
    if to is None and destination is not None and destination.suffix == ".gguf":
        to = "gguf"
    options: dict[str, tuple[str, Any]] = {"to": ("--to", to), "dtype": ("--dtype", dtype)}
    if names.looks_like_recipe(source):
        if destination is not None:
            raise GlmctlError(f"'{source}' is a recipe; its result goes to the run directory, which --run names")
        words = [f"{key}={value}" for key, (_, value) in options.items() if value is not None]
        stage.run_stage("convert", source, words + (overrides or []), run, fresh=fresh, dry_run=dry_run)
        return
    if destination is None:
        raise GlmctlError("missing argument 'DST': the folder to write", hint="`glmctl convert --help`")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise GlmctlError(f"{destination}: exists already; convert writes a new folder")
    stage.require_artifact(source)
    from glmctl.recipe.build import build, run_name

    given = {key: value for key, (_, value) in options.items() if value is not None}
    name = run_name("convert", source, given, overrides)
    recipe = build("convert", {**options, "name": ("name", name), "source": ("SRC", source)}, overrides)
    path = run or stage.default_path(name)
    if dry_run:
        stage.show(recipe, path)
        return
    summary = stage.execute(recipe, path, fresh=fresh)
    _place(path / "export", destination)
    body = {"name": name, "type": "convert", "destination": str(destination), "run": str(path), "summary": summary}
    shown = console.pairs({"written": str(destination), **summary})
    console.result(body, text=shown, next_command=f"glmctl serve {destination}" if summary["kind"] == "hf" else None)


def _verify(a: Path | None, b: Path | None) -> None:
    if a is None or b is None:
        raise GlmctlError("verify compares two models", hint="`glmctl convert verify A B`")
    for given in (a, b):
        stage.require_artifact(str(given))
    from glmctl.convert.verify import compare

    found = compare(a, b)
    body = {
        "a": str(a),
        "b": str(b),
        "identical": found.identical,
        "tensors": found.tensors,
        "bytes": found.bytes,
        "max_logit_difference": found.max_logit_difference,
    }
    console.result(
        {**body, "differences": found.differences}, text="\n".join([*found.differences, console.pairs(body)])
    )
    if not found.identical:
        raise DataError(f"{b}: not the same model as {a}: {len(found.differences)} differences")


def _place(export: Path, destination: Path) -> None:
    """Give the run's export the name that was asked for, at once. Weights are shared with the run, not copied."""
    from glmctl.run import atomic

    known = {name: entry["sha256"] for name, entry in atomic.read_manifest(export).items()}
    if destination.suffix == ".gguf":
        (file,) = export.glob("*.gguf")
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = destination.with_name(f".{destination.name}.tmp-{os.getpid()}")
        _share(file, temporary)
        os.replace(temporary, destination)
        return
    with atomic.publish(destination, known) as folder:
        for file in sorted(path for path in export.rglob("*") if path.is_file() and path.name != atomic.MANIFEST):
            target = folder / file.relative_to(export)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in _SHARED:
                _share(file, target)
            else:
                shutil.copyfile(file, target)


def _share(file: Path, target: Path) -> None:
    if file.stat().st_dev == target.parent.stat().st_dev:
        os.link(file, target)
    else:
        shutil.copyfile(file, target)
