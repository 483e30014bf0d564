"""The chat template that ships with glmctl, with and without its loss marks."""

from __future__ import annotations

import functools
import re
from importlib import resources

_MARK_LINE = re.compile(r"^[ \t]*\{%-? *(?:end)?generation *-?%\}[ \t]*\n", re.MULTILINE)


@functools.cache
def training_template() -> str:
    """Our Jinja with `{% generation %}` around what the model itself writes."""
    return resources.files("glmctl.data").joinpath("chat_template.jinja").read_text(encoding="utf-8")


@functools.cache
def exported_template() -> str:
    """The same Jinja without marks, as it travels in a model folder: other readers do not know the tag.

    The marks stand on lines of their own, which whitespace control removes, so both render the same text.
    """
    return without_marks(training_template())


def without_marks(source: str) -> str:
    """A template of ours without the lines that hold marks."""
    return _MARK_LINE.sub("", source)
