"""Laws of the reference runner: a ragged step over paged blocks computes what the model computes on whole rows."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from glmctl.engine.cache import PagedCache
from glmctl.engine.decode_graphs import DecodeGraphs, feed_of
from glmctl.engine.runner import StepBatch
from glmctl.engine.torch_runner import TorchRunner
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe

Piece = tuple[int, int, int]
"""sequence, first place, end"""

BLOCKS, PLACES = 90, 64


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> GlmMoe:
    return GlmMoe(tiny_config, seed=5).requires_grad_(False)


def batch_of(pieces: list[Piece], tokens: list[list[int]], tables: list[list[int]]) -> StepBatch:
    """All rows of the pieces, in their order, with logits of every row."""
    token = [token for s, start, end in pieces for token in tokens[s][start:end]]
    position = [place for _, start, end in pieces for place in range(start, end)]
    sequence = [index for index, (_, start, end) in enumerate(pieces) for _ in range(start, end)]
    table = np.zeros((len(pieces), max(len(tables[s]) for s, _, _ in pieces)), np.int32)
    for index, (s, _, _) in enumerate(pieces):
        table[index, : len(tables[s])] = tables[s]
    return StepBatch(
        torch.tensor(token),
        torch.tensor(position),
        torch.tensor(sequence),
        torch.from_numpy(table),
        torch.arange(len(token)),
    )


def whole(model: GlmMoe, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0]


def scattered_tables(rng: random.Random, count: int, block_size: int) -> list[list[int]]:
    ids = list(range(1, BLOCKS))
    rng.shuffle(ids)
    each = -(-PLACES // block_size)
    return [ids[index * each : (index + 1) * each] for index in range(count)]


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_any_shape_give_the_hidden_states_of_whole_rows(model: GlmMoe, seed: int, block_size: int) -> None:
    rng = random.Random(seed)
    count = 9
    tokens = [[rng.randrange(512) for _ in range(rng.randint(5, PLACES))] for _ in range(count)]
    tables = scattered_tables(rng, count, block_size)
    cache = PagedCache(model.config, BLOCKS, layers=model.config.num_hidden_layers, block_size=block_size)
    runner = TorchRunner(model, cache)
    filled = [0] * count
    got: list[list[torch.Tensor]] = [[] for _ in range(count)]
    while any(done < len(each) for done, each in zip(filled, tokens, strict=True)):
        pieces = []
        for s in rng.sample(range(count), rng.randint(1, count)):
            end = min(len(tokens[s]), filled[s] + rng.choice([1, 1, 2, 3, 4, 7, 20]))
            if end > filled[s]:
                pieces.append((s, filled[s], end))
                filled[s] = end
        if not pieces:
            continue
        batch = batch_of(pieces, tokens, tables)
        out = runner.step(batch)
        assert torch.equal(out.logits_RV, model.logits(out.hidden_ND))
        for index, (s, _, _) in enumerate(pieces):
            got[s].append(out.hidden_ND[batch.sequence_N == index])
    for each, parts in zip(tokens, got, strict=True):
        # fp32 rounding of another order of summation, over a few layers
        assert torch.allclose(torch.cat(parts), whole(model, each), atol=2e-5)


def test_what_a_graph_records_is_the_plain_step_whatever_it_is_padded_with(family_config: ModelConfig) -> None:
    """The computation of `engine.decode_graphs`, which on a CPU nothing records."""
    model = GlmMoe(family_config, seed=5).requires_grad_(False)
    rng = random.Random(0)
    count = 5
    tokens = [[rng.randrange(model.config.vocab_size) for _ in range(length)] for length in (2, 17, 33, 40, 48)]
    tables = [[1 + 3 * s + block for block in rng.sample(range(3), 3)] for s in range(count)]
    cache = PagedCache(model.config, 16, layers=model.config.num_hidden_layers)
    runner, graphs = TorchRunner(model, cache), DecodeGraphs(model, cache)
    runner.step(batch_of([(s, 0, len(each) - 1) for s, each in enumerate(tokens)], tokens, tables))
    batch = batch_of([(s, len(each) - 1, len(each)) for s, each in enumerate(tokens)], tokens, tables)
    for padded in ((count, 3), (8, 3)):
        for stored in (*cache.keys, *cache.values):
            stored[0] = 1e4  # nobody's block
        # twice: storing a second time changes nothing
        for _ in range(2):
            out = graphs.forward(feed_of(batch, *padded))
            assert torch.allclose(out.hidden_ND[:count], runner.step(batch).hidden_ND, atol=2e-5)
            assert torch.equal(out.logits_RV, model.logits(out.hidden_ND))
    last = torch.stack([whole(model, each)[-1] for each in tokens])
    assert torch.allclose(out.hidden_ND[:count], last, atol=5e-5)


def test_only_the_rows_asked_for_get_logits(model: GlmMoe) -> None:
    tokens, tables = [[1, 2, 3], [4, 5]], [[3], [2]]
    cache = PagedCache(model.config, 4, layers=model.config.num_hidden_layers)
    batch = replace(batch_of([(0, 0, 3), (1, 0, 2)], tokens, tables), logit_rows_R=torch.tensor([2, 4]))
    out = TorchRunner(model, cache).step(batch)
    assert out.logits_RV.dtype == torch.float32
    assert torch.equal(out.logits_RV, model.logits(out.hidden_ND[[2, 4]]))


def test_a_prefix_is_shared_within_the_step_that_computes_it(model: GlmMoe) -> None:
    prefix = list(range(40, 72))
    tokens = [[*prefix, 7, 8], [*prefix, 9], [*prefix, 10, 11, 12]]
    tables = [[5, 3, 1], [5, 3, 2], [5, 3, 4]]
    cache = PagedCache(model.config, 8, layers=model.config.num_hidden_layers)
    pieces = [(0, 0, 34), (1, 32, 33), (2, 32, 35)]
    out = TorchRunner(model, cache).step(batch_of(pieces, tokens, tables))
    for rows, each in zip((slice(0, 34), slice(34, 35), slice(35, 38)), tokens, strict=True):
        hidden = out.hidden_ND[rows]
        assert torch.allclose(hidden, whole(model, each)[-len(hidden) :], atol=2e-5)


@pytest.mark.parametrize("cut", [1, 2, 15, 16, 17, 29])
def test_the_mtp_layer_at_shifted_places_is_the_mtp_layer(model: GlmMoe, cut: int) -> None:
    assert model.mtp is not None
    rng = random.Random(cut)
    tokens = [[rng.randrange(512) for _ in range(30)] for _ in range(2)]
    tables = [[3, 1], [2, 4]]
    cache = PagedCache(model.config, 5, layers=model.config.num_hidden_layers + 1)
    # what place 0 holds must not matter
    cache.keys[-1].fill_(1e4)
    cache.values[-1].fill_(1e4)
    runner = TorchRunner(model, cache)
    hidden = [whole(model, each) for each in tokens]
    parts: list[list[torch.Tensor]] = [[], []]
    for start, end in ((1, cut), (cut, 30)):
        if start == end:
            continue
        pieces = [(0, start, end), (1, start, end)]
        before = torch.cat([hidden[s][start - 1 : end - 1] for s in (0, 1)])
        out = runner.draft(replace(batch_of(pieces, tokens, tables), hidden_ND=before))
        for s in (0, 1):
            parts[s].append(out.hidden_ND[s * (end - start) : (s + 1) * (end - start)])
    for s in (0, 1):
        wanted = model.mtp(hidden[s][None, :-1], torch.tensor([tokens[s][1:]]))[0]
        # RoPE at places one higher: rounding of other angles
        assert torch.allclose(torch.cat(parts[s]), wanted, atol=5e-5)


def test_memory_is_what_the_blocks_say(tiny_config: ModelConfig) -> None:
    cache = PagedCache(tiny_config, 10, layers=4, block_size=32)
    assert cache.nbytes == 10 * PagedCache.bytes_per_block(tiny_config, 4, 32, torch.float32)
    assert cache.keys[0].shape == (10, 2, 32, 16)
