"""Our objective against TRL's GRPOTrainer on the same recorded rollouts: loss and every parameter's gradient.

TRL runs transformers' Glm4MoeForCausalLM on padded rows, we run our network on packed ones, from one model folder.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from glmctl.data.tokenizer import Tokenizer
from glmctl.model.config import ModelConfig
from glmctl.model.folder import load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import GrpoSpec, GspoSpec, PolicySpec
from glmctl.rl import pack as pack_module
from glmctl.rl.environment import StopReason
from glmctl.rl.episode import Trajectory
from glmctl.rl.learn import update, weigh
from glmctl.rl.pack import pack

# the bar; fp32 sums in another order
TOLERANCE = 1e-5
SAMPLES = 4


class Case(NamedTuple):
    ours: PolicySpec
    theirs: dict[str, Any]


# TRL names the token mean over the batch "bnpo"; "dapo" is the same number for one accumulation window
WIDE = {"logprob_gap_limit": 100.0}
CLIP = {"epsilon": 0.2, "epsilon_high": 0.28}
CASES = {
    "token": Case(GrpoSpec(**WIDE), {"loss_type": "bnpo", **CLIP}),
    "dapo": Case(GrpoSpec(**WIDE), {"loss_type": "dapo", **CLIP}),
    "sequence": Case(GrpoSpec(aggregation="sequence", **WIDE), {"loss_type": "grpo", **CLIP}),
    "without-std": Case(GrpoSpec(std_normalize=False, **WIDE), {"loss_type": "bnpo", "scale_rewards": "none", **CLIP}),
    "kl": Case(
        GrpoSpec(kl_weight=0.3, **WIDE), {"loss_type": "bnpo", "beta": 0.3, "use_bias_correction_kl": False, **CLIP}
    ),
    "kl-corrected": Case(
        GrpoSpec(kl_weight=0.3, kl_corrected=True, **WIDE), {"loss_type": "bnpo", "beta": 0.3, **CLIP}
    ),
    "gspo": Case(
        GspoSpec(clip_low=0.02, clip_high=0.03, **WIDE),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "gspo-token-mean": Case(
        GspoSpec(clip_low=0.02, clip_high=0.03, aggregation="token", **WIDE),
        {"loss_type": "bnpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "importance": Case(GrpoSpec(importance_cap=1.1, **WIDE), {"loss_type": "bnpo", **CLIP}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> Path:
    place = tmp_path_factory.mktemp("trl")
    save_model(GlmMoe(tiny_config, seed=0), place / "model")
    save_model(GlmMoe(tiny_config, seed=1), place / "reference")
    tiny_tokenizer.save(place / "model")
    return place


def trajectory(model: GlmMoe, seed: int, group: int, prompt: list[int], reward: float) -> Trajectory:
    """Recorded under a policy that was a little different: ratios on both sides of 1, some beyond the clip.

    One in three has a tool's tokens in the middle, which carry no loss.
    """
    rng = random.Random(seed)
    length = rng.randint(2, 12)
    mask = [1] * length
    if seed % 3 == 0 and length > 4:
        mask[2] = 0
    tokens = [*prompt, *(rng.randrange(470) for _ in range(length))]
    mask = [*[0] * len(prompt), *mask]
    with torch.no_grad():
        logp = torch.log_softmax(model.logits(model(torch.tensor([tokens]))[0]), -1)
    made = enumerate(zip(tokens, mask, strict=True))
    logprobs = [float(logp[i - 1, t]) + rng.gauss(0, 0.2) if m else 0.0 for i, (t, m) in made]
    return Trajectory(
        f"p{group}", "t", group, seed, tokens=tokens, loss_mask=mask, logprobs=logprobs, reward=reward,
        stop_reason=StopReason.ANSWERED,
    )  # fmt: skip


@pytest.fixture(scope="module")
def groups(folder: Path) -> list[list[Trajectory]]:
    model, rng = load_model(folder / "model"), random.Random(3)
    rewards = [[1.0, 0.0, 0.0, 0.5], [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    prompts = [[rng.randrange(470) for _ in range(n)] for n in (5, 9, 3)]
    return [
        [trajectory(model, SAMPLES * g + i, g, prompt, r) for i, r in enumerate(row)]
        for g, (row, prompt) in enumerate(zip(rewards, prompts, strict=True))
    ]


class Recorder:
    """The Stepper's two halves, which keep the gradient."""

    def __init__(self, model: GlmMoe) -> None:
        self.model = model

    def accumulate(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self, lr: float) -> float:
        return 0.0


def gradients_on_disk(model: Any, save: Any, path: Path) -> dict[str, torch.Tensor]:
    """Every parameter's gradient under the names of the model folder."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    save(path)
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def padded(groups: list[list[Trajectory]]) -> dict[str, torch.Tensor]:
    """The rollouts as TRL's batch: prompts padded on the left, completions on the right, tools masked."""
    rows = [one for group in groups for one in group]
    starts = [one.loss_mask.index(1) for one in rows]
    left, right = max(starts), max(len(one.tokens) - s for one, s in zip(rows, starts, strict=True))
    batch: dict[str, torch.Tensor] = {
        "prompt_ids": torch.zeros(len(rows), left, dtype=torch.long),
        "prompt_mask": torch.zeros(len(rows), left, dtype=torch.long),
        "completion_ids": torch.zeros(len(rows), right, dtype=torch.long),
        "completion_mask": torch.zeros(len(rows), right, dtype=torch.long),
        "tool_mask": torch.zeros(len(rows), right, dtype=torch.long),
        "behaviour": torch.zeros(len(rows), right),
    }
    for row, (one, start) in enumerate(zip(rows, starts, strict=True)):
        size = len(one.tokens) - start
        batch["prompt_ids"][row, left - start :] = torch.tensor(one.tokens[:start])
        batch["prompt_mask"][row, left - start :] = 1
        batch["completion_ids"][row, :size] = torch.tensor(one.tokens[start:])
        batch["completion_mask"][row, :size] = 1
        batch["tool_mask"][row, :size] = torch.tensor(one.loss_mask[start:])
        batch["behaviour"][row, :size] = torch.tensor(one.logprobs[start:])
    return batch


def their_trainer(folder: Path, options: dict[str, Any], out: Path) -> Any:
    from datasets import Dataset
    from transformers import Glm4MoeForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    model = Glm4MoeForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "model" / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    args = GRPOConfig(
        output_dir=str(out), use_cpu=True, bf16=False, report_to=[], num_generations=SAMPLES, temperature=1.0,
        per_device_train_batch_size=3 * SAMPLES, gradient_checkpointing=False, max_completion_length=64,
        disable_dropout=True, **options,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": ["a"] * 4})
    return GRPOTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, reward_funcs=lambda **kw: [0.0]
    )


def their_advantages(groups: list[list[Trajectory]], scale: bool) -> torch.Tensor:
    """As GRPOTrainer._generate_and_score_completions makes them: over the group's deviation plus 1e-4."""
    rewards = torch.tensor([[one.reward for one in group] for group in groups])
    advantages = rewards - rewards.mean(1, keepdim=True)
    # TRL adds 1e-4 to the deviation, slime (and we) 1e-6: the one difference, which is not in the loss
    return (advantages / (rewards.std(1, keepdim=True) + 1e-6) if scale else advantages).flatten()


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_trls(folder: Path, groups, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(pack_module, "ROW_TOKENS", 40)
    case = CASES[name]
    trainer = their_trainer(folder, case.theirs, tmp_path / "out")
    model, batch = trainer.model.train(), padded(groups)
    behaviour, mask = batch.pop("behaviour"), batch["tool_mask"]
    batch["advantages"] = their_advantages(groups, case.theirs.get("scale_rewards") != "none")
    batch["num_items_in_batch"] = mask.sum()
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = 1
    ids, seen = (torch.cat([batch[f"prompt_{k}"], batch[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    scored = ids, seen, batch["completion_ids"].shape[1]
    reference = None
    if case.ours.kl_weight:
        reference = load_model(folder / "reference")
        # TRL patches the forward of the model it was given, so the reference borrows that model
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict(type(model).from_pretrained(folder / "reference", dtype=torch.float32).state_dict())
        with torch.no_grad():
            batch["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(model, *scored)[0]
        model.load_state_dict(own)
    if case.ours.importance_cap is None:
        batch["old_per_token_logps"] = behaviour
    else:
        with torch.no_grad():
            old = trainer._get_per_token_logps_and_entropies(model, *scored)[0]
        batch["old_per_token_logps"] = old
        batch["importance_sampling_ratio"] = ((old - behaviour) * mask).exp().clamp(max=case.ours.importance_cap)
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    their_loss = trainer._compute_loss(model, batch)
    their_loss.backward()
    expected = gradients_on_disk(model, model.save_pretrained, tmp_path / "theirs")

    ours = load_model(folder / "model")
    packed = pack(weigh(groups, case.ours, max_tokens=64), 40)
    assert len(packed) > 2
    stats = update(
        ours, Recorder(ours), packed, case.ours, lr=0.0, temperature=1.0, mtp_weight=0.0, reference=reference
    )
    found = gradients_on_disk(ours, lambda path: save_model(ours, path), tmp_path / "ours")

    assert stats.loss == pytest.approx(float(their_loss), abs=TOLERANCE)
    compared = [key for key in expected if not key.endswith("e_score_correction_bias")]
    assert len(compared) > 60
    assert max(float(expected[key].abs().max()) for key in compared) > 0.01
    for key in compared:
        assert float((found[key] - expected[key]).abs().max()) < TOLERANCE, key
    if "gspo" in name or name == "token":
        assert 0.0 < stats.clip_fraction < 1.0
