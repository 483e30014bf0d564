"""Data sets of the Hugging Face hub, streamed row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from glmctl.errors import DataError, EnvironmentProblem

if TYPE_CHECKING:
    from glmctl.recipe.schema import HuggingFaceSource


def rows(source: HuggingFaceSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`dataset:row`, row) in the data set's own order.

    EnvironmentProblem when the hub cannot be reached or does not let us in; DataError when it has no such column.
    """
    import datasets

    try:
        stream = datasets.load_dataset(
            source.dataset, source.config, split=source.split, revision=source.revision, streaming=True
        )
        for number, row in enumerate(stream, start=1):
            if number == 1 and source.field not in row:
                raise DataError(f"{source.dataset}: no column '{source.field}'; one of: {', '.join(list(row)[:12])}")
            yield f"{source.dataset}:{number}", row
    except OSError as error:  # no connection, offline mode, a gated or unknown data set
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentProblem(
            f"{source.dataset}: the Hugging Face hub does not give it: {reason}",
            hint="check the network and HF_HUB_OFFLINE, or download the files and use a parquet or jsonl source",
        ) from error
    except ValueError as error:
        raise DataError(f"{source.dataset}: {error}") from error
