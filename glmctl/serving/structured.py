"""The grammar of an answer: JSON schemas, regular expressions, and tool calls in the form that the template writes.

GLM-4.5's is `<tool_call>name`, then for each argument `<arg_key>key</arg_key>` and `<arg_value>value</arg_value>` on
lines of their own, then `</tool_call>`. String values are bare text, others JSON. Tags are single tokens, which Lark
names by id; text may never spell one, as the parser reads text. The other is one JSON object between the first and
the last tag, in whose strings a tag is text.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from glmctl.data.tokenizer import Tokenizer
from glmctl.data.tool_styles import Calls
from glmctl.engine.grammar import GrammarCompiler, GrammarConstraint, GrammarError
from glmctl.engine.request import Request
from glmctl.serving.api_error import ApiError
from glmctl.serving.protocol import ChatRequest, CompletionRequest, Generation, StructuredOutputs

COMPILE_SECONDS = 1.0
MAX_SCHEMA_CHARS = 128 * 1024
MAX_ARGUMENTS = 256
_MAX_REFERENCES = 8

# bounded: a model that has nothing to say would otherwise indent for ever
_JSON = {"whitespace_pattern": r"[ \n\t]{0,40}"}
_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


class Grammars:
    """Compiles what a request asks of its answer, on a thread of its own and within a second."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, style: Calls) -> None:
        """style: in which the served template writes tool calls."""
        self._style = style
        self._tags = {tag: f"<[{tokenizer.id(tag)}]>" for tag in _TAGS}
        self._end_of_thinking = tokenizer.id("</think>")
        self._compiler = GrammarCompiler(
            [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)],
            special=tokenizer.added_tokens.values(),
            eos_ids=tokenizer.eos_ids,
            encode=tokenizer.encode_plain,
            vocab_size=vocab_size,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="glmctl-grammar")

    async def of_chat(self, body: ChatRequest) -> GrammarConstraint | None:
        """The constraint of a chat answer, None when it may be anything. ApiError 400 names the field at fault."""
        answer, param = _answer_rule(body)
        tools = body.tools if body.tool_choice != "none" else None
        names = body.chosen_tools
        allowed = [tool.function for tool in tools or () if names is None or tool.function.name in names]
        calls_bound = body.must_call or names is not None or any(function.strict for function in allowed)
        if answer is None and not calls_bound:
            return None
        rules = ["WS: /[ \\n]{0,2}/", f"TEXT: {_without('<tool_call>')}", f"VALUE: {_without('</arg_value>')}"]
        if allowed:
            rules += self._calls(allowed, one=body.one_call)
        if answer is not None:
            rules.append(f"answer: {answer}")
        if body.must_call:
            start = "WS calls"
        elif answer is not None:
            start = "WS (answer | calls)" if allowed else "WS answer"
        else:
            start = "TEXT calls?"
        lark = "\n".join([f"start: {start}", *rules])
        after = self._end_of_thinking if body.enable_thinking else None
        return await self._compile(lark, after, param or "tools")

    async def of_completion(self, body: CompletionRequest) -> GrammarConstraint | None:
        """The same for a plain completion."""
        if body.structured_outputs is None:
            return None
        rule = _structured_rule(body.structured_outputs)
        return await self._compile(f"start: {rule}", None, "structured_outputs")

    async def _compile(self, lark: str, after: int | None, param: str) -> GrammarConstraint:
        if len(lark) > 2 * MAX_SCHEMA_CHARS:
            raise ApiError(
                400, f"{param}: larger than {MAX_SCHEMA_CHARS} characters", param=param, code="invalid_schema"
            )
        work = asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: self._compiler.compile(lark, after=after)
        )
        try:
            return await asyncio.wait_for(work, COMPILE_SECONDS)
        except GrammarError as error:
            raise ApiError(400, f"{param}: {error.message}", param=param, code="invalid_schema") from error
        except TimeoutError as error:
            message = f"{param}: could not be compiled within {COMPILE_SECONDS:g} s"
            raise ApiError(400, message, param=param, code="invalid_schema") from error

    # ------------------------------------------------------------------ tool calls

    def _calls(self, functions: Sequence[Any], *, one: bool) -> list[str]:
        rules = ["calls: call" if one else "calls: call (WS call)*"]
        rules.append("call: " + " | ".join(f"call{index}" for index in range(len(functions))))
        for index, function in enumerate(functions):
            one_call = self._json_call if self._style == "json" else self._call
            rules += one_call(f"call{index}", function.name, function.parameters or {})
        if self._style == "tags":
            rules += [f"pair: {self._pair('KEY', 'VALUE')}", "KEY: /[^<>\\n]{1,64}/"]
        return rules

    def _json_call(self, rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
        """One tool's call; as in the other style, arguments that are not declared only where none is."""
        whole: dict[str, Any] = {"type": "object", **schema}
        if schema.get("properties") and not {"$ref", "anyOf", "oneOf", "allOf"} & schema.keys():
            whole.setdefault("additionalProperties", False)
        opening = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
        inside = f'{opening} {_json_rule(whole, "tools")} "}}"'
        return [f"{rule}: {self._tags['<tool_call>']} WS {inside} WS {self._tags['</tool_call>']}"]

    def _call(self, rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
        """One tool's call: its declared arguments in order, the optional ones optional; any where none is declared."""
        properties = schema.get("properties")
        opening = f"{self._tags['<tool_call>']} {json.dumps(name + chr(10))}"
        if not isinstance(properties, Mapping) or not properties:
            pairs = "" if schema.get("additionalProperties") is False else "pair*"
            return [f"{rule}: {opening} {pairs} {self._tags['</tool_call>']}"]
        if len(properties) > MAX_ARGUMENTS:
            raise ApiError(400, f"tools: more than {MAX_ARGUMENTS} arguments", param="tools", code="invalid_schema")
        needed = schema.get("required")
        required = set(map(str, needed)) if isinstance(needed, list) else set()
        rules, parts = [], []
        for index, (key, value) in enumerate(properties.items()):
            inner = f"{rule}_{index}"
            text, terminals = _value_rule(value, schema, inner)
            rules += [*terminals, f"{inner}: {self._pair(json.dumps(key, ensure_ascii=False), text)}"]
            parts.append(inner if key in required else f"{inner}?")
        return [f"{rule}: {opening} {' '.join(parts)} {self._tags['</tool_call>']}", *rules]

    def _pair(self, key: str, value: str) -> str:
        tags = self._tags
        key_part = f'{tags["<arg_key>"]} {key} {tags["</arg_key>"]} "\\n"'
        return f'{key_part} {tags["<arg_value>"]} {value} {tags["</arg_value>"]} "\\n"'


def require_followed(request: Request, body: Generation) -> None:
    """ApiError 400 when the grammar of an answer that has ended ran into its limits half way: it is not what was
    asked for, however whole it looks."""
    constraint = request.constraint
    if isinstance(constraint, GrammarConstraint) and constraint.problem is not None:
        asked = (name for name in ("structured_outputs", "response_format") if getattr(body, name, None) is not None)
        param = next(asked, "tools")
        message = f"{param}: too complex to follow to the end ({constraint.problem})"
        raise ApiError(400, message, param=param, code="grammar_too_complex")


def _answer_rule(body: ChatRequest) -> tuple[str | None, str | None]:
    """Lark of what the content must be, and the field that says so."""
    if body.structured_outputs is not None:
        return _structured_rule(body.structured_outputs), "structured_outputs"
    schema = None if body.response_format is None else body.response_format.schema_of_answer
    if schema is None:
        return None, None
    return _json_rule(schema, "response_format"), "response_format"


def _structured_rule(wish: StructuredOutputs) -> str:
    if wish.json_schema is not None:
        return _json_rule(wish.json_schema, "structured_outputs")
    if wish.regex is not None:
        return _regex(wish.regex)
    assert wish.choice is not None
    return "(" + " | ".join(json.dumps(text, ensure_ascii=False) for text in wish.choice) + ")"


def _json_rule(schema: Mapping[str, Any], param: str) -> str:
    text = json.dumps({**schema, "x-guidance": _JSON}, ensure_ascii=False)
    if len(text) > MAX_SCHEMA_CHARS:
        raise ApiError(
            400, f"{param}: the schema is larger than {MAX_SCHEMA_CHARS} characters", param=param, code="invalid_schema"
        )
    return f"%json {text}"


def _without(tag: str) -> str:
    """A terminal of any text in which `tag` is not spelt out."""
    return f"/(?s:.*)/ & ~/(?s:.*){tag.replace('/', chr(92) + '/')}(?s:.*)/"


def _value_rule(schema: Any, root: Mapping[str, Any], rule: str) -> tuple[str, list[str]]:
    """An argument's value, bare text where it is a string, else JSON; and the terminals that it needs."""
    schema = _resolved(schema, root)
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, list) and choices:
        texts = [choice if isinstance(choice, str) else json.dumps(choice, ensure_ascii=False) for choice in choices]
        return "(" + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts) + ")", []
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else set(map(str, kind)) if isinstance(kind, list) else set()
    if "string" in kinds and kinds == {"string"} and isinstance(schema.get("pattern"), str):
        name = rule.upper()
        return name, [f"{name}: {_without('</arg_value>')} & {_regex(_whole(schema['pattern']))}"]
    if "string" in kinds or (not kinds and not {"anyOf", "oneOf", "allOf", "properties", "items"} & schema.keys()):
        return "VALUE", []
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return _json_rule({**definitions, **schema}, "tools"), []


def _regex(pattern: str) -> str:
    """As a Lark terminal: the slash ends one, and a line break may not stand in it."""
    escaped = re.sub(r"(\\.)|/", lambda match: match[1] or "\\/", pattern, flags=re.DOTALL)
    return "/" + escaped.replace("\n", "\\n").replace("\r", "\\r") + "/"


def _whole(pattern: str) -> str:
    """A schema's pattern may match anywhere, a terminal matches everything. `^a|b$` becomes stricter, never looser."""
    before = "" if pattern.startswith("^") else "(?s:.*)"
    anchored = pattern.endswith("$") and not pattern.endswith("\\$")
    core = pattern.removeprefix("^")
    return f"{before}({core[:-1] if anchored else core}){'' if anchored else '(?s:.*)'}"


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """`schema`, followed through references into the tool's own definitions."""
    for _ in range(_MAX_REFERENCES):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        schema = target
    return schema if isinstance(schema, Mapping) else {}
