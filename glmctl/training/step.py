"""One optimizer step, shared by every stage that trains.

`Stepper.lm_step` is the whole of it for language modelling (pretrain, sft, distill). RL computes its own loss and
uses the two halves: `accumulate(loss)` for each micro-batch, then `update(lr)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from glmctl.data.batches import Batch
from glmctl.model.network import GlmMoe
from glmctl.parallel.accelerate import sum_over_ranks
from glmctl.training.balance import update_router_bias
from glmctl.training.guard import StepGuard
from glmctl.training.loss import Losses, LossModule
from glmctl.training.optim import MixedOptimizer


@dataclass(frozen=True)
class StepMetrics:
    """What one step saw, over all micro-batches and ranks; losses are means in nats per target, before the update."""

    loss: float
    mtp_loss: float
    """0 when the MTP layer was not trained"""
    balance_loss: float
    """sum over layers of the sequence balance loss, without its weight; one per layer is perfectly even"""
    grad_norm: float
    """global L2 norm before clipping"""
    targets: int
    tokens: int
    """without padding"""
    counts_LE: Tensor
    """tokens sent to each expert, int64 on the CPU"""
    skipped: bool
    """the guard left this step out and the weights are as they were"""


class Stepper:
    """Forward, backward, clip and update of one model, the same for one process and for many.

    A step that the guard refuses (its loss or gradient is not finite on some rank, or a spike) changes nothing: not the
    weights, not the optimizer's state, not the router biases. The third in a row raises DivergedError.
    """

    def __init__(
        self,
        model: GlmMoe,
        optimizer: MixedOptimizer,
        accelerator: Accelerator,
        *,
        grad_clip: float,
        guard: StepGuard | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.accelerator = accelerator
        self.grad_clip = grad_clip
        self.guard = guard or StepGuard()
        self._world = accelerator.num_processes
        self._losses: nn.Module | None = None
        self._reduced = True

    # ------------------------------------------------------------------ language modelling

    def lm_step(
        self,
        batches: Sequence[Batch],
        *,
        lr: float,
        mtp_weight: float = 0.0,
        sequence_loss_weight: float = 0.0,
        bias_update_rate: float = 0.0,
        center: bool = False,
        z_weight: float = 0.0,
        idle: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> StepMetrics:
        """One step over this rank's micro-batches (at least one).

        The loss is main / M + mtp_weight * mtp / M2 + sequence_loss_weight * balance, where M and M2 are the
        numbers of main and MTP targets over all micro-batches and ranks, so cutting a batch differently changes
        nothing; balance is the mean over all sequences. Router biases move once, by the summed counts.

        `z_weight` adds that much of log(sum of exp of logits)^2 to every target's main loss (PaLM, section 5), in the
        metrics too. `source` tells where the batch came from; it is written down if the step is skipped.

        `idle`: this rank has no rows in this step; it passes any batch, which takes part in the communication and
        counts for nothing.
        """
        assert batches, "a step needs a batch on every rank"
        device, losses = self.accelerator.device, self._loss_module()
        sizes = [[b.target_count, b.mtp_target_count, _sequences(b), b.token_count] for b in batches]
        mine = 0 if idle else 1
        totals = sum_over_ranks(torch.tensor(sizes).sum(0) * mine, self.accelerator).tolist()
        targets, mtp_targets, sequences = (max(1, int(n)) for n in totals[:3])
        sums = torch.zeros(3, dtype=torch.float64)
        counts_LE: Tensor | None = None
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(losses):
                found: Losses = losses(batch.to(device), mtp_weight > 0, sequence_loss_weight > 0, z_weight)
                main, mtp = found.main / targets, found.mtp / mtp_targets
                balance = found.balance * (sizes[index][2] / sequences)
                loss = main + mtp_weight * mtp + sequence_loss_weight * balance
                # DDP averages over the ranks; the sum is wanted
                self.accelerator.backward(loss * (self._world * mine))
            # a pass that only DDP wanted counts for nothing
            seen = (main, mtp * (mtp_weight > 0), balance)
            sums += torch.stack([part.detach().double().cpu() * mine for part in seen])
            counts_LE = found.counts_LE * mine if counts_LE is None else counts_LE + found.counts_LE * mine
        assert counts_LE is not None
        if mtp_weight == 0 and self.model.mtp is not None:
            # a gradient of zero, from a pass that only DDP wanted, would still decay and move what is not trained
            for parameter in self.model.mtp.parameters():
                parameter.grad = None
        sums = sum_over_ranks(sums, self.accelerator)
        counts_LE = sum_over_ranks(counts_LE, self.accelerator).cpu()
        main_loss, mtp_loss, balance_loss = (float(value) for value in sums)
        total = main_loss + mtp_weight * mtp_loss + sequence_loss_weight * balance_loss
        norm, applied = self._update(lr, total, source or {})
        if applied and bias_update_rate > 0:
            update_router_bias(self.model, counts_LE, bias_update_rate, center)
        return StepMetrics(
            loss=main_loss,
            mtp_loss=mtp_loss,
            balance_loss=balance_loss,
            grad_norm=norm,
            targets=int(totals[0]),
            tokens=int(totals[3]),
            counts_LE=counts_LE,
            skipped=not applied,
        )

    # ------------------------------------------------------------------ halves, for other objectives

    def accumulate(self, loss: Tensor) -> None:
        """Add the gradient of a scalar `loss` to the parameters' gradients.

        The caller has normalised it: the losses of all micro-batches and ranks are summed, not averaged.
        """
        self.accelerator.backward(loss)
        self._reduced = False

    def update(self, lr: float) -> float:
        """Sum the accumulated gradients over ranks, clip, step at rate `lr`, forget them; returns their norm.

        A norm that is not finite means that nothing was changed (see the class).
        """
        return self._update(lr, None, {})[0]

    def _loss_module(self) -> nn.Module:
        """The module whose forward gives the losses, wrapped for DDP and autocast at its first use.

        Not before: DDP's hooks would also fire in the backward of losses that did not pass through it.
        """
        if self._losses is None:
            # Accelerate wraps in DDP whatever torchrun has started, be it one process
            wrapped = self.accelerator.distributed_type != DistributedType.NO
            self._losses = LossModule(self.model, always_mtp=wrapped)
            # else there is nothing to wrap, and asking costs the import of torch.distributed.tensor
            if self._world > 1 or self.accelerator.mixed_precision != "no":
                self._losses = self.accelerator.prepare(self._losses)
        return self._losses

    @torch.no_grad()
    def _update(self, lr: float, loss: float | None, source: Mapping[str, Any]) -> tuple[float, bool]:
        parameters = [p for p in self.optimizer.parameters() if p.grad is not None]
        if not self._reduced:
            self._sum_gradients()
            parameters = [p for p in self.optimizer.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        reason = self.guard.verdict(loss, value)
        if reason is None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
            self.optimizer.set_lr(lr)
            self.optimizer.step()
            self.guard.applied(loss, value)
        self.optimizer.zero_grad()
        self._reduced = True
        if reason is not None:
            self.guard.skip(reason, loss, value, source)
        return value, reason is None

    def _sum_gradients(self) -> None:
        """All-reduce gradients that did not pass through DDP's forward; absent ones count as zero."""
        if self._world == 1:
            return
        for parameter in self.optimizer.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = sum_over_ranks(gradient, self.accelerator)


def _sequences(batch: Batch) -> int:
    """Rows that hold a token: what the balance loss is averaged over."""
    return int((batch.documents_BT >= 0).any(dim=1).sum())
