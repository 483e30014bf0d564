"""What is trained on, against TRL's own GLM-4.5 training template: 50 drawn conversations of every kind.

The template (shipped inside TRL, with `{% generation %}` around what the model writes, closing role tokens included)
is rendered and tokenised by transformers, so nothing of ours takes part in the oracle. It differs from ours on purpose
in two places: it trains the empty think block of a /nothink turn, which inference gives, and it words the introduction
of declared tools otherwise. Weights are OpenAI's and no template's: the stretches that the oracle trains are the
assistant's messages in order, and those of weight 0 are taken out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate, Encoded
from glmctl.data.conversations import Conversation, read_conversations
from glmctl.data.tokenizer import Tokenizer
from glmctl.training.sft import encode

Messages = list[dict[str, Any]]
PER_KIND = 50

pytestmark = pytest.mark.slow
WORDS = ("river", "two", "3", "-", "naïve", "数学", "😀", "a<b", '"x"', "\n", "\n\n- item", "def f():\n\treturn 1", "…")


def text(rng: random.Random, most: int = 6) -> str:
    """Words of every script; it ends in ASCII, for transformers loses a last character of several tokens."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most))) + "."


def user(rng: random.Random) -> dict[str, Any]:
    return {"role": "user", "content": text(rng)}


def says(rng: random.Random, *, thinks: bool) -> dict[str, Any]:
    message = {"role": "assistant", "content": text(rng)}
    return {**message, "reasoning_content": text(rng, 12)} if thinks else message


def value(rng: random.Random) -> Any:
    return rng.choice([text(rng), rng.randint(-9, 99), 1.5, True, None, [1, "数"], {"k": text(rng)}, ""])


def calls(rng: random.Random, count: int, *, thinks: bool) -> Messages:
    """A turn that calls `count` tools, and their results."""
    made = [
        {"function": {"name": f"tool_{i}", "arguments": {f"a{j}": value(rng) for j in range(rng.randint(0, 3))}}}
        for i in range(count)
    ]
    turn = {"role": "assistant", "content": text(rng) if rng.random() < 0.5 else "", "tool_calls": made}
    if thinks:
        turn["reasoning_content"] = text(rng, 12)
    return [turn, *({"role": "tool", "content": text(rng)} for _ in range(count))]


def turns(rng: random.Random, count: int, *, thinks: bool) -> Messages:
    return [message for _ in range(count) for message in (user(rng), says(rng, thinks=thinks))]


def loop(rng: random.Random, *, thinks: bool, parallel: int = 1) -> Messages:
    body = [message for _ in range(rng.randint(1, 3)) for message in calls(rng, parallel, thinks=thinks)]
    return [user(rng), *body, says(rng, thinks=thinks)]


KINDS: dict[str, Callable[[random.Random], Messages]] = {
    "one turn": lambda rng: turns(rng, 1, thinks=False),
    "one turn with reasoning": lambda rng: turns(rng, 1, thinks=True),
    "several turns": lambda rng: turns(rng, rng.randint(2, 4), thinks=False),
    "several turns with reasoning": lambda rng: turns(rng, rng.randint(2, 4), thinks=True),
    "system": lambda rng: [{"role": "system", "content": text(rng)}, *turns(rng, 2, thinks=rng.random() < 0.5)],
    "tool loop": lambda rng: loop(rng, thinks=False),
    "tool loop with reasoning": lambda rng: loop(rng, thinks=True),
    "parallel calls": lambda rng: loop(rng, thinks=rng.random() < 0.5, parallel=rng.randint(2, 3)),
    "a tool loop in the past": lambda rng: [*loop(rng, thinks=True), *turns(rng, 1, thinks=True)],
    "two tool loops": lambda rng: [*loop(rng, thinks=False), *loop(rng, thinks=False)],
    "ends in a call": lambda rng: [user(rng), calls(rng, 1, thinks=True)[0]],
}


@pytest.fixture(scope="module")
def oracle(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[list, list]]:
    """TRL's (token ids, trained or not) of a conversation."""
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = resources.files("trl").joinpath("chat_templates", "glm4moe_training.jinja").read_text(encoding="utf-8")

    def rendered(messages: Messages, **switch: Any) -> tuple[list, list]:
        found = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **switch
        )
        return found["input_ids"], found["assistant_masks"]

    return rendered


def drawn(kind: str) -> list[Messages]:
    found = [KINDS[kind](random.Random(f"{kind}/{seed}")) for seed in range(PER_KIND)]
    assert len({str(one) for one in found}) == PER_KIND, "no two are the same"
    return found


DRESSES = {"plain": (False, False), "tools": (True, False), "weights": (False, True), "both": (True, True)}
"""name -> whether tools are declared, whether some of the assistant's messages have weight 0"""


def dressed(kind: str, dress: str) -> list[Conversation]:
    with_tools, with_weights = DRESSES[dress]
    found = []
    for seed, messages in enumerate(drawn(kind)):
        rng = random.Random(f"{kind}/{dress}/{seed}")
        if with_weights:
            weigh(rng, messages)
        found.append(Conversation(messages, declared(rng) if with_tools else None))
    return found


def weigh(rng: random.Random, messages: Messages) -> None:
    """Weights for some of the assistant's messages; one of the last turn is left to be learnt."""
    mine = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    spared = rng.choice([at for at in mine if at > last_user(messages)])
    for at in mine:
        if at == spared and rng.random() < 0.5:
            messages[at]["weight"] = 1
        elif at != spared and rng.random() < 0.6:
            messages[at]["weight"] = 0


def declared(rng: random.Random) -> list[dict[str, Any]]:
    """One to three tools, bare and wrapped, with schemas of every kind of value."""
    kinds = ({"type": "string"}, {"type": ["integer", "null"]}, {"enum": ["数", 1]}, {"type": "array", "items": {}})
    functions = []
    for i in range(rng.randint(1, 3)):
        schema = {"type": "object", "properties": {f"a{j}": rng.choice(kinds) for j in range(rng.randint(0, 3))}}
        functions.append({"name": f"tool_{i}", "description": text(rng), "parameters": schema})
    return [{"type": "function", "function": one} if rng.random() < 0.7 else one for one in functions]


def last_user(messages: Messages) -> int:
    return max(at for at, message in enumerate(messages) if message["role"] == "user")


# ------------------------------------------------------------------ what the oracle says of weights, turns and tools


def stretches(mask: list[int]) -> list[tuple[int, int]]:
    """[start, stop) of every run of ones."""
    edges = [at for at, (before, after) in enumerate(pairwise([0, *mask, 0])) if before != after]
    return list(zip(edges[::2], edges[1::2], strict=True))


def learnt(messages: Messages, *, all_turns: bool = False) -> set[int]:
    """Places of the messages to learn: the assistant's, of the last turn unless all are asked for, not of weight 0."""
    after = -1 if all_turns else last_user(messages)
    mine = (at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1))
    return {at for at in mine if at > after}


def narrowed(mask: list[int], messages: Messages, places: set[int]) -> list[int]:
    """The oracle's mask, of the messages at `places` alone."""
    mine = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    kept = [0] * len(mask)
    for at, (start, stop) in zip(mine, stretches(mask), strict=True):
        if at in places:
            kept[start:stop] = [1] * (stop - start)
    return kept


def without_given(tokens: list[int], mask: list[int], tokenizer: Tokenizer) -> list[int]:
    """The mask without the empty think blocks that a /nothink prompt gives."""
    kept = list(mask)
    for start, stop in stretches(mask):
        end = tokens.index(tokenizer.id("</think>"), start, stop)
        kept[start : end + 1] = [0] * (end + 1 - start)
    return kept


def body(tokens: list[int], tokenizer: Tokenizer, tools: Any) -> int:
    """Where the conversation begins, behind the introduction of the tools."""
    roles = {tokenizer.id(name) for name in ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")}
    # [gMASK], <sop>, and with tools the <|system|> of their introduction
    return next(at for at in range(3 if tools else 2, len(tokens)) if tokens[at] in roles)


def same(mine: Encoded, tokens: list[int], mask: list[int], tokenizer: Tokenizer, tools: Any) -> bool:
    """Ours is the oracle's: all of it, but for the words around the declared tools, of which nothing is learnt."""
    ours, theirs = body(mine.tokens, tokenizer, tools), body(tokens, tokenizer, tools)
    if tools:
        shown = [
            tokenizer.decode(part).partition("<tools>\n")[2].partition("\n</tools>")[0]
            for part in (mine.tokens[:ours], tokens[:theirs])
        ]
        assert shown[0] == shown[1] == "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    assert mine.tokens[:2] == tokens[:2]
    assert not any(mine.loss_mask[:ours])
    return mine.tokens[ours:] == tokens[theirs:] and mine.loss_mask[ours:] == mask[theirs:]


# ------------------------------------------------------------------ the laws


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_turn_is_trained_as_trl_trains_it(
    kind: str, dress: str, tiny_tokenizer: Tokenizer, oracle: Any, tmp_path: Path
) -> None:
    """Through the file that SFT reads, and SFT's own encoder."""
    rows = dressed(kind, dress)
    examples = encode(written(tmp_path, [row.row() for row in rows]), ChatTemplate(tiny_tokenizer), "last_turn")
    for row, mine in zip(rows, examples, strict=True):
        tokens, mask = oracle(row.messages, tools=row.tools)
        assert same(mine, tokens, narrowed(mask, row.messages, learnt(row.messages)), tiny_tokenizer, row.tools)


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_all_turns_are_trained_each_as_trl_trains_it_when_it_is_the_last(
    kind: str, dress: str, tiny_tokenizer: Tokenizer, oracle: Any
) -> None:
    """Every turn is learnt once, in an example that begins as the oracle writes the conversation up to its end."""
    template = ChatTemplate(tiny_tokenizer)
    for row in dressed(kind, dress):
        examples = template.encode_examples(row.messages, row.tools, loss_on="all_turns")
        users = [at for at, message in enumerate(row.messages) if message["role"] == "user"]
        total = 0
        for start, stop in pairwise([*users, len(row.messages)]):
            turn = row.messages[:stop]
            if not learnt(turn):
                continue
            tokens, mask = oracle(turn, tools=row.tools)
            mask = narrowed(mask, turn, learnt(turn))
            whole = len(tokens) - body(tokens, tiny_tokenizer, row.tools)
            homes = []
            for one in examples:
                ends = body(one.tokens, tiny_tokenizer, row.tools) + whole
                first = next((at for at, m in enumerate(mask) if m), 0) - len(tokens) + ends
                cut = Encoded(one.tokens[:ends], [0] * first + one.loss_mask[first:ends])
                homes += [one] if same(cut, tokens, mask, tiny_tokenizer, row.tools) else []
            assert len(homes) == 1, f"the turn at messages[{start}]"
            total += sum(mask)
        assert sum(sum(one.loss_mask) for one in examples) == total


@pytest.mark.parametrize("loss_on", ["last_turn", "all_turns"])
@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("kind", ["one turn", "several turns", "tool loop", "two tool loops"])
def test_nothink_turns_are_trained_as_trl_trains_them_but_for_the_given_block(
    kind: str, dress: str, loss_on: Any, tiny_tokenizer: Tokenizer, oracle: Any
) -> None:
    template = ChatTemplate(tiny_tokenizer)
    for row in dressed(kind, dress):
        [mine] = template.encode_examples(row.messages, row.tools, enable_thinking=False, loss_on=loss_on)
        tokens, mask = oracle(row.messages, tools=row.tools, enable_thinking=False)
        mask = narrowed(mask, row.messages, learnt(row.messages, all_turns=loss_on == "all_turns"))
        assert same(mine, tokens, without_given(tokens, mask, tiny_tokenizer), tiny_tokenizer, row.tools)


@pytest.mark.parametrize("tools", [False, True], ids=["no tools", "tools"])
@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "nothink"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_continues_the_inference_prompt_on_every_prefix(
    kind: str, thinking: bool, tools: bool, tiny_tokenizer: Tokenizer
) -> None:
    """Before each assistant message that is learnt stand exactly the tokens that inference would send."""
    template = ChatTemplate(tiny_tokenizer)
    for row in dressed(kind, "tools" if tools else "plain"):
        messages = row.messages
        if not thinking:
            messages = [{k: v for k, v in one.items() if k != "reasoning_content"} for one in messages]
        places = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for at in places:
            mine = template.encode_training(messages[: at + 1], row.tools, enable_thinking=thinking, last_message=True)
            prompt = template.encode_prompt(messages[:at], row.tools, enable_thinking=thinking)
            assert mine.tokens[: len(prompt)] == prompt
            assert mine.loss_mask == [0] * len(prompt) + [1] * (len(mine.tokens) - len(prompt))


# ------------------------------------------------------------------ TRL's prompt-completion rows


def cut(kind: str, seed: int, *, at_user: bool = False) -> tuple[Messages, Messages]:
    """A drawn conversation as prompt and completion: cut before an assistant message of the last turn, or behind a
    user's message anywhere."""
    messages = KINDS[kind](random.Random(f"{kind}/{seed}"))
    rng = random.Random(f"{kind}/{seed}/cut")
    users = [at + 1 for at, message in enumerate(messages) if message["role"] == "user"]
    turn = [at for at in range(last_user(messages) + 1, len(messages)) if messages[at]["role"] == "assistant"]
    at = rng.choice(users if at_user else turn)
    return messages[:at], messages[at:]


def written(folder: Path, rows: list[dict[str, Any]]) -> list[Conversation]:
    """Rows as SFT reads them from a file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = read_conversations([path])
    assert len(found) == len(rows)
    return found


def completion_of(oracle: Any, prompt: Messages, completion: Messages, **options: Any) -> tuple[list[int], list[int]]:
    """Tokens and mask as TRL's SFTTrainer makes them (`completion_only_loss` and `assistant_only_loss`): behind the
    tokens of the prompt with its generation prompt, what the template marks."""
    tokens, mask = oracle(prompt + completion, **options)
    start = len(oracle(prompt, add_generation_prompt=True, **options)[0])
    return tokens, [0] * start + mask[start:]


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "nothink"])
@pytest.mark.parametrize("tools", [False, True], ids=["no tools", "tools"])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_prompt_and_its_completion_the_completion_is_trained_as_trl_trains_it(
    kind: str, tools: bool, thinking: bool, tiny_tokenizer: Tokenizer, oracle: Any, tmp_path: Path
) -> None:
    rows, expected = [], []
    for seed in range(PER_KIND):
        prompt, completion = cut(kind, seed)
        if not thinking:
            for message in prompt + completion:
                message.pop("reasoning_content", None)
        row: dict[str, Any] = {"prompt": prompt, "completion": completion}
        options: dict[str, Any] = {} if thinking else {"enable_thinking": False}
        if options:
            row["chat_template_kwargs"] = options
        if tools:
            row["tools"] = declared(random.Random(f"{kind}/{seed}/tools"))
        rows.append(row)
        expected.append(completion_of(oracle, prompt, completion, tools=row.get("tools"), **options))
    examples = encode(written(tmp_path, rows), ChatTemplate(tiny_tokenizer), "last_turn")
    for row, mine, (tokens, mask) in zip(rows, examples, expected, strict=True):
        if not thinking:
            # of the turns behind the first, which TRL's prompt does not end before
            mask = [m and not g for m, g in zip(mask, given_block(tokens, tiny_tokenizer), strict=True)]
        assert same(mine, tokens, list(map(int, mask)), tiny_tokenizer, row.get("tools"))


def given_block(tokens: list[int], tokenizer: Tokenizer) -> list[bool]:
    """Which tokens are of a think block behind <|assistant|>: in a /nothink conversation they are all given."""
    inside, found = False, []
    for at, token in enumerate(tokens):
        inside = token == tokenizer.id("<|assistant|>") or (inside and tokens[at - 1] != tokenizer.id("</think>"))
        found.append(inside)
    return found


@pytest.mark.parametrize("kind", ["several turns", "two tool loops"])
def test_a_completion_of_several_turns_is_trained_whole_when_all_turns_are(
    kind: str, tiny_tokenizer: Tokenizer, oracle: Any, tmp_path: Path
) -> None:
    rows = []
    for seed in range(PER_KIND):
        prompt, completion = cut(kind, seed, at_user=True)
        rows.append({"prompt": prompt, "completion": completion})
    examples = encode(written(tmp_path, rows), ChatTemplate(tiny_tokenizer), "all_turns")
    for row, mine in zip(rows, examples, strict=True):
        tokens, mask = completion_of(oracle, row["prompt"], row["completion"])
        assert same(mine, tokens, mask, tiny_tokenizer, None)


def test_a_prompt_and_completion_of_text_are_a_question_and_its_answer(
    tiny_tokenizer: Tokenizer, oracle: Any, tmp_path: Path
) -> None:
    """TRL trains bare text; what is trained here is a turn of the template, as its conversational form."""
    rows = [{"prompt": text(rng), "completion": text(rng)} for rng in map(random.Random, range(PER_KIND))]
    examples = encode(written(tmp_path, rows), ChatTemplate(tiny_tokenizer), "last_turn")
    for row, mine in zip(rows, examples, strict=True):
        asked = [{"role": "user", "content": row["prompt"]}]
        answer = [{"role": "assistant", "content": row["completion"]}]
        assert same(mine, *completion_of(oracle, asked, answer), tiny_tokenizer, None)
