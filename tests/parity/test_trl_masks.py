"""What is trained on, against TRL's own GLM-4.5 training template: 50 drawn conversations of every kind.

The template (shipped inside TRL, with `{% generation %}` around what the model writes, closing role tokens included)
is rendered and tokenised by transformers, so nothing of ours takes part in the oracle. It differs from ours on purpose
in one place: it trains the empty think block of a /nothink turn, which inference gives.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import Tokenizer

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

    def rendered(messages: Messages, **switch: bool) -> tuple[list, list]:
        found = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, **switch
        )
        return found["input_ids"], found["assistant_masks"]

    return rendered


def drawn(kind: str) -> list[Messages]:
    found = [KINDS[kind](random.Random(f"{kind}/{seed}")) for seed in range(PER_KIND)]
    assert len({str(one) for one in found}) == PER_KIND, "no two are the same"
    return found


def last_turn(messages: Messages) -> int:
    """Place of the first message behind the last user message."""
    return 1 + max(at for at, message in enumerate(messages) if message["role"] == "user")


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_turn_is_trained_as_trl_trains_it(kind: str, tiny_tokenizer: Tokenizer, oracle: Any) -> None:
    template = ChatTemplate(tiny_tokenizer)
    for messages in drawn(kind):
        tokens, mask = oracle(messages)
        mine = template.encode_training(messages)
        begins = len(template.encode_prompt(messages[: last_turn(messages)]))
        assert mine.tokens == tokens
        assert mine.loss_mask == [m if at >= begins else 0 for at, m in enumerate(mask)]


@pytest.mark.parametrize("kind", ["one turn", "several turns", "tool loop", "two tool loops"])
def test_all_turns_without_reasoning_are_trained_as_trl_trains_them(
    kind: str, tiny_tokenizer: Tokenizer, oracle: Any
) -> None:
    template = ChatTemplate(tiny_tokenizer)
    for messages in drawn(kind):
        [mine] = template.encode_examples(messages, loss_on="all_turns")
        assert (mine.tokens, mine.loss_mask) == oracle(messages)


@pytest.mark.parametrize("kind", ["one turn", "several turns", "tool loop", "two tool loops"])
def test_nothink_turns_are_trained_as_trl_trains_them_but_for_the_given_block(
    kind: str, tiny_tokenizer: Tokenizer, oracle: Any
) -> None:
    template = ChatTemplate(tiny_tokenizer)
    assistant, closes = (tiny_tokenizer.id(name) for name in ("<|assistant|>", "</think>"))
    for messages in drawn(kind):
        tokens, mask = oracle(messages, enable_thinking=False)
        mine = template.encode_training(messages, enable_thinking=False)
        begins = len(template.encode_prompt(messages[: last_turn(messages)], enable_thinking=False))
        given = False
        for at, token in enumerate(tokens):
            given = token == assistant or (given and tokens[at - 1] != closes)
            mask[at] = mask[at] if at >= begins and not given else 0
        assert (mine.tokens, mine.loss_mask) == (tokens, mask)


@pytest.mark.parametrize("thinking", [True, False], ids=["thinking", "nothink"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_continues_the_inference_prompt_on_every_prefix(
    kind: str, thinking: bool, tiny_tokenizer: Tokenizer
) -> None:
    """Before each assistant message that is learnt stand exactly the tokens that inference would send."""
    template = ChatTemplate(tiny_tokenizer)
    for messages in drawn(kind):
        if not thinking:
            messages = [{k: v for k, v in one.items() if k != "reasoning_content"} for one in messages]
        places = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for at in places:
            mine = template.encode_training(messages[: at + 1], enable_thinking=thinking, last_message=True)
            prompt = template.encode_prompt(messages[:at], enable_thinking=thinking)
            assert mine.tokens[: len(prompt)] == prompt
            assert mine.loss_mask == [0] * len(prompt) + [1] * (len(mine.tokens) - len(prompt))
