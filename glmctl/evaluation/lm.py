"""Our model as an lm-eval `LM`, in process: `simple_evaluate(GlmctlLM(model, template=...), ...)`, or by name as
`simple_evaluate(model="glmctl", model_args="pretrained=FOLDER")` once this module is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from glmctl import console
from glmctl.data.chat import ChatTemplate
from glmctl.data.tokenizer import END_OF_TEXT
from glmctl.engine.engine import Engine
from glmctl.engine.request import SamplingParams
from glmctl.errors import GlmctlError, unknown
from glmctl.evaluation.catalog import OWN_TASKS
from glmctl.evaluation.generation import Job, cut, generate_texts
from glmctl.evaluation.likelihood import Score, score_continuations
from glmctl.evaluation.responses import Responses
from glmctl.model.folder import load_model
from glmctl.model.network import GlmMoe
from glmctl.rl.seeds import derive_seed
from glmctl.run.directory import resolve_model

Moved = Callable[[str, int, int], None]
"""(kind of request, how many are answered, how many there are), as answers come"""
Pair = tuple[tuple[str, str], list[int], list[int]]

SAMPLING_KWARGS = ("temperature", "top_p", "top_k", "min_p")
HANDLED_KWARGS = ("do_sample", "until", "max_gen_toks", "seed")


@register_model("glmctl")
class GlmctlLM(TemplateLM):  # type: ignore[misc]
    """Likelihoods by right-padded batches, generation by the engine, chat by the model's own template.

    pretrained: a loaded model (then `template` is needed), a model folder or a run directory. `batch_size` and
    `max_batch_size`, which lm-eval passes to every model, are ignored: `batch_tokens` bounds a forward, `max_slots`
    the requests that generate at once. think_end_token: of tasks that are not ours, an answer is what follows its last
    occurrence. What `responses` knows is not computed again, what is computed goes there, and `moved` is told. Raises
    RecipeError or DataError for a missing or damaged folder.
    """

    def __init__(
        self,
        pretrained: GlmMoe | Path | str,
        *,
        template: ChatTemplate | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        batch_tokens: int = 8192,
        max_slots: int = 64,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        enable_thinking: bool = True,
        think_end_token: str | None = None,
        seed: int = 0,
        responses: Responses | None = None,
        moved: Moved = lambda kind, done, total: None,
    ) -> None:
        super().__init__()
        self.name = "in memory"
        if isinstance(pretrained, GlmMoe):
            if template is None:
                raise ValueError("a model in memory is evaluated with its chat template")
            self.model = pretrained
        else:
            folder = resolve_model(pretrained)
            self.name = str(pretrained)
            self.model, template = load_model(folder, device=device or "cpu"), template or ChatTemplate.load(folder)
        self.template = template
        self.tokenizer = template.tokenizer
        self.batch_tokens, self.max_slots, self.seed = batch_tokens, max_slots, seed
        self.enable_thinking, self.responses, self.moved = enable_thinking, responses, moved
        self.think_end_token = think_end_token
        self.max_length = max_length or self.model.config.max_position_embeddings
        self.max_gen_toks = max_gen_toks

    # ------------------------------------------------------------------ tokens and templates

    @property
    def eot_token_id(self) -> int:
        """The id of `<|endoftext|>`; also what an empty context stands for."""
        return self.tokenizer.id(END_OF_TEXT)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and template for lm-eval's request cache."""
        return f"glmctl-{self.tokenizer.hash[:16]}-{'think' if self.enable_thinking else 'nothink'}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special strings become their tokens, and nothing is added (GLM's tokenizer adds nothing)."""
        return self.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The history as text. Without the generation prompt it ends inside the last message, ready to go on."""
        return self.template.render(
            chat_history, add_generation_prompt=add_generation_prompt, enable_thinking=self.enable_thinking
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's Jinja source, for the record."""
        return self.template.source if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the `config` of its results."""
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.parameters()),
            "model_dtype": str(self.model.dtype),
            "model_args": {"pretrained": self.name},
        }

    # ------------------------------------------------------------------ likelihood

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """lm-eval's split of the whole's tokens; where a token spans the border so that nothing is left for the
        continuation (lm-eval's `hf` model fails there), the two are encoded apart.
        """
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        if pair[1] or not continuation:
            return pair
        return self.tok_encode(context), self.tok_encode(continuation)

    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[Score]:
        scores = self._score([(context, continuation) for _, context, continuation in requests])
        for (text, _, _), score in zip(requests, scores, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, score)
        return scores

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[Score]:
        """Scores in the order of the pairs, those already known not computed."""
        known: dict[int, Score] = {}
        keys: list[str] = []
        kept = self.responses
        if kept is not None:
            keys = [kept.key("loglikelihood", *pair, self.max_length) for pair in pairs]
            known = {place: (score[0], score[1]) for place, key in enumerate(keys) if (score := kept.get(key))}
        missing = [place for place in range(len(pairs)) if place not in known]
        done = len(known)

        def keep(scored: list[tuple[int, Score]]) -> None:
            nonlocal done
            if kept is not None:
                kept.put((keys[missing[at]], score) for at, score in scored)
            done += len(scored)
            self.moved("log-likelihoods", done, len(pairs))

        found = score_continuations(
            self.model,
            [pairs[place] for place in missing],
            max_length=self.max_length,
            batch_tokens=self.batch_tokens,
            done=keep,
        )
        known |= zip(missing, found, strict=True)
        return [known[place] for place in range(len(pairs))]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is greedy) of each (context, continuation)."""
        result: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return result

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each whole text after `<|endoftext|>`: every token is scored once, in windows of
        the model's context.
        """
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append(make_disjoint_window(pair))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (logprob, _) in zip(owners, self._score(windows), strict=True):
            totals[index] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each context, up to a stop string, an end token or `max_gen_toks`.

        Greedy unless the task's `do_sample` or `temperature` says otherwise. A sampled request draws from a stream of
        its own, named by the seed, its prompt and how often that was asked before: results depend neither on batching
        nor on what else is asked. Contexts that leave no room are cut from the left, as lm-eval does.
        """
        repeats: Counter[tuple[str, str]] = Counter()
        jobs = []
        for request in requests:
            context, gen_kwargs = request.args
            # by task: the same question in another one must not change this one's samples
            asked = (request.task_name, context)
            jobs.append(self._job(context, gen_kwargs, repeats[asked], hides=self._hides_reasoning(request)))
            repeats[asked] += 1
        if off := [job.cut for job in jobs if job.cut]:
            console.warn(f"{len(off)} of {len(jobs)} prompts do not fit the context: up to {max(off)} tokens are cut")
        texts = [self._answer(request, text) for request, text in zip(requests, self._write(jobs), strict=True)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _hides_reasoning(self, request: Instance) -> bool:
        """Our tasks read the reasoning themselves."""
        return self.think_end_token is not None and request.task_name not in OWN_TASKS

    def _answer(self, request: Instance, text: str) -> str:
        """The text, or what follows the reasoning in it up to a stop string, as lm-eval's other models give it."""
        if not self._hides_reasoning(request):
            return text
        until = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["until"]
        return cut(text.split(self.think_end_token)[-1].lstrip(), [stop for stop in until if stop])

    def _write(self, jobs: list[Job]) -> list[str]:
        """Texts in the order of the jobs, those already known not written again."""
        known: dict[int, str] = {}
        keys: list[str] = []
        kept = self.responses
        if kept is not None:
            keys = [kept.key("generate", job.prompt, asdict(job.params)) for job in jobs]
            known = {place: text for place, key in enumerate(keys) if (text := kept.get(key)) is not None}
        missing = [place for place in range(len(jobs)) if place not in known]
        if missing:
            asked = [jobs[place] for place in missing]
            longest = max(len(job.prompt) + job.params.max_tokens for job in asked)
            engine = Engine(
                self.model,
                max_slots=min(self.max_slots, len(asked)),
                max_length=max(min(longest, self.max_length), 2),
                token_bytes=lambda token: self.tokenizer.decode_bytes([token], skip_special=True),
            )
            done = len(known)

            def keep(at: int, text: str) -> None:
                nonlocal done
                if kept is not None:
                    kept.put([(keys[missing[at]], text)])
                done += 1
                self.moved("generations", done, len(jobs))

            known |= zip(missing, generate_texts(engine, self.tokenizer, asked, keep), strict=True)
        return [known[place] for place in range(len(jobs))]

    def _job(self, context: str, gen_kwargs: dict[str, Any], repeat: int, *, hides: bool) -> Job:
        kwargs = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        for key in kwargs:
            if key not in (*SAMPLING_KWARGS, *HANDLED_KWARGS):
                raise unknown("generation argument", key, [*SAMPLING_KWARGS, *HANDLED_KWARGS])
        most = int(kwargs["max_gen_toks"])
        room = self.max_length - most
        if room <= 0:
            raise GlmctlError(f"max_gen_toks {most} leaves no room in the context of {self.max_length}")
        prompt = self.tok_encode(context)
        temperature = float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0
        params = SamplingParams(
            max_tokens=most,
            temperature=temperature,
            top_p=float(kwargs.get("top_p", 1.0)),
            top_k=int(kwargs.get("top_k", 0)),
            min_p=float(kwargs.get("min_p", 0.0)),
            # an empty one is none; reasoning may hold what ends an answer, so what hides it is cut afterwards
            stop=() if hides else tuple(stop for stop in kwargs["until"] if stop),
            stop_token_ids=self.tokenizer.eos_ids,
            seed=derive_seed(int(kwargs.get("seed", self.seed)), context, repeat),
        )
        return Job(prompt[-room:] or [self.eot_token_id], params, cut=max(0, len(prompt) - room))
