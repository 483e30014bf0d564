"""HTML pages that hold code, read so that the code keeps its lines and indentation (spec section 2, Data: Code).

Prose becomes paragraphs; what stands in `<pre>` becomes a fenced block, its text untouched; inline `<code>` is quoted.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

_HTML = re.compile(r"<(?:!doctype html|html|head|body|div|p|pre|table|article|section)\b", re.IGNORECASE)
# not `head`: its end tag may be left out, as <body> may, and what it holds is silent by itself; not `form`: whole pages
# stand in one, so of a form only its lists of choices are
_SILENT = {"script", "style", "title", "nav", "footer", "select", "noscript", "svg", "template", "aside"}
_BLOCKS = {
    "p", "div", "section", "article", "li", "ul", "ol", "tr", "table", "blockquote", "br", "dl", "dt", "dd",
    "h1", "h2", "h3", "h4", "h5", "h6", "header", "main", "hr", "form",
}  # fmt: skip
_CODE_BLOCKS = {"pre", "textarea", "listing"}
_CODE_INLINE = {"code", "kbd", "samp", "tt"}
_LANGUAGE = re.compile(r"\b(?:language|lang|brush|highlight-source)[-:] ?([a-z0-9+#]+)", re.IGNORECASE)
_SPACES = re.compile(r"[ \t\r\f\v\n]+")


def is_html(text: str) -> bool:
    """Whether a text looks like an HTML page."""
    return _HTML.search(text[:5000]) is not None


def code_text(text: str) -> tuple[str, int]:
    """(the page as text, characters that stood inside code tags)."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.text(), reader.code_chars


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.code_chars = 0
        self._done: list[str] = []
        self._line: list[str] = []
        self._code: list[str] = []
        self._silent = self._inside = self._inline = 0
        self._language = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SILENT:
            self._silent += 1
        elif tag == "body":
            self._silent = 0  # what the head left open ends here
        elif tag in _CODE_BLOCKS:
            self._flush()
            self._inside += 1
        elif tag in _CODE_INLINE:
            self._inline += 1
            self._quote()
        elif tag == "br" and self._inside:
            self._code.append("\n")
        elif tag in _BLOCKS and not self._inside:
            self._flush()
            if tag[0] == "h" and tag[1:].isdigit():
                self._line.append("#" * int(tag[1:]) + " ")
            elif tag == "li":
                self._line.append("- ")
        if self._inside:
            found = _LANGUAGE.search(" ".join(value or "" for name, value in attrs if name == "class"))
            self._language = found.group(1).lower() if found else self._language

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag in _CODE_BLOCKS and self._inside:
            self._inside -= 1
            if not self._inside:
                self._fence()
        elif tag in _CODE_INLINE and self._inline:
            self._quote()
            self._inline -= 1
        elif tag in _BLOCKS and not self._inside:
            self._flush()

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        if self._inside:
            self._code.append(data)
            self.code_chars += len(data.strip())
        else:
            self.code_chars += len(data.strip()) if self._inline else 0
            self._line.append(_SPACES.sub(" ", data))

    def text(self) -> str:
        self._flush()
        self._fence()
        return "\n\n".join(self._done) + "\n"

    def _quote(self) -> None:
        if not self._inside and not self._silent:
            self._line.append("`")

    def _flush(self) -> None:
        line = _SPACES.sub(" ", "".join(self._line)).strip()
        if line.strip("`#- "):
            self._done.append(line)
        self._line.clear()

    def _fence(self) -> None:
        code = "".join(self._code).strip("\n").rstrip()
        if code.strip():
            self._done.append(f"```{self._language}\n{code}\n```")
        self._code.clear()
        self._language = ""
