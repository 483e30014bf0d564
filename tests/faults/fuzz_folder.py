"""Coverage-guided fuzzing of what reads strangers' model folders (row C1). A program to be run by hand, not a test.

    pip install atheris
    python tests/faults/fuzz_folder.py -max_total_time=60

The first byte chooses the file that the rest becomes: a safetensors header with its length, the whole file, the index
or config.json. Whatever it holds, reading ends well or in one of our one-line errors.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["glmctl.model", "glmctl.convert"]):
    from glmctl.convert.source import check_copies, open_model
    from glmctl.model.folder import INDEX, save_model
    from glmctl.model.tensor_file import TensorFile

from glmctl.errors import GlmctlError
from glmctl.model.config import ModelConfig
from glmctl.model.network import GlmMoe

root = Path(tempfile.mkdtemp())
folder = root / "model"


def prepare() -> None:
    """A small folder in several shards."""
    config = ModelConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, n_routed_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    save_model(GlmMoe(config, seed=0), folder, shard_bytes=4000)


def one_input(data: bytes) -> None:
    """Put the bytes in their place, read, and put the healthy file back."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    kind, body = data[0] % 4 if data else 0, data[1:]
    path = {2: folder / INDEX, 3: folder / "config.json"}.get(kind, shard)
    original = path.read_bytes()
    path.write_bytes(len(body).to_bytes(8, "little") + body + bytes(64) if kind == 0 else body)
    problem: GlmctlError | None = None
    try:
        if kind < 2:
            TensorFile(path)
        model = open_model(folder)
        check_copies(model)
        for tensor in model.tensors.values():
            for _ in tensor.blocks():
                pass
    except GlmctlError as error:
        problem = error
    finally:
        path.write_bytes(original)
    if problem is not None:
        assert "\n" not in problem.message
        assert problem.exit_code in (2, 3)


def main() -> None:
    prepare()
    seeds = root / "seeds"
    seeds.mkdir()
    for kind, path in enumerate((sorted(folder.glob("*.safetensors"))[0], folder / INDEX, folder / "config.json"), 1):
        (seeds / path.name).write_bytes(bytes([kind]) + path.read_bytes()[:3000])
    header = sorted(folder.glob("*.safetensors"))[0].read_bytes()
    (seeds / "header").write_bytes(bytes([0]) + header[8 : 8 + int.from_bytes(header[:8], "little")])
    atheris.Setup([*sys.argv, str(seeds)], one_input)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
