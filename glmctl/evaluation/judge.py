"""A language model as the judge of two answers, behind any OpenAI-compatible endpoint.

Judges prefer what they read first (Zheng et al. 2023, arXiv 2306.05685, section 3.3): every pair is put to them in both
orders, and only a preference that survives the swap counts.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from glmctl.data.teacher import client_of
from glmctl.errors import EnvironmentProblem

Verdict = Literal["A", "B", "tie"]

SYSTEM = (
    "You compare two answers to the same request. Judge how correct, how helpful and how clear they are, and whether "
    "they do what was asked for. Neither the order nor the length of the answers may influence you. Reason briefly, "
    "then end with exactly one line: 'Verdict: A', 'Verdict: B' or 'Verdict: tie'."
)
USER = "<request>\n{question}\n</request>\n\n<answer_A>\n{a}\n</answer_A>\n\n<answer_B>\n{b}\n</answer_B>"
MAX_TOKENS = 2048

_VERDICT = re.compile(r"verdict\W*(a|b|tie)\b", re.IGNORECASE)


class Judge:
    """One model of one endpoint; its key, if it wants one, is in OPENAI_API_KEY. Thread-safe, greedy."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self._client = client_of(url)

    def messages(self, question: str, a: str, b: str) -> list[dict[str, str]]:
        """What the judge is shown: the whole prompt, for the record."""
        user = USER.format(question=question, a=a, b=b)
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]

    def settings(self) -> dict[str, Any]:
        """What a judgement is a function of besides the messages."""
        return {"model": self.model, "temperature": 0.0, "max_tokens": MAX_TOKENS}

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The judge's reply. EnvironmentProblem when the endpoint does not answer."""
        import openai

        try:
            reply = self._client.chat.completions.create(
                messages=messages,  # type: ignore[arg-type]
                **self.settings(),
            )
        except openai.OpenAIError as error:
            raise EnvironmentProblem(
                f"{self.url}: '{self.model}' does not answer: {error}", hint="the same command goes on from here"
            ) from error
        return reply.choices[0].message.content or ""


def verdict(reply: str) -> Verdict | None:
    """The last verdict in a reply; None when it gives none."""
    found = _VERDICT.findall(reply)
    if not found:
        return None
    last = found[-1].lower()
    return "tie" if last == "tie" else "A" if last == "a" else "B"
