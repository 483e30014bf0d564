"""Building the native step: once, whole, in the cache, with one clear line where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmctl.errors import EnvironmentProblem
from glmctl.kernels import native_build
from glmctl.kernels.cpu import library as native_library
from glmctl.kernels.native_build import NativeLibrary


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has not opened the library yet."""
    monkeypatch.setenv("GLMCTL_CACHE", str(tmp_path / "cache"))
    native_library.library.cache_clear()
    yield tmp_path / "cache" / "native"
    native_library.library.cache_clear()


def fake_compiler(folder: Path, body: str) -> Path:
    path = folder / "fake-cxx"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo fake 1; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return path


def test_no_compiler_is_one_line_that_names_the_way_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(EnvironmentProblem, match=r"no C\+\+ compiler") as problem:
        native_library.library()
    assert "install" in str(problem.value.hint)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = fake_compiler(tmp_path, "echo 'x.cpp:1: error: no such instruction' >&2; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EnvironmentProblem, match="no such instruction"):
        native_library.library()
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob(".build-*"))


def test_a_compiler_that_makes_nothing_useful_is_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = fake_compiler(tmp_path, 'for last; do :; done; echo junk > "$last"')
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EnvironmentProblem, match="cannot be opened"):
        native_library.library()
    assert not list(cache.glob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("GLMCTL_CACHE", str(blocker))
    native_library.library.cache_clear()
    with pytest.raises(EnvironmentProblem, match="file/native") as problem:
        native_library.library()
    assert "GLMCTL_CACHE" in str(problem.value.hint)


def test_another_compiler_source_or_processor_is_another_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = str(fake_compiler(tmp_path, "exit 1"))
    source = tmp_path / "step.cpp"
    source.write_text("int one;")
    step = NativeLibrary("step", "a step", tmp_path, "step.cpp")
    keys = {step.key(compiler, ["-O3"]), step.key(compiler, ["-O0"])}
    source.write_text("int two;")
    keys.add(step.key(compiler, ["-O3"]))
    monkeypatch.setattr(native_build, "_processor", lambda: "another")
    keys.add(step.key(compiler, ["-O3"]))
    assert len(keys) == 4


PROCESS = "from glmctl.kernels.cpu.library import library; print(library().glm_lanes())"


@pytest.fixture
def quick_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compiles empty functions of the right names instead of the decoder; returns the log of its runs."""
    try:
        real = native_library.find_compiler()
    except EnvironmentProblem as problem:
        pytest.skip(str(problem))
    functions = "".join(f"int {name}() {{ return 7; }}\n" for name in native_library._SIGNATURES)
    (tmp_path / "stub.cpp").write_text(f'extern "C" {{\n{functions}}}\n')
    log = tmp_path / "log"
    body = f'echo run >> {log}; for last; do :; done; exec {real} -shared -fPIC {tmp_path}/stub.cpp -o "$last"'
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, body)))
    return log


def test_processes_that_start_at_once_compile_once(cache: Path, quick_compiler: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", PROCESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    told = [process.communicate() for process in started]
    assert [out.strip() for out, _ in told] == ["7"] * 4, told
    assert quick_compiler.read_text().count("run") == 1
    assert sum("compiling" in err for _, err in told) == 1
    assert len(list(cache.glob("*.so"))) == 1
    assert not list(cache.glob(".build-*"))


def test_a_damaged_file_is_built_again(cache: Path, quick_compiler: Path) -> None:
    cache.mkdir(parents=True)
    (cache / f"step-{native_library.STEP.key(native_library.find_compiler(), native_library.flags())}.so").write_bytes(
        b"junk"
    )
    assert native_library.library().glm_lanes() == 7
    assert quick_compiler.read_text().count("run") == 1
