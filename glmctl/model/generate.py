"""One sequence at a time, the plain way: for samples, checks and tests. Serving and rollouts use the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from glmctl.model.cache import KVCache
from glmctl.model.network import GlmMoe


@torch.inference_mode()
def generate(
    model: GlmMoe,
    prompt_tokens: Sequence[int],
    max_tokens: int,
    *,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> list[int]:
    """Continue the prompt by at most `max_tokens` tokens; returns the new tokens, a stop token included.

    temperature 0 is greedy; above it, tokens are drawn with `generator`, which must then be given.
    """
    assert len(prompt_tokens) > 0
    assert temperature == 0 or generator is not None, "sampling needs a generator"
    device, made = model.device, list[int]()
    cache = None
    if use_cache:
        length = len(prompt_tokens) + max_tokens
        cache = KVCache(
            model.config, 1, length, device=device, dtype=model.dtype, layers=model.config.num_hidden_layers
        )
    pending, position = list(prompt_tokens), 0
    while len(made) < max_tokens:
        tokens_BT = torch.tensor([pending], device=device)
        positions_BT = torch.arange(position, position + len(pending), device=device)[None]
        hidden_BTD = model(tokens_BT, positions_BT=positions_BT, cache=cache)
        logits_V = model.logits(hidden_BTD[0, -1])
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            weights_V = (logits_V / temperature).softmax(-1)
            token = int(torch.multinomial(weights_V.cpu(), 1, generator=generator))
        made.append(token)
        if token in stop_ids:
            break
        if cache is not None:
            position += len(pending)
            pending = [token]
        else:
            pending.append(token)
    return made
