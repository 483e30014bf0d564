"""A model's weights as the native step reads them: in place where the format allows, packed otherwise."""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor, nn

from glmctl.kernels.cpu.library import library
from glmctl.model.block import DecoderLayer, Mlp, MoE
from glmctl.model.fp8 import BLOCK, Fp8Scales
from glmctl.model.memory import LINE, bytes_in_lines
from glmctl.model.network import GlmMoe
from glmctl.model.projections import Attention

WeightFormat = Literal["stored", "bf16", "int8", "fp8"]
"""of the matrices: as the model stores them (fp32 or bf16, no copy), or packed to bf16, group-wise int8 or FP8"""

INT8_GROUP = 64
"""columns that share an int8 scale: 1.0625 bytes a weight, as many as llama.cpp's Q8_0"""
FP8_GROUP = 128
"""columns that share an FP8 scale in memory, whatever the layout: 1.03125 bytes a weight"""

_FP32, _BF16, _INT8, _FP8 = 0, 1, 2, 3
_CODES = {torch.float32: _FP32, torch.bfloat16: _BF16}

# in the order of model.h
_SLOTS = (
    "input_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "o", "post_norm", "gate", "up",
    "down", "router", "router_bias", "experts_gate_up", "experts_down", "enorm", "hnorm", "eh",
)  # fmt: skip
_WHOLE = ("embedding", "head", "final_norm", "mtp_norm", "inverse_frequencies", "draft_head")
_UNPACKED = {"embedding", "router"}
"""read by row or decisive for the choice of experts: kept as stored"""
_FP8_UNPACKED = _UNPACKED | {"head", "draft_head", "eh"}
"""FP8 checkpoints keep these too (spec section 1.6)"""


class NativeWeights:
    """Hands a model's parameters to a native model, again after each change. `handle` is what the step is called on."""

    def __init__(self, model: GlmMoe, format: WeightFormat, threads: int) -> None:
        """The model is on the CPU. Stored dtypes other than fp32 and bf16 are read through an fp32 copy."""
        assert model.device.type == "cpu", "the native decoder runs on the CPU"
        self.model, self.format, self.threads = model, format, threads
        self._library = library()
        self._kept: dict[tuple[int, str], tuple[Tensor, ...]] = {}
        self._arena = _Arena()
        self._drafted_S: Tensor | None = None
        c = model.config
        sizes = (
            c.num_hidden_layers, c.first_k_dense_replace, c.hidden_size, c.vocab_size, c.num_attention_heads,
            c.num_key_value_heads, c.head_dim, c.rotary_dim, c.intermediate_size, c.moe_intermediate_size,
            c.moe_intermediate_size * c.n_shared_experts, c.n_routed_experts, c.num_experts_per_tok, c.n_group,
            c.topk_group, int(c.norm_topk_prob), int(model.mtp is not None),
        )  # fmt: skip
        reals = (c.rms_norm_eps, c.routed_scaling_factor)
        self.handle = self._library.glm_create(
            (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_double * len(reals))(*reals), threads
        )
        self.refresh()

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.glm_destroy(self.handle)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the parameters as they are now. In place nothing is copied; packed formats are packed again."""
        model, c = self.model, self.model.config
        self._scales = {id(p): model.fp8_scales[n] for n, p in model.named_parameters() if n in model.fp8_scales}
        self._matrix(-1, "embedding", model.embed_tokens.weight)
        self._matrix(-1, "head", model.head_weight)
        self._vector(-1, "final_norm", model.norm.weight)
        self._theta = c.rope_theta
        exponents = torch.arange(0, c.rotary_dim, 2, dtype=torch.float32) / c.rotary_dim
        self._vector(-1, "inverse_frequencies", 1.0 / (c.rope_theta**exponents))
        for index, layer in enumerate(model.layers):
            assert isinstance(layer, DecoderLayer)
            self._layer(index, layer)
        if model.mtp is not None:
            index = c.num_hidden_layers
            self._layer(index, model.mtp.layer)
            self._vector(index, "enorm", model.mtp.enorm.weight)
            self._vector(index, "hnorm", model.mtp.hnorm.weight)
            self._matrix(index, "eh", model.mtp.eh_proj.weight)
            self._vector(-1, "mtp_norm", model.mtp.norm.weight)
            self._draft_head()

    def limit_drafts(self, tokens_S: Tensor | None) -> None:
        """The MTP layer's logits are of these tokens' rows of the head from now on; None: of all."""
        self._drafted_S = tokens_S
        self._draft_head()

    @property
    def drafted(self) -> int:
        """How many logits a draft has."""
        return self.model.config.vocab_size if self._drafted_S is None else len(self._drafted_S)

    def _draft_head(self) -> None:
        """A copy of the rows that few drafts read; without, the step takes the head."""
        # room of another size would be packed into, were it kept
        self._kept.pop((-1, "draft_head"), None)
        if self._drafted_S is None:
            self._library.glm_set(self.handle, -1, _WHOLE.index("draft_head"), None, None, 0, 0, _FP32)
        else:
            self._matrix(-1, "draft_head", self.model.head_weight.detach()[self._drafted_S])

    def follow_rope(self) -> None:
        """Take RoPE's base again when it was changed (`GlmMoe.set_rope_theta`)."""
        if self._theta != self.model.config.rope_theta:
            self.refresh()

    @property
    def nbytes(self) -> int:
        """Memory that packing took beyond the model's own."""
        own = {parameter.data_ptr() for parameter in self.model.parameters()}
        return sum(t.nbytes for kept in self._kept.values() for t in kept if t.data_ptr() not in own)

    def _layer(self, index: int, layer: DecoderLayer) -> None:
        attention = layer.self_attn
        assert isinstance(attention, Attention), "the compiled step computes grouped-query attention"
        self._vector(index, "input_norm", layer.input_layernorm.weight)
        for name, linear in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj)):
            self._matrix(index, name, linear.weight)
            if linear.bias is not None:
                self._vector(index, f"{name}_bias", linear.bias)
        for name, norm in (("q_norm", attention.q_norm), ("k_norm", attention.k_norm)):
            if norm is not None:
                self._vector(index, name, norm.weight)
        self._matrix(index, "o", attention.o_proj.weight)
        self._vector(index, "post_norm", layer.post_attention_layernorm.weight)
        if isinstance(layer.mlp, MoE):
            self._matrix(index, "router", layer.mlp.gate.weight)
            self._vector(index, "router_bias", layer.mlp.gate.e_score_correction_bias)
            self._matrix(
                index, "experts_gate_up", layer.mlp.experts.gate_up_proj, self.model.config.moe_intermediate_size
            )
            self._matrix(index, "experts_down", layer.mlp.experts.down_proj, self.model.config.hidden_size)
            if layer.mlp.shared_experts is not None:
                self._mlp(index, layer.mlp.shared_experts)
        else:
            self._mlp(index, layer.mlp)

    def _mlp(self, index: int, mlp: Mlp) -> None:
        linears: tuple[tuple[str, nn.Linear], ...] = (
            ("gate", mlp.gate_proj),
            ("up", mlp.up_proj),
            ("down", mlp.down_proj),
        )
        for name, linear in linears:
            self._matrix(index, name, linear.weight)

    def _vector(self, layer: int, name: str, vector: Tensor) -> None:
        """Vectors are fp32: the parameter's memory, or a copy."""
        kept = vector.detach().to(torch.float32).contiguous()
        self._set(layer, name, (kept,), 1, kept.numel(), _FP32)

    def _matrix(self, layer: int, name: str, weight: Tensor, matrix_rows: int | None = None) -> None:
        """weight [..., rows, cols]; leading dimensions are more rows, `matrix_rows` of them a matrix (default: all)."""
        source = weight.detach().contiguous()
        if source.dtype not in _CODES:
            source = source.float()
        stored = _CODES[source.dtype]
        wanted = {"stored": stored, "bf16": _BF16, "int8": _INT8, "fp8": _FP8}[self.format]
        rows, cols = source.numel() // source.shape[-1], source.shape[-1]
        if wanted == stored or name in (_FP8_UNPACKED if wanted == _FP8 else _UNPACKED):
            self._set(layer, name, (source,), rows, cols, stored)
            return
        packed = self._kept.get((layer, name)) or self._arena.take(rows, cols, wanted)
        if wanted == _FP8:
            self._pack_fp8(source, self._scales.get(id(weight)), matrix_rows or rows, packed)
        else:
            scale = packed[1].data_ptr() if len(packed) > 1 else None
            self._library.glm_pack(
                source.data_ptr(), stored, rows, cols, wanted, packed[0].data_ptr(), scale, self.threads
            )
        self._set(layer, name, packed, rows, cols, wanted)

    def _pack_fp8(self, source: Tensor, scales: Fp8Scales | None, matrix_rows: int, packed: tuple[Tensor, ...]) -> None:
        """Blocks and scales are those the weights came with where there are any, else those of `model.fp8.BLOCK`."""
        rows, cols = source.numel() // source.shape[-1], source.shape[-1]
        height, width, given = BLOCK, BLOCK, None
        if scales is not None and (scales.width % FP8_GROUP == 0 or scales.width >= cols):
            height, width, given = scales.height, scales.width, scales.scale_MRC.contiguous()
            assert given.shape[0] * matrix_rows == rows
        self._library.glm_pack_fp8(
            source.data_ptr(), _CODES[source.dtype], rows, cols, matrix_rows, height, width,
            None if given is None else given.data_ptr(), packed[0].data_ptr(), packed[1].data_ptr(), self.threads,
        )  # fmt: skip

    def _set(self, layer: int, name: str, kept: tuple[Tensor, ...], rows: int, cols: int, format: int) -> None:
        """Point a slot at memory, which stays alive as long as it is pointed at."""
        self._kept[layer, name] = kept
        slot = (_WHOLE if layer < 0 else _SLOTS).index(name)
        scale = kept[1].data_ptr() if len(kept) > 1 else None
        self._library.glm_set(self.handle, layer, slot, kept[0].data_ptr(), scale, rows, cols, format)


class _Arena:
    """Room for packed matrices, many in one piece: huge pages (`model.memory`) are larger than most of them."""

    PIECE = 32 << 20

    def __init__(self) -> None:
        self._piece = bytes_in_lines(0)

    def take(self, rows: int, cols: int, format: int) -> tuple[Tensor, ...]:
        """Weights and scales of a matrix in a packed format, contents undefined."""
        if format == _BF16:
            return (self._tensor(rows, cols, torch.bfloat16),)
        dtype, group = (torch.float8_e4m3fn, FP8_GROUP) if format == _FP8 else (torch.int8, INT8_GROUP)
        return self._tensor(rows, cols, dtype), self._tensor(rows, -(-cols // group), torch.float32)

    def _tensor(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        size = rows * cols * dtype.itemsize
        if size > len(self._piece):
            self._piece = bytes_in_lines(max(size, self.PIECE))
        taken, self._piece = self._piece[:size], self._piece[-(-size // LINE) * LINE :]
        return taken.view(dtype).view(rows, cols)
