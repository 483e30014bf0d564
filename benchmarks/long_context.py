"""A fact at any depth of the longest context: found before and after the mid-training of laptop/long-context?

    glmctl run laptop/long-context
    python benchmarks/long_context.py runs/laptop-long-context

Each probe is prose of the full length with one fact ("Remember lemon tiger.") at one depth, then "To recall: Remember
lemon"; it is found when the model goes on, greedily, with "tiger." The texts' seeds are not those of training.
There are 73 values to guess among.
Prints a table and, last, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from glmctl.data.retrieval import probe_of_tokens
from glmctl.data.tokenizer import Tokenizer
from glmctl.model.folder import load_model
from glmctl.model.generate import generate
from glmctl.model.network import GlmMoe

ANSWER_TOKENS = 4


def found(model: GlmMoe, tokenizer: Tokenizer, length: int, depth: float, probes: int) -> float:
    """Share of `probes` texts of `length` tokens whose fact at `depth` is recalled."""
    right = 0
    for number in range(probes):
        rng = random.Random(f"probe:{length}:{depth}:{number}")
        prompt, answer = probe_of_tokens(rng, tokenizer.encode_plain, length - ANSWER_TOKENS, depth)
        right += tokenizer.decode(generate(model, prompt, ANSWER_TOKENS)).startswith(answer)
    return right / probes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run of laptop/long-context")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--depths", type=int, default=11, help="from 0 to 1, evenly")
    parser.add_argument("--probes", type=int, default=20, help="at each depth")
    given = parser.parse_args()
    stages = given.run / "pretrain" / "stages"
    report: dict[str, dict[int, list[float]]] = {}
    depths = [place / (given.depths - 1) for place in range(given.depths)]
    print("model".ljust(12), "length".rjust(6), "  mean   by depth from 0 to 1")
    for path in sorted(stages.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        model, tokenizer = load_model(path), Tokenizer.load(path)
        for length in given.lengths:
            row = [found(model, tokenizer, length, depth, given.probes) for depth in depths]
            report.setdefault(path.name, {})[length] = row
            shares = " ".join(f"{share:4.0%}" for share in row)
            print(path.name.ljust(12), str(length).rjust(6), f"{sum(row) / len(row):6.1%}  {shares}", flush=True)
    print(json.dumps({"probes": given.probes, "depths": depths, "found": report}))


if __name__ == "__main__":
    main()
