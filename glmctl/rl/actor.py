"""The policy as the one that acts: the engines that roll out and are scored, in step with the trained weights."""

from __future__ import annotations

from glmctl.data.chat import ChatTemplate
from glmctl.model.network import GlmMoe
from glmctl.recipe.schema import RlRecipe
from glmctl.rl.collect import Collector
from glmctl.rl.fp8 import load_rounded
from glmctl.rl.rollout import rollout_engine


class Actor:
    """`engine` makes rollouts, `scorer` held-out answers: one and the same unless rollouts are in lower precision."""

    def __init__(self, model: GlmMoe, template: ChatTemplate, recipe: RlRecipe) -> None:
        self.template = template
        self._model = model
        self._rounded: GlmMoe | None = None
        if recipe.rollouts.precision == "fp8-block":
            self._rounded = GlmMoe(model.config, device=model.device, dtype=model.dtype)
        speculative = recipe.rollouts.speculative
        self.engine = rollout_engine(self._rounded or model, recipe.episode_tokens, speculative=speculative)
        self.scorer = self.engine
        if self._rounded is not None:
            self.scorer = rollout_engine(model, recipe.episode_tokens, speculative=speculative)
        self.collector = Collector(recipe, self.engine, template)

    def follow(self, version: int) -> None:
        """The trained weights, changed in place, are now version `version`."""
        if self._rounded is not None:
            load_rounded(self._rounded, self._model)
            self.scorer.load_weights(version)
        self.engine.load_weights(version)
