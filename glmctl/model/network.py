"""A GLM-4.5-style mixture-of-experts decoder with its multi-token-prediction layer (spec sections 1.2 to 1.5)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glmctl.kernels.rope import rotation, yarn_frequencies
from glmctl.model.attention import Sight, choose_sight
from glmctl.model.block import DecoderLayer, MoE
from glmctl.model.cache import KVCache
from glmctl.model.config import ModelConfig
from glmctl.model.fp8 import Fp8Scales
from glmctl.model.memory import empty
from glmctl.model.projections import Pass, RmsNorm
from glmctl.model.router import Router, RouterStats

__all__ = ["GlmMoe", "MtpLayer", "RouterStats"]


class GlmMoe(nn.Module):
    """The network: tokens [B, T] -> hidden states [B, T, D] after the final norm.

    Losses take the hidden states and `head_weight` (`kernels.linear_cross_entropy`), so that logits need never
    exist whole; `logits` is there for everything else. `model.mtp(...)` is the multi-token-prediction layer, None
    when the config has none.

    seed: draw weights from normal(0, initializer_range), norms 1, biases 0, the same on every device. Without a
    seed, matrices are zero and are meant to be loaded. device "meta" allocates nothing.
    """

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            # the plain constructor draws normal_ on meta, which imports torch._dynamo: seconds for every command
            table_VD = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
            self.embed_tokens = nn.Embedding.from_pretrained(table_VD, freeze=False)  # type: ignore[no-untyped-call]
            self.layers = nn.ModuleList(
                DecoderLayer(config, layer, dtype=dtype) for layer in range(config.num_hidden_layers)
            )
            self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
            self.lm_head = None
            if not config.tie_word_embeddings:
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
            self.mtp = MtpLayer(self, dtype=dtype) if config.num_nextn_predict_layers else None
        self.recompute = False
        """keep only each layer's input for the backward: less memory for a third more time"""
        self.fp8_scales: dict[str, Fp8Scales] = {}
        """by parameter, of weights that were loaded from FP8"""
        self.stores_mtp_copies = True
        """whether the folder format repeats embedding and head inside the MTP layer: GLM-4.5 does, 4.6 does not"""
        target = torch.device(device) if device is not None else torch.get_default_device()
        if target.type != "meta":
            self.to_empty(device=target)
            self._initialise(seed)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Self:
        """Storage on `device` for every tensor, contents undefined.

        torch's own goes through empty_like on meta, which imports sympy: seconds for every command.
        """
        result: Self = self._apply(lambda x: empty(x.shape, x.dtype, device), recurse)  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def _initialise(self, seed: int | None) -> None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.dim() == 1 or generator is None:
                parameter.zero_()
            else:
                draw = torch.empty(parameter.shape, dtype=torch.float32)
                draw.normal_(0.0, self.config.initializer_range, generator=generator)
                parameter.copy_(draw)
        for router in self.routers():
            router.e_score_correction_bias.zero_()

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D]: `lm_head.weight`, or the embedding when tied."""
        weight: Tensor = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.embed_tokens.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        dtype: torch.dtype = self.embed_tokens.weight.dtype
        return dtype

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        rows: slice | None = None,
        sight: Sight | None = None,
        stats: RouterStats | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm.

        positions (default 0..T-1 in every row) set RoPE and, with a cache, the place written. documents: ids of
        packed documents, -1 for padding; a document is a run of one id in a row and sees only itself; None means
        each row is one document. With a cache, the new keys and values are stored in its `rows` (default: the first B)
        and every stored place up to the query's position is seen; rows of unequal length are padded on the right.
        sight: what a position sees, decided by the caller (the engine's paged cache); then no documents and no cache.
        """
        positions_BT = self._positions(tokens_BT, positions_BT)
        sight = sight or choose_sight(documents_BT, cache, rows, positions_BT)
        shared = self._share(positions_BT, sight, documents_BT, stats)
        x_BTD = self.embed_tokens(tokens_BT)
        for layer in self.layers:
            x_BTD = self._layer(layer, x_BTD, shared)
        result: Tensor = self.norm(x_BTD)
        return result

    def _layer(self, layer: nn.Module, x_BTD: Tensor, shared: Pass) -> Tensor:
        """One layer; with `recompute`, only its input is kept and the backward runs it again, to the same bits.

        What the second run tells the router statistics goes to a stand-in: loads are counted once, and the balance
        loss of the first run is the one that is differentiated.
        """
        if not (self.recompute and torch.is_grad_enabled()):
            result: Tensor = layer(x_BTD, shared)
            return result
        from torch.utils.checkpoint import checkpoint

        runs = iter([shared])

        def run(x: Tensor) -> Tensor:
            again = shared if shared.stats is None else shared._replace(stats=shared.stats.stand_in())
            out: Tensor = layer(x, next(runs, again))
            return out

        # nothing in a layer is random, so there is no state to restore
        kept: Tensor = checkpoint(run, x_BTD, use_reentrant=False, preserve_rng_state=False)
        return kept

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D], of the network or of the MTP layer -> logits [..., V] in fp32."""
        return F.linear(hidden, self.head_weight).float()

    def routers(self) -> list[Router]:
        """Routers of the decoder's MoE layers in order, then the MTP layer's: the order of RouterStats' rows."""
        layers: list[Any] = [*self.layers]
        if self.mtp is not None:
            layers.append(self.mtp.layer)
        return [layer.mlp.gate for layer in layers if isinstance(layer.mlp, MoE)]

    def set_rope_theta(self, theta: float) -> None:
        """Change RoPE's base from the next forward on; `config` is replaced, so exports carry it too."""
        self.config = self.config.model_copy(update={"rope_theta": float(theta)})

    @staticmethod
    def _positions(tokens_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
        if positions_BT is not None:
            return positions_BT
        B, T = tokens_BT.shape
        return torch.arange(T, device=tokens_BT.device).expand(B, T)

    def _share(
        self, positions_BT: Tensor, sight: Sight, documents_BT: Tensor | None, stats: RouterStats | None
    ) -> Pass:
        c, yarn = self.config, self.config.rope_scaling
        dtype = torch.promote_types(self.dtype, torch.float32)
        frequencies, scale = None, 1.0
        if yarn is not None:
            frequencies = yarn_frequencies(
                c.rotary_dim,
                c.rope_theta,
                factor=yarn.factor,
                original_length=yarn.original_max_position_embeddings,
                beta_fast=yarn.beta_fast,
                beta_slow=yarn.beta_slow,
            )
            scale = yarn.table_scale
        turn = rotation(
            positions_BT, c.rotary_dim, c.rope_head_dim, c.rope_theta, dtype, frequencies=frequencies, scale=scale
        )
        if stats is not None:
            stats.valid_BT = None if documents_BT is None else documents_BT >= 0
        return Pass(turn, sight, stats)


class MtpLayer(nn.Module):
    """Multi-token prediction (DeepSeek-V3 section 2.2, in the order of the released GLM-4.5 weights).

    h' = eh_proj([enorm(Emb(t_{i+1})), hnorm(h_i)]) -> a MoE decoder layer -> norm. The result predicts t_{i+2}
    through the model's own head. Embedding and head belong to the model and are not parameters of this layer.
    """

    def __init__(self, model: GlmMoe, *, dtype: torch.dtype) -> None:
        super().__init__()
        config = model.config
        # in a tuple, so that it is not registered as a submodule of its own submodule
        self._owner = (model,)
        self.enorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.hnorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False, dtype=dtype)
        self.layer = DecoderLayer(config, config.num_hidden_layers, dtype=dtype)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def forward(
        self,
        hidden_BTD: Tensor,
        next_tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: KVCache | None = None,
        rows: slice | None = None,
        sight: Sight | None = None,
        stats: RouterStats | None = None,
    ) -> Tensor:
        """hidden [B, T, D] (the network's result at positions i) and tokens i+1 -> [B, T, D] predicting i+2.

        positions, documents, cache, rows and sight are those of position i, as in `GlmMoe.forward`; the cache entry
        lies in layer `num_hidden_layers`.
        """
        model = self._owner[0]
        positions_BT = model._positions(next_tokens_BT, positions_BT)
        sight = sight or choose_sight(documents_BT, cache, rows, positions_BT)
        shared = model._share(positions_BT, sight, documents_BT, stats)
        embedded_BTD = model.embed_tokens(next_tokens_BT)
        x_BTD = self.eh_proj(torch.cat([self.enorm(embedded_BTD), self.hnorm(hidden_BTD)], dim=-1))
        result: Tensor = self.norm(model._layer(self.layer, x_BTD, shared))
        return result
