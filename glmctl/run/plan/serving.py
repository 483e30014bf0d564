"""What serving a model takes: room for keys and values, how many requests at once, tokens a second by roofline.

Two arrangements of several devices: `tensor` divides every matrix and the kv heads (two sums over the devices in each
layer); `data-expert` gives each device its own requests with attention whole, and divides the experts (tokens travel
to their experts and back). This version's engine computes on one device; both are what other servers run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from glmctl.model.config import ModelConfig
from glmctl.model.cost import forward_flops, kv_bytes_per_token
from glmctl.run.plan import activations
from glmctl.run.plan.devices import DeviceKind
from glmctl.run.plan.shape import layer_part

PREFILL_TOKENS = 4096
"""prompt tokens in one step (`engine.Engine`)"""
LATENCY = 10e-6
"""seconds that a small exchange between accelerators takes at the least; an assumption"""

Arrangement = Literal["one device", "tensor", "data-expert"]


@dataclass(frozen=True)
class Serving:
    """A model, its formats, and the devices that it is spread over."""

    config: ModelConfig
    device: DeviceKind
    devices: int
    arrangement: Arrangement
    context: int
    """tokens of every request, prompt and answer: the fullest case"""
    weight_bytes: float
    """of a number of the weights"""
    kv_bytes: float
    """of a number in the cache"""
    mtp: bool
    efficiency: float

    @property
    def ways(self) -> int:
        """Devices that attention's matrices are divided over."""
        return self.devices if self.arrangement == "tensor" else 1

    @property
    def kv_ways(self) -> int:
        """Devices that a request's keys and values are divided over: MLA's single compressed head is on each."""
        return min(self.ways, self.config.cache_spec.heads)

    def weights(self) -> float:
        """Bytes on each device."""
        rest, experts = self._elements()
        return (rest / self.ways + experts / self.devices) * self.weight_bytes

    def request_bytes(self) -> float:
        """Keys and values of one request of full context, on a device that holds it."""
        return kv_bytes_per_token(self.config, self.kv_bytes, mtp=self.mtp) * self.context / self.kv_ways

    def buffers(self) -> float:
        """One layer's intermediates of a prefill step, and logits."""
        c = self.config
        layer = activations.layer_kept(c, c.num_moe_layers > 0, 2, balance=False) / self.ways
        return PREFILL_TOKENS * (layer + 2 * c.hidden_size * 2) + 256 * c.vocab_size * 4

    def most_requests(self, room: float) -> int:
        """Requests of full context that fit at once, over all devices."""
        each = (room - self.weights() - self.buffers()) / self.request_bytes()
        return max(0, int(each)) * (self.devices if self.arrangement == "data-expert" else 1)

    def decode_seconds(self, requests: int) -> float:
        """One step of `requests` requests at the end of their context: each yields a token."""
        c, mine = self.config, requests
        if self.arrangement == "data-expert":
            mine = -(-requests // self.devices)
        rest, _ = self._elements()
        read = (rest - c.vocab_size * c.hidden_size) / self.ways * self.weight_bytes
        read += self._experts_met(requests) / self.devices * self.weight_bytes
        read += mine * self.request_bytes()
        flops = mine * forward_flops(c, self.context, absorbed=True).total / self.ways
        speed = self.device.flops("bf16") * self.efficiency
        return max(read / self.device.bandwidth, flops / speed) + self._exchange(mine)

    def prefill_rate(self) -> float:
        """Prompt tokens a second over all devices, at half the context on average."""
        flops = forward_flops(self.config, self.context / 2).total
        compute = self.devices * self.device.flops("bf16") * self.efficiency / flops
        share = self.devices if self.arrangement == "data-expert" else 1
        return 1 / (1 / compute + self._exchange(PREFILL_TOKENS) / PREFILL_TOKENS / share)

    def _elements(self) -> tuple[int, int]:
        """Elements of all but the experts, and of the experts."""
        c = self.config
        counts = c.parameter_counts()
        moe = c.num_moe_layers + (c.num_nextn_predict_layers if self.mtp else 0)
        total = counts.main + counts.vocabulary + (counts.mtp if self.mtp else 0)
        experts = moe * layer_part(c, True).experts
        return total - experts, experts

    def _experts_met(self, tokens: int) -> float:
        """Elements of the distinct experts that `tokens` tokens meet when all are equally likely."""
        c = self.config
        share = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** tokens
        return c.num_moe_layers * layer_part(c, True).experts * share

    def _exchange(self, tokens: int) -> float:
        """Seconds between the devices for one pass of `tokens` tokens on each."""
        c, n = self.config, self.devices
        if n == 1:
            return 0.0
        speed = self.device.link if n <= self.device.per_node else self.device.network
        if self.arrangement == "tensor":
            exchanges, numbers = 2 * c.num_hidden_layers, tokens * c.hidden_size * 2 * (n - 1) / n
        else:
            exchanges = 2 * c.num_moe_layers
            numbers = tokens * c.num_experts_per_tok * c.hidden_size * (n - 1) / n
        return exchanges * (LATENCY + 2 * numbers / speed)


def arrangements(config: ModelConfig, devices: int) -> list[Arrangement]:
    """What the model allows: heads divide evenly, and every device has as many experts."""
    if devices == 1:
        return ["one device"]
    found: list[Arrangement] = []
    if config.num_attention_heads % devices == 0:
        found.append("tensor")
    if config.n_routed_experts % devices == 0:
        found.append("data-expert")
    return found


def describe(serving: Serving, room: float, asked: int) -> dict[str, Any]:
    """All figures of one arrangement. `asked`: requests that the recipe serves at once; also powers of two to the
    most that fit."""
    most = serving.most_requests(room)
    counts = sorted({n for n in (1, 8, 32, 128, 512, 2048, asked, most) if 0 < n <= most})
    return {
        "arrangement": serving.arrangement,
        "fits": most >= 1,
        "bytes": {
            "weights": serving.weights(),
            "kv_a_request": serving.request_bytes(),
            "buffers": serving.buffers(),
            "room": room,
        },
        "most_requests": most,
        "prefill_tokens_per_second": serving.prefill_rate(),
        "decode": [_decode(serving, n) for n in counts],
    }


def _decode(serving: Serving, requests: int) -> dict[str, float]:
    seconds = serving.decode_seconds(requests)
    return {"requests": requests, "step_seconds": seconds, "tokens_per_second": requests / seconds}
