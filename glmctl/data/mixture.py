"""How often each domain is shown so that the training tokens have the shares a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glmctl import console
from glmctl.data import spool
from glmctl.data.chat import ChatTemplate
from glmctl.data.encode import talk_tokens
from glmctl.errors import DataError

if TYPE_CHECKING:
    from glmctl.data.curate import Decisions
    from glmctl.data.tokenizer import Tokenizer
    from glmctl.recipe.schema import DataRecipe

_SAMPLE = 200
"""documents of a domain on which bytes a token are measured; shares come out within a few per cent"""
MAX_MISS = 0.05
"""difference between a share and the one asked for from which it is said"""


def apply(recipe: DataRecipe, decisions: Decisions, scanned: Sequence[Path], tokenizer: Tokenizer) -> dict[str, float]:
    """Multiply every document's epochs by its domain's factor; returns the factors, {} without a mixture.

    The sum of all tokens stays about what the stages made it. DataError when a domain is empty, or would have to be
    shown more than `max_epochs` times on average.
    """
    if not recipe.mixture:
        return {}
    domains = np.array([source.domain for source in recipe.sources])[decisions.table["source"]]
    shown, tokens = {}, {}
    for domain in recipe.mixture:
        mine = (domains == domain) & (decisions.epochs > 0)
        if not mine.any():
            raise DataError(f"mixture.{domain}: no document of this domain is left")
        sizes = decisions.table["bytes"][mine]
        shown[domain] = float(decisions.epochs[mine] @ sizes) / float(sizes.sum())
        per_token = _bytes_per_token(np.nonzero(mine)[0], decisions, scanned, tokenizer)
        tokens[domain] = float(decisions.epochs[mine] @ sizes) / per_token
    found = factors(recipe.mixture, tokens)
    for domain, factor in found.items():
        if factor * shown[domain] > recipe.max_epochs:
            raise DataError(
                f"mixture.{domain}: this share means {factor * shown[domain]:.1f} epochs, more than max_epochs "
                f"({recipe.max_epochs:g})",
                hint="lower its share, add documents, or raise max_epochs",
            )
        decisions.epochs[domains == domain] *= factor
    return found


def factors(shares: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, float]:
    """Domain -> factor on its tokens that gives every domain its share and keeps the sum of all tokens."""
    total, parts = sum(tokens.values()), sum(shares.values())
    return {domain: share / parts * total / tokens[domain] for domain, share in shares.items()}


def warn_of_misses(shares: Mapping[str, float], tokens: Mapping[str, int]) -> None:
    """One warning when training `tokens` by domain miss the `shares` asked for by more than `MAX_MISS`.

    A few documents, each shown a whole number of times, cannot have any share.
    """
    parts, total = sum(shares.values()), sum(tokens.values())
    missed = {
        domain: (tokens.get(domain, 0) / total, share / parts)
        for domain, share in shares.items()
        if total and abs(tokens.get(domain, 0) / total - share / parts) > MAX_MISS
    }
    if missed:
        said = ", ".join(f"{domain} {found:.1%} instead of {asked:.1%}" for domain, (found, asked) in missed.items())
        console.warn(f"mixture: shares of the training tokens are not those asked for: {said}")


def _bytes_per_token(index: np.ndarray, decisions: Decisions, scanned: Sequence[Path], tokenizer: Tokenizer) -> float:
    """UTF-8 bytes a token covers, on the documents with the smallest digests, encoded as they will be."""
    smallest = np.sort(index[np.argsort(decisions.table["digest"][index, 0], kind="stable")[:_SAMPLE]])
    documents = spool.pick(scanned, decisions.bounds, decisions.table["start"], smallest)
    template = ChatTemplate(tokenizer)
    encoded = tokenizer.encode_plain_batch([document.text for document in documents if not document.conversation])
    encoded += [talk_tokens(document.conversation, template) for document in documents if document.conversation]
    # each document also has its end token
    return float(decisions.table["bytes"][smallest].sum()) / sum(len(ids) + 1 for ids in encoded)
