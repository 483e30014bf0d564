"""A tokenizer.json as GGUF metadata and back, for pre-tokenizers that cut text the same way in both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmctl.data.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, VISIBLE_TOKENS, Tokenizer, pattern
from glmctl.errors import DataError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [{"type": "Digits", "individual_digits": True}],
    "gpt-2": [],
    "glm4": [{"type": "Split", "pattern": {"Regex": pattern(3)}, "behavior": "Isolated", "invert": False}],
    "qwen2": [{"type": "Split", "pattern": {"Regex": pattern(1)}, "behavior": "Isolated", "invert": False}],
}
"""llama.cpp's name -> what stands before the byte-level step; without a Split that step cuts as GPT-2 did"""

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


@dataclass(frozen=True)
class Vocabulary:
    """A GGUF file's tokenizer, with GLM's special tokens behind its own where it lacks them."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    end: str
    chat_template: str | None

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> Vocabulary:
        """Read the metadata. KeyError for what is absent, DataError for a tokenizer that is no byte-level BPE."""
        from gguf import TokenType

        if fields["tokenizer.ggml.model"] != "gpt2":
            raise DataError(f"tokenizer {fields['tokenizer.ggml.model']!r} is not a byte-level BPE")
        pre = fields["tokenizer.ggml.pre"]
        if pre not in _PRE_TOKENIZERS:
            raise DataError(f"pre-tokenizer {pre!r} is not known; one of: {', '.join(sorted(_PRE_TOKENIZERS))}")
        tokens, types = list(fields["tokenizer.ggml.tokens"]), list(fields["tokenizer.ggml.token_type"])
        while types and types[-1] == TokenType.UNUSED:
            tokens.pop()
            types.pop()
        end = tokens[fields["tokenizer.ggml.eos_token_id"]]
        places = {token: index for index, token in enumerate(tokens)}
        for token in SPECIAL_TOKENS:
            kind = TokenType.USER_DEFINED if token in VISIBLE_TOKENS else TokenType.CONTROL
            if token in places:
                types[places[token]] = kind
            else:
                tokens.append(token)
                types.append(kind)
        template = fields.get("tokenizer.chat_template")
        return cls(tokens, types, list(fields["tokenizer.ggml.merges"]), pre, end, template)

    @property
    def size(self) -> int:
        """Token ids are below this."""
        return len(self.tokens)

    def files(self) -> dict[str, str]:
        """`tokenizer.json`, `tokenizer_config.json` and, where there is a template, `chat_template.jinja`."""
        from gguf import TokenType

        added = [
            {"id": index, "content": self.tokens[index], "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": kind == TokenType.CONTROL}
            for index, kind in enumerate(self.types)
            if kind != TokenType.NORMAL
        ]
        steps = _PRE_TOKENIZERS[self.pre]
        plain = not any(step["type"] == "Split" for step in steps)
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": plain}
        body = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]},
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(self.tokens)}, "merges": self.merges},
        }
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.end}
        config |= {"padding_side": "left", "pad_token": END_OF_TEXT, "clean_up_tokenization_spaces": False}
        result = {
            "tokenizer.json": json.dumps(body, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        return result if self.chat_template is None else {**result, "chat_template.jinja": self.chat_template}
