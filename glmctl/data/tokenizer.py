"""Byte-level BPE that carries GLM's 36 special tokens in their order, placed after the BPE tokens.

A tokenizer folder holds `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, which transformers,
vLLM and SGLang load as they are. Byte-level means that every byte string has an encoding: nothing is ever unknown.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from glmctl import console
from glmctl.data.template_source import exported_template
from glmctl.errors import DataError, RecipeError
from glmctl.run import atomic

if TYPE_CHECKING:
    from glmctl.recipe.schema import TokenizerRecipe
    from glmctl.run.directory import Run

END_OF_TEXT = "<|endoftext|>"
USER = "<|user|>"
OBSERVATION = "<|observation|>"
NOTHINK = "/nothink"

# spec section 1.7: ids 151329 ... 151364 in the released tokenizer, in this order
SPECIAL_TOKENS: tuple[str, ...] = (
    END_OF_TEXT,
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    USER,
    "<|assistant|>",
    OBSERVATION,
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|begin_of_audio|>",
    "<|end_of_audio|>",
    "<|begin_of_transcription|>",
    "<|end_of_transcription|>",
    "<|code_prefix|>",
    "<|code_middle|>",
    "<|code_suffix|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    NOTHINK,
    "<|begin_of_box|>",
    "<|end_of_box|>",
    "<|image|>",
    "<|video|>",
)

# added tokens, but ones that survive `skip_special_tokens`: a parser needs to see them
VISIBLE_TOKENS = frozenset(t for t in SPECIAL_TOKENS if re.fullmatch(r"</?(think|tool_\w+|arg_\w+)>|/nothink", t))

# GLM-4's pre-tokenizer; the released one has 3 digits in a piece
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_FILE_BYTES = 64 * 1024 * 1024
_SAMPLE_BYTES = 1_000_000
# the look-ahead keeps the search from trying 36 words at every character
_SPECIAL_SPLIT = re.compile(r"(?=[</\[])(?:" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")


def pattern(digits: int) -> str:
    """GLM-4's pre-tokenizer as a regular expression, with at most `digits` digits in one piece."""
    return _PATTERN.format(digits=digits)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, inverted: character -> byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    table = {chr(byte): byte for byte in plain}
    table.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return table


_BYTES = _byte_of_char()


class Tokenizer:
    """Text to token ids and back. Build one with `Tokenizer.load` or `Tokenizer.train`."""

    def __init__(self, backend: Any, *, where: str = "tokenizer", end: str | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`. DataError (naming `where`) if ids have gaps or a merge makes a special.

        end: a token that ends a reply beside GLM's own three, for a model that came with another chat format.
        """
        self._full = backend
        self._spec: dict[str, Any] = json.loads(backend.to_str())
        self._ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._added = {a["content"]: int(a["id"]) for a in self._spec["added_tokens"]}
        self._hidden = {int(a["id"]) for a in self._spec["added_tokens"] if a["special"]}
        self.vocab_size: int = max(self._ids.values()) + 1
        if self.vocab_size != len(set(self._ids.values())):
            raise DataError(f"{where}: token id {self.vocab_size - 1} but only {len(set(self._ids.values()))} tokens")
        self._plain = self._without_added_tokens(where)
        self._byte_table = self._bytes_by_id()
        self.pad_id: int = self._added[END_OF_TEXT]
        ends = (END_OF_TEXT, USER, OBSERVATION, end)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(self._added[t] for t in ends if t in self._added))
        self.hash: str = hashlib.sha256(backend.to_str().encode()).hexdigest()

    # ------------------------------------------------------------------ making one

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read `tokenizer.json` of a model or tokenizer folder, or of a run directory's export.

        RecipeError if there is none; DataError if it is over 64 MB, malformed, not a BPE, or lacks GLM's specials.
        """
        folder = Path(folder)
        candidates = [folder / "tokenizer.json", folder / "export" / "tokenizer.json"]
        path = next((p for p in candidates if p.is_file()), None)
        if path is None:
            raise RecipeError(f"{folder}: no tokenizer.json there", hint="name a tokenizer run or a model folder")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {size} bytes is more than a tokenizer may have ({MAX_FILE_BYTES})")
        try:
            text = path.read_text(encoding="utf-8")
            spec = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON: {error}") from error
        _check_layout(spec, path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{path}: not a tokenizer: {error}") from error
        # the library gives added tokens ids of its own where the file's cannot be had
        for token in spec["added_tokens"]:
            if backend.token_to_id(token["content"]) != token["id"]:
                raise DataError(f"{path}: special token {token['content']!r} cannot have id {token['id']}")
        # lengths and padding are the caller's business, never the file's
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, where=str(path), end=_end_token(path.with_name("tokenizer_config.json")))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, digits: int = 3) -> Tokenizer:
        """Learn merges from `texts` until there are `vocab_size` tokens, the 36 specials among them.

        Deterministic: counts of pieces decide, ties go to the smaller pair of ids; the order of `texts` does not
        matter. Little text may run out of merges before `vocab_size`. RecipeError when 256 bytes + 36 do not fit.
        """
        if vocab_size < 256 + len(SPECIAL_TOKENS):
            raise RecipeError(f"vocab_size {vocab_size} is under {256 + len(SPECIAL_TOKENS)} (256 bytes + 36 specials)")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern(digits)), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            special_tokens=[],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        # a special must never be learnt as an ordinary token too, or plain text could produce it
        pieces = (piece for text in texts for piece in _SPECIAL_SPLIT.split(text) if piece)
        backend.train_from_iterator(pieces, trainer)
        for token in SPECIAL_TOKENS:
            backend.add_tokens([AddedToken(token, special=token not in VISIBLE_TOKENS, normalized=False)])
        return cls(backend)

    def save(self, folder: Path | str, chat_template: str | None = None) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` (ours if not given)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 131072,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in VISIBLE_TOKENS],
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in self._spec["added_tokens"]
            },
        }
        files = {
            "tokenizer.json": self._full.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
            "chat_template.jinja": exported_template() if chat_template is None else chat_template,
        }
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="")

    # ------------------------------------------------------------------ text to ids

    def encode(self, text: str) -> list[int]:
        """Token ids; special strings in `text` become their special tokens. Nothing is put before or after."""
        ids: list[int] = self._full.encode(_clean(text), add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` as mere text: never one of the added tokens, even where it spells `<|user|>`."""
        ids: list[int] = self._plain.encode(_clean(text), add_special_tokens=False).ids
        return ids

    def encode_plain_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_plain` of each text, on all cores."""
        encodings = self._plain.encode_batch_fast([_clean(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def id(self, special: str) -> int:
        """The id of an added token. KeyError-free: an unknown name is a DataError."""
        if special not in self._added:
            raise DataError(f"the tokenizer has no special token {special!r}")
        return self._added[special]

    @property
    def added_tokens(self) -> dict[str, int]:
        """Every added token (GLM's 36, and any that the file brings along) with its id."""
        return dict(self._added)

    def require_fits(self, model_vocab_size: int, where: str = "model") -> None:
        """DataError unless every id is below the model's vocabulary size."""
        if self.vocab_size > model_vocab_size:
            raise DataError(
                f"{where}: vocabulary of {model_vocab_size} is smaller than the tokenizer's {self.vocab_size}",
                hint=f"set model.vocab_size to {self.vocab_size} or more, or train a smaller tokenizer",
            )

    # ------------------------------------------------------------------ ids to text

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text of `ids`; incomplete UTF-8 becomes U+FFFD. Ids that no token has (vocabulary padding) give nothing."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The bytes that `ids` stand for."""
        table, hidden = self._byte_table, self._hidden if skip_special else frozenset()
        return b"".join(table[i] for i in ids if 0 <= i < len(table) and i not in hidden)

    def detokenizer(self, skip_special: bool = False) -> Detokenizer:
        """A decoder for one stream of ids."""
        return Detokenizer(self, skip_special)

    # ------------------------------------------------------------------ inside

    def _without_added_tokens(self, where: str) -> Any:
        spec = dict(self._spec, added_tokens=[], post_processor=None, truncation=None, padding=None)
        vocab = spec["model"]["vocab"]
        if any(token in vocab for token in self._added):
            spec["model"] = dict(spec["model"], vocab={t: i for t, i in vocab.items() if t not in self._added})
        try:
            return tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{where}: a merge makes one of its special tokens: {error}") from error

    def _bytes_by_id(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, index in self._ids.items():
            known = token not in self._added and all(char in _BYTES for char in token)
            table[index] = bytes(_BYTES[char] for char in token) if known else token.encode("utf-8")
        return table


class Detokenizer:
    """Turns one stream of ids into text, holding back bytes that do not yet make a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became certain with this id (often the token's own, empty inside a character)."""
        return self._decoder.decode(self._tokenizer.decode_bytes((token_id,), self._skip_special))

    def flush(self) -> str:
        """What is left at the end of the stream: U+FFFD for an unfinished character, or nothing."""
        return self._decoder.decode(b"", final=True)


def _clean(text: str) -> str:
    """Lone surrogates (legal in JSON, not in UTF-8) become U+FFFD; all other text passes as it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _end_token(path: Path) -> str | None:
    """The `eos_token` of a tokenizer_config.json, a string or an object with `content`; None when there is no such."""
    if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    token = body.get("eos_token") if isinstance(body, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _check_layout(spec: Any, path: Path) -> None:
    """DataError unless `spec` has the shape of a BPE tokenizer.json with sane ids."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise DataError(f"{path}: {what}")

    need(isinstance(spec, dict), "not a JSON object")
    model = spec.get("model")
    need(isinstance(model, dict), "no 'model' section")
    need(model.get("type", "BPE") == "BPE", f"model type {model.get('type')!r} is not BPE")
    vocab, merges, added = model.get("vocab"), model.get("merges"), spec.get("added_tokens")
    need(isinstance(vocab, dict) and bool(vocab), "'model.vocab' is not a table of tokens")
    need(isinstance(merges, list), "'model.merges' is not a list")
    need(isinstance(added, list) and all(isinstance(a, dict) for a in added), "'added_tokens' is not a list of objects")
    need(all(isinstance(a.get("content"), str) for a in added), "an added token has no 'content'")
    missing = [token for token in SPECIAL_TOKENS if token not in {a["content"] for a in added}]
    need(not missing, f"{len(missing)} of GLM's special tokens are missing: {', '.join(missing[:4])}")
    total = len(vocab) + len(added)
    ids = [*vocab.values(), *(a.get("id") for a in added)]
    bad = next((i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < total), None)
    need(bad is None, f"token id {bad} is outside 0..{total - 1}")
    contents = {a["id"]: a["content"] for a in added}
    clash = next((t for t, i in vocab.items() if contents.get(i, t) != t), None)
    need(clash is None, f"token {clash!r} has the id of a special token")


def run(recipe: TokenizerRecipe, run: Run) -> dict[str, Any]:
    """Train the tokenizer of `recipe` and publish it as the run's export.

    Summary: `vocab_size`, `bytes_per_token` (UTF-8 bytes of the training text a token covers), `documents`, `bytes`.
    """
    # not at the top: sources renders conversations, which needs this module
    from glmctl.data.reading import BadRows
    from glmctl.data.sources import documents

    bad = BadRows()
    texts = [document.text for document in documents(recipe.sources, recipe.seed, bad=bad) if document.copy == 0]
    if not texts:
        raise DataError("the tokenizer's sources hold no text")
    size = sum(len(text.encode("utf-8", "replace")) for text in texts)
    console.note(f"training {recipe.vocab_size} tokens on {len(texts)} documents, {size / 1e6:.1f} MB")
    tokenizer = Tokenizer.train(texts, recipe.vocab_size, recipe.digits)
    if tokenizer.vocab_size < recipe.vocab_size:
        console.warn(f"the text gave out at {tokenizer.vocab_size} of {recipe.vocab_size} tokens")
    with atomic.publish(run.export) as folder:
        tokenizer.save(folder)
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": _bytes_per_token(tokenizer, texts, size),
        "documents": len(texts),
        "bytes": size,
        "bad_rows": bad.total,
        "tokenizer_hash": tokenizer.hash,
    }


def _bytes_per_token(tokenizer: Tokenizer, texts: list[str], size: int) -> float:
    """UTF-8 bytes a token covers, measured on an even sample of about a megabyte of `texts` (`size` bytes)."""
    sample = texts[:: max(1, size // _SAMPLE_BYTES)]
    tokens = sum(len(ids) for ids in tokenizer.encode_plain_batch(sample))
    return sum(len(text.encode("utf-8", "replace")) for text in sample) / max(1, tokens)
