"""Conversion under hostile input, kills and full disks (rows C1 to C3): one line, all or nothing, no tensor lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmctl.convert import write
from glmctl.convert.run import run as convert
from glmctl.convert.source import StoredModel, check_copies, open_model
from glmctl.convert.verify import compare
from glmctl.errors import DataError, EnvironmentProblem, GlmctlError
from glmctl.model.config import ModelConfig
from glmctl.model.folder import INDEX, load_model, save_model
from glmctl.model.network import GlmMoe
from glmctl.model.tensor_file import TensorFile, write_tensors
from glmctl.recipe.presets import PRESETS
from glmctl.recipe.schema import ConvertRecipe
from glmctl.run import atomic
from glmctl.run.directory import Run

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": [0],
}


def scrambled(config: ModelConfig) -> GlmMoe:
    """Every tensor random, so that no two can be exchanged unnoticed."""
    model = GlmMoe(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
    return model


def to(source: Path, target: Path, **fields: Any) -> Path:
    run = Run.open(ConvertRecipe(name="c", source=str(source), **fields), target)
    try:
        convert(run.recipe, run)
        return run.export
    finally:
        run.close()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy") / "model"
    save_model(scrambled(ModelConfig(num_hidden_layers=2, **TINY)), folder, shard_bytes=30_000)
    return folder


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("copies", [True, False], ids=["copies-stored", "copies-left-out"])
def test_every_preset_comes_back_byte_for_byte(preset: str, copies: bool, tmp_path: Path) -> None:
    """HF -> checkpoint -> HF at 1 and N shards: the preset's own structure at a tiny size (C3)."""
    layers = min(5, PRESETS[preset]["num_hidden_layers"])
    fields = {**PRESETS[preset], **TINY, "num_hidden_layers": layers}
    if "n_group" in fields:
        fields |= {"n_group": 2, "topk_group": 1}
    if fields.get("attention") == "mla":
        fields |= {"head_dim": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
        fields |= {"q_lora_rank": 20, "kv_lora_rank": 12, "num_key_value_heads": 4}
    if fields.get("attention") == "mfa":
        fields |= {"q_lora_rank": 20, "num_key_value_heads": 1}
    model = scrambled(ModelConfig.model_validate(fields))
    model.stores_mtp_copies = copies  # GLM-4.5 repeats embedding and head in its MTP layer, 4.6 does not
    save_model(model.bfloat16() if preset == "glm-4.5" else model, tmp_path / "one")
    run = to(tmp_path / "one", tmp_path / "a", to="checkpoint", compare_bytes=0)
    many = to(run, tmp_path / "b", shard_bytes=9_000, compare_bytes=0)
    assert len(list(many.glob("*.safetensors"))) > 5
    back = to(to(many, tmp_path / "c", to="checkpoint", compare_bytes=0), tmp_path / "d", compare_bytes=0)
    for other in (run, many, back):
        found = compare(tmp_path / "one", other, logits=False)
        assert found.identical, found.differences
        assert found.tensors == len(open_model(tmp_path / "one").tensors)
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()


def mutations() -> st.SearchStrategy[tuple[str, int, bytes]]:
    """(what, where, bytes): overwrite, insert or cut at a place early enough to hit header or index."""
    return st.tuples(st.sampled_from(["set", "insert", "cut"]), st.integers(0, 4000), st.binary(min_size=1, max_size=6))


def mutated(body: bytes, how: str, at: int, what: bytes) -> bytes:
    at %= max(1, len(body))
    if how == "cut":
        return body[:at] + body[at + len(what) :]
    return body[:at] + what + body[at + (len(what) if how == "set" else 0) :]


_watching: list[list[str]] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str | bytes | os.PathLike):
        _watching[-1].append(os.fsdecode(arguments[0]))


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Paths of every file that Python code opens meanwhile, sources of modules left out."""
    if not _watching:
        sys.addaudithook(_watch)
        _watching.append([])
    found: list[str] = []
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.pop()
        found[:] = [path for path in found if not path.endswith((".py", ".pyc", ".so"))]


def test_opened_files_are_seen(healthy: Path) -> None:
    with opened_files() as opened:
        read_all(open_model(healthy))
    assert {Path(path).name for path in opened} >= {
        INDEX,
        "config.json",
        *(p.name for p in healthy.glob("*.safetensors")),
    }


def survive(folder: Path, name: str, steps: list[tuple[str, int, bytes]]) -> None:
    original = (folder / name).read_bytes()
    body = original
    for how, at, what in steps:
        body = mutated(body, how, at, what)
    (folder / name).write_bytes(body)
    problem: GlmctlError | None = None
    try:
        with opened_files() as opened:
            read_all(open_model(folder))
    except GlmctlError as error:
        problem = error
    finally:
        (folder / name).write_bytes(original)
    assert not [path for path in opened if Path(path).resolve().parent != folder.resolve()]
    if problem is not None:
        assert problem.exit_code in (2, 3)
        assert "\n" not in problem.message
        assert len(problem.message) < 1000


def read_all(model: StoredModel) -> None:
    check_copies(model)
    for tensor in model.tensors.values():
        for block in tensor.blocks():
            assert block.shape[1] == tensor.width


FILES = ("model-00001-of-", INDEX, "config.json")
STEPS = st.lists(mutations(), min_size=1, max_size=3)


def attack(healthy: Path, which: str, steps: list[tuple[str, int, bytes]]) -> None:
    name = next(path.name for path in sorted(healthy.iterdir()) if path.name.startswith(which))
    survive(healthy, name, steps)


@pytest.mark.parametrize("which", FILES)
@given(steps=STEPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_end_in_one_line_never_in_a_traceback(
    healthy: Path, which: str, steps: list[tuple[str, int, bytes]]
) -> None:
    attack(healthy, which, steps)


@pytest.mark.slow
@pytest.mark.parametrize("which", FILES)
@given(steps=STEPS)
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_thousand_mutations_of_each(healthy: Path, which: str, steps: list[tuple[str, int, bytes]]) -> None:
    attack(healthy, which, steps)


def test_a_header_of_very_many_empty_tensors_is_refused_at_once(healthy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "m"))
    (folder / INDEX).unlink()
    for twice in (False, True):
        names = [f"t{i}" for i in range(50_000)] + (["t49999"] if twice else [])
        raw = ("{" + ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in names) + "}").encode()
        (folder / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
        with pytest.raises(DataError, match="appears twice" if twice else "missing"):
            open_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl", ".metadata"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    folder = tmp_path / "m"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="pickled weights are never opened"):
        to(folder, tmp_path / "c")
    save_model(scrambled(ModelConfig(num_hidden_layers=1, **TINY)), folder)
    to(folder, tmp_path / "d")  # a pickle beside safetensors is no part of the model
    assert not canary.exists()
    assert not (tmp_path / "d" / "export" / name).exists()


def test_a_link_out_of_the_folder_is_not_followed(healthy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "m"))
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    for place in ("../model/x.safetensors", "/dev/zero", "..\\x.safetensors", "CON.safetensors/../../x.safetensors"):
        index["weight_map"][name] = place
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(DataError, match="not a file name in the folder"):
            open_model(folder)


def test_a_source_cut_off_while_it_is_read(healthy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy, tmp_path / "m"))
    model = open_model(folder)
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 4000)
    with pytest.raises(DataError, match="cut off"):
        read_all(model)


@pytest.mark.parametrize("flush", range(1, 11))
def test_a_full_disk_leaves_nothing_and_says_so(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush: int
) -> None:
    """ENOSPC at ten places, in the writing thread (C2)."""
    real, calls = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == flush:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        to(healthy, tmp_path / "c", shard_bytes=9_000)
    monkeypatch.undo()
    assert not (tmp_path / "c" / "export").exists()
    again = to(healthy, tmp_path / "c", shard_bytes=9_000)
    assert compare(healthy, again).identical
    assert not [p for p in (tmp_path / "c").iterdir() if p.name.startswith(".export")]


def test_a_disk_that_lies_is_found_out(healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of what arrives on the disk is another: no export, and the file is written anew next time."""
    real = os.pwrite

    def lying(handle: int, data: memoryview, offset: int) -> int:
        wrong = bytearray(data)
        wrong[-1] ^= 1
        return real(handle, wrong, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lying)
        with pytest.raises(EnvironmentProblem, match="read back other bytes"):
            to(healthy, tmp_path / "c")
    assert not (tmp_path / "c" / "export").exists()
    assert compare(healthy, to(healthy, tmp_path / "c")).identical


def killed_at_file(healthy: Path, target: Path, number: int, **fields: Any) -> None:
    """Start a conversion in a process that kills itself while it writes its `number`th file."""
    child = os.fork()
    if child == 0:
        real = write.CheckedFile.write

        def fatal(self: write.CheckedFile, block: torch.Tensor | bytes) -> None:
            if f"-0000{number}-of" in self.path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, block)

        write.CheckedFile.write = fatal  # type: ignore[method-assign]
        to(healthy, target, shard_bytes=9_000, **fields)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("dtype", ["keep", "fp8-block"])
def test_a_killed_conversion_goes_on_where_it_was(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Finished shards are not written again, count in the report, and are read back; the result is the same."""
    straight = to(healthy, tmp_path / "straight", shard_bytes=9_000, dtype=dtype)
    target = tmp_path / "c"
    killed_at_file(healthy, target, 4, dtype=dtype)
    assert not (target / "export").exists()
    written: list[str] = []
    real = write.CheckedFile.close

    def close(self: write.CheckedFile) -> str:
        written.append(self.path.name)
        return real(self)

    monkeypatch.setattr(write.CheckedFile, "close", close)
    run = Run.open(ConvertRecipe(name="c", source=str(healthy), shard_bytes=9_000, dtype=dtype), target)
    with run:
        summary = convert(run.recipe, run)
    shards = sorted(path.name for path in straight.glob("*.safetensors"))
    assert written == shards[3:]
    assert atomic.read_manifest(run.export) == atomic.read_manifest(straight)
    atomic.verify(run.export)
    if dtype != "keep":
        again = Run.open(ConvertRecipe(name="c", source=str(healthy), shard_bytes=9_000, dtype=dtype), tmp_path / "e")
        with again:
            assert summary["quantisation_error"] == convert(again.recipe, again)["quantisation_error"]


def test_what_was_left_of_another_source_is_not_continued(healthy: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(healthy, tmp_path / "m"))
    killed_at_file(source, tmp_path / "c", 3)
    (left,) = (tmp_path / "c").glob(".export.part-*")
    save_model(scrambled(ModelConfig(num_hidden_layers=2, **TINY)).bfloat16(), source, shard_bytes=30_000)
    export = to(source, tmp_path / "c", shard_bytes=9_000)
    assert compare(source, export).identical
    assert not left.exists()


def test_a_finished_shard_that_was_damaged_since_is_found_and_then_written_again(healthy: Path, tmp_path: Path) -> None:
    killed_at_file(healthy, tmp_path / "c", 3)
    (left,) = (tmp_path / "c").glob(".export.part-*")
    shard = next(iter(sorted(left.glob("*.safetensors"))))
    body = bytearray(shard.read_bytes())
    body[-1] ^= 1
    shard.write_bytes(body)
    with pytest.raises(EnvironmentProblem, match="read back other bytes"):
        to(healthy, tmp_path / "c", shard_bytes=9_000)
    assert compare(healthy, to(healthy, tmp_path / "c", shard_bytes=9_000)).identical


def kill_once(healthy: Path, target: Path, delay: float) -> None:
    child = os.fork()
    if child == 0:
        to(healthy, target, shard_bytes=9_000)
        os._exit(0)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.slow
def test_a_hundred_kills_leave_all_or_nothing(healthy: Path, tmp_path: Path) -> None:
    """C2: whatever the moment, the export is absent or complete by its manifest, and the next run succeeds."""
    seen = {True: 0, False: 0}
    for trial in range(100):
        target = tmp_path / f"c{trial}"
        kill_once(healthy, target, 0.002 * trial)
        complete = (target / "export").exists()
        seen[complete] += 1
        if complete:
            atomic.verify(target / "export")
        elif trial % 10 == 0:
            assert compare(healthy, to(healthy, target, shard_bytes=9_000)).identical
    assert seen[False] > 10


def test_mtp_copy_that_differs_is_refused_before_anything_is_published(tmp_path: Path) -> None:
    save_model(scrambled(ModelConfig(num_hidden_layers=1, **TINY)), tmp_path / "m")
    file = TensorFile(tmp_path / "m" / "model.safetensors")
    tensors = {name: file.read(name).clone() for name in file.slots}
    tensors["model.layers.1.embed_tokens.weight"][3, 3] += 1
    write_tensors(file.path, tensors.items())
    with pytest.raises(DataError, match=r"model\.layers\.1\.embed_tokens\.weight' differs"):
        to(tmp_path / "m", tmp_path / "c", to="checkpoint")
    assert not (tmp_path / "c" / "export").exists()
    with pytest.raises(DataError):
        load_model(tmp_path / "m")
