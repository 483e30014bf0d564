"""Tool calls with code arguments as tags and as JSON: tokens, escapes, and what survives a slip.

    python benchmarks/tool_calls.py [--tokenizer FOLDER] [--functions 400] [--json FILE]

The arguments are functions of Python's own library. For each style it counts the tokens of the call, and breaks the
text as a writer of code would: by copying the code without escaping it (what a model does that has not learnt to),
and by forgetting or doubling one escape. A call survives if parsing gives back the very code.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import sysconfig
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import styled

STYLES = ("tags", "json")


def functions(count: int) -> list[str]:
    """Sources of at most `count` functions of the standard library, the first of a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: list[str] = []
    for path in sorted(root.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and 3 <= (node.end_lineno or 0) - node.lineno <= 40:
                source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
                # tags inside the code would be no longer plain text
                if "tool_call" not in source and "arg_" not in source:
                    found.append(source)
    return random.Random(0).sample(found, min(count, len(found)))


def calling(code: str) -> list[dict[str, Any]]:
    """A conversation that ends in a call of `run` with `code`."""
    call = {"function": {"name": "run", "arguments": {"source": code}}}
    return [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def written(template: ChatTemplate, code: str) -> str:
    """What the model would write, as text."""
    return template.render(calling(code)).rpartition("</think>")[2]


def survives(template: ChatTemplate, text: str, code: str) -> bool:
    """Whether the call in `text` is parsed to the very code."""
    read = template.parse(f"\n<think></think>{text}", [TOOL])
    return read.well_formed and [call["arguments"].get("source") for call in read.tool_calls] == [code]


def unescaped(text: str, code: str, rng: random.Random) -> str:
    """The code stands in the call as it is."""
    return text.replace(json.dumps(code, ensure_ascii=False)[1:-1], code)


def one_forgotten(text: str, code: str, rng: random.Random) -> str:
    """One backslash of the text is left out."""
    places = [at for at, sign in enumerate(text) if sign == "\\"]
    at = rng.choice(places) if places else len(text)
    return text[:at] + text[at + 1 :]


def one_doubled(text: str, code: str, rng: random.Random) -> str:
    """One backslash of the text is written twice."""
    places = [at for at, sign in enumerate(text) if sign == "\\"]
    at = rng.choice(places) if places else len(text)
    return text[:at] + "\\" * (at < len(text)) + text[at:]


SLIPS: dict[str, Callable[[str, str, random.Random], str]] = {
    "copied without escaping": unescaped,
    "one escape forgotten": one_forgotten,
    "one escape doubled": one_doubled,
}
TOOL = {"name": "run", "parameters": {"type": "object", "properties": {"source": {"type": "string"}}}}


def measure(tokenizer: Tokenizer, codes: list[str]) -> dict[str, dict[str, Any]]:
    """Per style: tokens of a call and of its code, escapes a call, and the share that survives each slip."""
    result: dict[str, dict[str, Any]] = {}
    for style in STYLES:
        template = ChatTemplate(tokenizer, styled(style))  # type: ignore[arg-type]
        texts = [written(template, code) for code in codes]
        assert all(survives(template, text, code) for text, code in zip(texts, codes, strict=True))
        rng = random.Random(1)
        made = [template.encode_training(calling(code)) for code in codes]
        extra = sum(text.count("\\") for text in texts) - sum(code.count("\\") for code in codes)
        result[style] = {
            "tokens_per_call": sum(sum(one.loss_mask) for one in made) / len(codes),
            "escapes_per_call": extra / len(codes) if style == "json" else 0.0,
            "survives": {
                name: sum(
                    survives(template, slip(text, code, rng) if style == "json" else text, code)
                    for text, code in zip(texts, codes, strict=True)
                )
                / len(codes)
                for name, slip in SLIPS.items()
            },
        }
    result["ratio"] = {"tokens": result["json"]["tokens_per_call"] / result["tags"]["tokens_per_call"]}
    return result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="default: one of 8,192 tokens, trained on other such code")
    parser.add_argument("--functions", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    codes = functions(2 * options.functions)
    codes, others = codes[: options.functions], codes[options.functions :]
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else Tokenizer.train(others, vocab_size=8192)
    found = measure(tokenizer, codes)
    print(f"{len(codes)} functions of Python's library as arguments; vocabulary {tokenizer.vocab_size}\n")
    print(f"{'':28}{'tags':>8}{'json':>8}")
    for key, label in (("tokens_per_call", "tokens a call"), ("escapes_per_call", "escapes a call")):
        print(f"{label:28}" + "".join(f"{found[style][key]:8.1f}" for style in STYLES))
    for slip in SLIPS:
        print(f"{slip:28}" + "".join(f"{found[style]['survives'][slip]:8.1%}" for style in STYLES))
    print("\nAs tags there is nothing to escape, so no slip can happen: those calls are parsed as they are.")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
