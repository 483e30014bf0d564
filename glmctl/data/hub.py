"""Data sets of the Hugging Face hub and folders in their layouts, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.errors import DataError, EnvironmentProblem, unknown

if TYPE_CHECKING:
    from glmctl.recipe.schema import HuggingFaceSource


def rows(source: HuggingFaceSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`dataset:row`, row) of a source of text. DataError when it has no such column; else errors as for `stream`."""
    found = stream(source.dataset, config=source.config, split=source.split, revision=source.revision)
    for number, (place, row) in enumerate(found):
        if number == 0 and source.field not in row:
            raise DataError(f"{source.dataset}: no column '{source.field}'; one of: {', '.join(list(row)[:12])}")
        yield place, row


def stream(
    dataset: str, *, split: str, config: str | None = None, revision: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`dataset:row`, row) of a data set of the hub, or of a folder in its layout, in its own order.

    EnvironmentProblem when the hub cannot be reached or does not let us in; DataError when there is no such split.
    """
    import datasets

    try:
        opened = datasets.load_dataset(dataset, config, split=split, revision=revision, streaming=True)
        for number, row in enumerate(opened, start=1):
            yield f"{dataset}:{number}", row
    except OSError as error:  # no connection, offline mode, a gated or unknown data set
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentProblem(
            f"{dataset}: the Hugging Face hub does not give it: {reason}",
            hint="check the network and HF_HUB_OFFLINE, or download the files and use a parquet or jsonl source",
        ) from error
    except ValueError as error:
        raise DataError(f"{dataset}: {error}") from error


def saved(folder: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`folder:row`, row) of what `datasets` wrote with `save_to_disk`, of its part `split` when it has parts."""
    import datasets

    try:
        opened = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: a damaged saved data set: {error}") from error
    if isinstance(opened, datasets.DatasetDict):
        if split not in opened:
            raise unknown("split", split, opened, where=str(folder))
        opened = opened[split]
    for number, row in enumerate(opened, start=1):
        yield f"{folder}:{number}", row
