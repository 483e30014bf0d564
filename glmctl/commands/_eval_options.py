"""The options of `glmctl eval`, under lm-eval's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glmctl.recipe import names

Target = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL|RECIPE",
        help="A run directory or model folder (with -t), or a recipe.",
        autocompletion=names.complete,
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", "-t", metavar="TASK,...", help="Tasks and groups: ours (--list) or lm-eval's."),
]
Problems = Annotated[
    list[str] | None,
    typer.Option("--problems", metavar="NAME=FILE", help="A problem file, scored by its own verifier."),
]
ModelArgs = Annotated[
    str | None,
    typer.Option("--model_args", "--model-args", "-a", metavar="pretrained=DIR", help="MODEL, as lm-eval has it."),
]
NumFewshot = Annotated[
    int | None, typer.Option("--num_fewshot", "--num-fewshot", "-f", metavar="N", help="Examples in the prompt.")
]
Limit = Annotated[
    float | None, typer.Option("--limit", "-L", metavar="N", help="Only N questions of a task; below 1 a share.")
]
BatchSize = Annotated[
    str | None,
    typer.Option("--batch_size", "--batch-size", "-b", metavar="N|auto", help="Requests that generate at once."),
]
ApplyChatTemplate = Annotated[
    bool, typer.Option("--apply_chat_template", "--apply-chat-template", help="To lm-eval's tasks; ours know when.")
]
FewshotAsMultiturn = Annotated[
    bool,
    typer.Option("--fewshot_as_multiturn/--no-fewshot_as_multiturn", help="Examples as turns of the chat."),
]
SystemInstruction = Annotated[
    str | None,
    typer.Option("--system_instruction", "--system-instruction", metavar="TEXT", help="Of lm-eval's tasks."),
]
GenKwargs = Annotated[
    str | None,
    typer.Option("--gen_kwargs", "--gen-kwargs", metavar="KEY=VALUE,...", help="Generation of lm-eval's tasks."),
]
IncludePath = Annotated[
    Path | None,
    typer.Option("--include_path", "--include-path", metavar="DIR", help="A folder with tasks of your own."),
]
Metadata = Annotated[str | None, typer.Option("--metadata", metavar="JSON", help="Handed to lm-eval's tasks.")]
Seed = Annotated[
    str | None, typer.Option("--seed", metavar="N", help="Of sampling and examples; or four, as lm-eval has them.")
]
UseCache = Annotated[
    Path | None, typer.Option("--use_cache", "--use-cache", "-c", metavar="DIR", help="Keep answers here for good.")
]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--confirm_run_unsafe_code", "--confirm-run-unsafe-code", help="Let lm-eval's tasks run code unboxed."
    ),
]
NoSandbox = Annotated[
    bool, typer.Option("--unsafe-no-sandbox", help="Run what the model writes without isolation, in our tasks too.")
]
LogSamples = Annotated[
    bool, typer.Option("--log_samples", "--log-samples", "-s", help="Always on: every sample is kept.")
]
OutputPath = Annotated[
    Path | None,
    typer.Option("--output_path", "--output-path", "-o", "--run", metavar="DIR", help="The run directory."),
]
Nothink = Annotated[bool, typer.Option("--nothink", help="Direct answers, without reasoning.")]
Samples = Annotated[
    int | None, typer.Option("--samples", metavar="N", help="Samples of each problem: avg@N and pass@k.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", metavar="T", help="Of problems and our tasks; 0 is greedy.")
]
List = Annotated[bool, typer.Option("--list", help="List our offline tasks and the report's suites.")]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--compare", metavar="A B", help="Two evaluated models (<run>/export/<model>), paired."),
]
Judge = Annotated[
    str | None,
    typer.Option("--judge", metavar="URL", help="With --compare: an OpenAI-compatible judge of the answers."),
]
JudgeModel = Annotated[
    str | None, typer.Option("--judge_model", "--judge-model", metavar="NAME", help="The judge's model.")
]
