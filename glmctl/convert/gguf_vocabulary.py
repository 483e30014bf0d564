"""A tokenizer.json as GGUF metadata, when llama.cpp has a pre-tokenizer that cuts text the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.data.tokenizer import Tokenizer, pattern
from glmctl.errors import DataError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NAMED = {"bos": "[gMASK]", "eos": "<|endoftext|>", "unk": "<|endoftext|>", "pad": "<|endoftext|>"}
_TURN_ENDS = {"eot": "<|user|>", "eom": "<|observation|>"}
"""`<|endoftext|>` as end of turn would make llama.cpp generate without end: GLM ends a turn by opening the next"""


def add_vocabulary(writer: GGUFWriter, folder: Path | None, vocab_size: int, *, where: Path) -> None:
    """Tokens, merges, special ids and chat template of `folder`; ids up to `vocab_size` are filled with unused ones.

    DataError without a tokenizer, and for a pre-tokenizer that llama.cpp has no twin of.
    """
    from gguf import TokenType

    if folder is None:
        raise DataError(f"{where}: no tokenizer beside it; a GGUF file has to carry one")
    tokenizer = Tokenizer.load(folder)
    tokenizer.require_fits(vocab_size, where=str(where))
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text(encoding="utf-8"))
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, index in body["model"]["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in body["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(body.get("pre_tokenizer"), path))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in body["model"]["merges"]])
    writer.add_add_bos_token(False)
    for kind, token in {**_NAMED, **_TURN_ENDS}.items():
        getattr(writer, f"add_{kind}_token_id")(tokenizer.id(token))
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _pre_tokenizer(found: Any, path: Path) -> str:
    """llama.cpp's name for GLM-4's pieces (up to three digits) or Qwen2's, which are the same with single digits."""
    steps = found.get("pretokenizers") if isinstance(found, dict) else None
    first = steps[0] if isinstance(steps, list) and steps and isinstance(steps[0], dict) else {}
    regex = first.get("pattern", {}).get("Regex") if isinstance(first.get("pattern"), dict) else None
    names = {pattern(digits=3): "glm4", pattern(digits=1): "qwen2"}
    if regex not in names:
        raise DataError(
            f"{path}: llama.cpp has no pre-tokenizer that cuts text as this one does",
            hint="GLM-4's pattern with digits=1 or digits=3 is known to both",
        )
    return names[regex]
