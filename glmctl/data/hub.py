"""Data sets of the Hugging Face hub and folders in their layouts, row by row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.errors import DataError, EnvironmentProblem, unknown
from glmctl.run import atomic

if TYPE_CHECKING:
    from glmctl.recipe.schema import HuggingFaceSource, Source

COMMITS = "commits.json"
"""in a run: the commit of each data set of the hub that it reads, by `dataset@revision`"""
_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned(sources: Sequence[Source], record: Path) -> list[Source]:
    """`sources` with every data set of the hub at one commit: that in the file `record`, else the revision's of now.

    What is asked of the hub is added to `record`, so a run that goes on reads what it began with.
    EnvironmentProblem when the hub does not answer; DataError when there is no such revision, or `record` is damaged.
    """
    try:
        known: dict[str, str] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        damaged = not all(_COMMIT.fullmatch(commit) for commit in known.values())
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{record}: damaged: {error}") from error
    if damaged:
        raise DataError(f"{record}: damaged: not commits")
    found: list[Source] = []
    for source in sources:
        if source.type == "huggingface" and is_on_hub(source) and not _COMMIT.fullmatch(source.revision or ""):
            name = f"{source.dataset}@{source.revision or 'main'}"
            if name not in known:
                known[name] = _commit(source.dataset, source.revision)
                record.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_json(record, known)
            source = source.model_copy(update={"revision": known[name]})
        found.append(source)
    return found


def is_on_hub(source: HuggingFaceSource) -> bool:
    """Whether the data set is one of the hub; else it is a folder in a hub repository's layout."""
    return not Path(source.dataset).is_dir()


def _commit(dataset: str, revision: str | None) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    try:
        commit = HfApi().dataset_info(dataset, revision=revision).sha
    except RevisionNotFoundError as error:
        raise DataError(f"{dataset}: no revision '{revision}' on the Hugging Face hub") from error
    except HFValidationError as error:
        raise DataError(f"{dataset}: {error}") from error
    except (OSError, _http_error()) as error:
        raise _refused(dataset, error) from error
    if commit is None or not _COMMIT.fullmatch(commit):
        raise EnvironmentProblem(f"{dataset}: the Hugging Face hub names no commit", hint="give a revision")
    return commit


def _http_error() -> type[Exception]:
    """What errors of the HTTP library that the hub's client uses have in common, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def _refused(dataset: str, error: Exception) -> EnvironmentProblem:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return EnvironmentProblem(
        f"{dataset}: the Hugging Face hub does not give it: {reason}",
        hint="check the network and HF_HUB_OFFLINE, or download the files and use a parquet or jsonl source",
    )


def rows(source: HuggingFaceSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`dataset:row`, row) of a source of text. DataError when it lacks a column; else errors as for `stream`."""
    found = stream(source.dataset, config=source.config, split=source.split, revision=source.revision)
    for number, (place, row) in enumerate(found):
        for name in (source.field, source.language_field):
            if number == 0 and name is not None and name not in row:
                raise DataError(f"{source.dataset}: no column '{name}'; one of: {', '.join(list(row)[:12])}")
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
    except (OSError, _http_error()) as error:  # no connection, offline mode, a gated or unknown data set
        raise _refused(dataset, error) from error
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
