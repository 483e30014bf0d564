"""The GLM-4.5 report's evaluations (arXiv 2508.06471, section 4) as groups: what runs here, and what each part needs.

Importable without torch or lm-eval. Scores are the report's, None where it gives none.
EvalPlus's stands at both of its parts, of which it is the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from glmctl.errors import EnvironmentProblem


@dataclass(frozen=True)
class Part:
    """One benchmark of a suite."""

    name: str
    task: str | None
    """lm-eval's task or group; None: lm-eval has none, `needs` says what else measures it"""
    needs: str
    glm_4_5: float | None = None
    air: float | None = None


def _hub(dataset: str, more: str = "") -> str:
    return f"data set {dataset} of the hub{more}"


_TOOLS = "`glmctl serve` and its own harness: "

SUITES: dict[str, tuple[Part, ...]] = {
    "glm45_base": (
        Part("SimpleQA", None, "data set basicv8vc/SimpleQA of the hub and a judge", 30.0),
        Part("BBH", "bbh", _hub("SaylorTwift/bbh"), 86.2),
        Part("MMLU", "mmlu", _hub("cais/mmlu"), 86.1),
        Part("HellaSwag", "hellaswag", _hub("Rowan/hellaswag"), 87.1),
        Part("PIQA", "piqa", _hub("baber/piqa"), 85.3),
        Part("TriviaQA", "triviaqa", _hub("mandarjoshi/trivia_qa"), 80.0),
        Part("EvalPlus, HumanEval+", "humaneval_plus", _hub("evalplus/humanevalplus", "; runs code unboxed"), 78.1),
        Part("EvalPlus, MBPP+", "mbpp_plus", _hub("evalplus/mbppplus", "; runs code unboxed"), 78.1),
        Part("LiveCodeBench-Base", None, "LiveCodeBench's own harness and problems", 28.1),
        Part("GSM8K", "gsm8k", _hub("openai/gsm8k"), 79.4),
        Part("MATH", "minerva_math", _hub("EleutherAI/hendrycks_math", "; lm-eval[math]"), 61.0),
        Part("CLUEWSC", None, "data set clue/clue (cluewsc2020) of the hub, as your own task (--include_path)", 83.5),
        Part("C-Eval", "ceval-valid", _hub("ceval/ceval-exam"), 86.9),
        Part("C3", None, "data set clue/clue (c3) of the hub, as your own task (--include_path)", 83.1),
        Part("Chinese-SimpleQA", None, "data set OpenStellarTeam/Chinese-SimpleQA of the hub and a judge", 70.1),
    ),
    "glm45_agentic": (
        Part("TAU-bench Retail", None, _TOOLS + "tau-bench with a simulated user", 79.7, 77.9),
        Part("TAU-bench Airline", None, _TOOLS + "tau-bench with a simulated user", 60.4, 60.8),
        Part("BFCL v3", None, _TOOLS + "bfcl-eval; offline and in small: glmctl_tool_use", 77.8, 76.4),
        Part("BrowseComp", None, _TOOLS + "simple-evals with a browser and a judge", 26.4, 21.3),
    ),
    "glm45_reasoning": (
        Part("MMLU-Pro", "mmlu_pro", _hub("TIGER-Lab/MMLU-Pro"), 84.6, 81.4),
        Part("AIME 2024, avg@32", "aime24", _hub("Maxwell-Jia/AIME_2024", "; sampling at 0.6"), 91.0, 89.4),
        Part("MATH-500", "minerva_math500", _hub("HuggingFaceH4/MATH-500", "; lm-eval[math]"), 98.2, 98.1),
        Part("SciCode", None, "SciCode's own harness and sandbox", 41.7, 37.3),
        Part("GPQA, avg@8", "gpqa_diamond_cot_zeroshot", _hub("Idavidrein/gpqa", "; gated; sampling"), 79.1, 75.0),
        Part("HLE, text only", None, "data set cais/hle of the hub and a judge (the report: GPT-4o)", 14.4, 10.6),
        Part("LiveCodeBench 2407-2501", None, "LiveCodeBench's own harness and problems", 72.9, 70.7),
        Part("AA-Index", None, "an average over several of the above, estimated by the report", 67.7, 64.8),
    ),
    "glm45_coding": (
        Part("SWE-bench Verified", None, "containers and OpenHands 0.34.0, 100 iterations, 128K", 64.2, 57.6),
        Part("Terminal-Bench", None, "containers and its Terminus agent with function calling", 37.5, 30.0),
    ),
    "glm45_general": (
        Part("MMLU", "mmlu", _hub("cais/mmlu"), 90.0, 87.4),
        Part("SimpleQA", None, "data set basicv8vc/SimpleQA of the hub and a judge", 26.4, 14.5),
        Part("IFEval", "ifeval", _hub("google/IFEval", "; lm-eval[ifeval]"), 86.1, 86.3),
        Part("SysBench", None, "SysBench's own harness and a judge", 81.0, 77.4),
        Part("MultiChallenge", None, "MultiChallenge's own harness and a judge", 52.8, 42.5),
        Part("SafetyBench", None, "SafetyBench's own questions and submission", 89.9, 87.8),
    ),
}
"""group -> the report's benchmarks in it; a group runs the parts that have a task and names the others"""


def missing(names: Sequence[str]) -> list[str]:
    """`benchmark: what it needs` of every part of the named suites that cannot run here.

    EnvironmentProblem when no part of a suite can.
    """
    absent = []
    for name in names:
        parts = SUITES.get(name, ())
        without = [f"{part.name}: {part.needs}" for part in parts if part.task is None]
        if parts and len(without) == len(parts):
            raise EnvironmentProblem(f"{name}: lm-eval runs none of it; {'; '.join(without)}")
        absent += without
    return absent
