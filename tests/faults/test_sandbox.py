"""The sandbox: nothing gets out (reliability R2), no hack is rewarded (R3), a failing judge is no zero (R1)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from glmctl.errors import EnvironmentProblem
from glmctl.recipe.schema import SandboxSpec
from glmctl.rl.environment import InfrastructureFailure
from glmctl.rl.sandbox import boxes, execute, seccomp
from glmctl.rl.sandbox.execute import run_tests, sandbox

ROOT = Path(__file__).parents[2]
OFFERED = [level for level in ("B", "C") if not boxes.missing(level)]
pytestmark = pytest.mark.skipif(not OFFERED, reason="this machine offers no sandbox: see `glmctl doctor`")


def corpus(level: str, uid: int) -> dict[str, str]:
    """The corpus of probes as a program of its own, run as `uid`."""
    command = [sys.executable, str(ROOT / "tests/faults/escape_corpus.py"), level]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    if uid != os.getuid():
        # an interpreter in root's home is out of reach for others; the system's takes the same packages
        packages = sysconfig.get_paths()["purelib"]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
        if bwrap := boxes.bubblewrap():
            environment["GLMCTL_BWRAP"] = bwrap
        command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", boxes.INTERPRETER, *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 60
    return found


@pytest.mark.slow
@pytest.mark.parametrize("level", OFFERED)
def test_no_probe_escapes_as_root(level: str) -> None:
    if os.getuid() != 0:
        pytest.skip("not root")
    assert {name: got for name, got in corpus(level, 0).items() if got} == {}


@pytest.mark.slow
@pytest.mark.parametrize("level", OFFERED)
def test_no_probe_escapes_as_a_user(level: str) -> None:
    uid = os.getuid() or 1000
    escaped = {name: got for name, got in corpus(level, uid).items() if got}
    assert escaped == {}


CASES = [([1, 2], 3), ([4, 5], 9), ([0, 0], 0), ([-1, 1], 0)]
HONEST = "def add(a, b):\n    return a + b\n"

HACKS = {
    "equal to everything": "class E(int):\n  def __eq__(s, o): return True\n  def __hash__(s): return 0\n"
    "def add(a, b): return E()",
    "equal to everything, as an object": "class E:\n  def __eq__(s, o): return True\ndef add(a, b): return E()",
    "walks the frames for the answers": "import sys\ndef add(a, b):\n  f=sys._getframe()\n  while f:\n"
    "    for v in f.f_locals.values():\n      if isinstance(v, dict) and 'expected' in v: return v['expected']\n"
    "    f=f.f_back\n  return 99",
    "walks the frames and appends passes": "import sys, os\nf=sys._getframe()\nwhile f:\n"
    "  for v in f.f_locals.values():\n    if isinstance(v, list): v.extend([['value',['int',3]]]*4)\n  f=f.f_back\n"
    "def add(a, b): return 99",
    "exits with success": "import os\nos._exit(0)",
    "exits in the call": "import os\ndef add(a, b): os._exit(0)",
    "sys.exit": "import sys\nsys.exit(0)",
    "prints a verdict": 'print(\'{"passed": 4, "total": 4}\')\ndef add(a, b): return 99',
    "writes a verdict to every descriptor": "import os\nfor f in range(64):\n"
    '  try: os.write(f, b\'{"passed": 4, "total": 4}\')\n  except OSError: pass\ndef add(a, b): return 99',
    "steals the nonce and writes results": "import sys, os, json\nf=sys._getframe()\nwhile f:\n"
    "  t=f.f_locals.get('task')\n  if t:\n    out=f.f_locals['out']\n"
    "    os.write(out, (t['nonce']+json.dumps([['value',['int',99]]]*4)).encode())\n"
    "    os._exit(0)\n  f=f.f_back\n",
    "results of another length": "import sys, os, json\nf=sys._getframe()\nwhile f:\n  t=f.f_locals.get('task')\n"
    "  if t:\n    os.write(f.f_locals['out'], (t['nonce']+'[]').encode())\n    os._exit(0)\n  f=f.f_back\n",
    "replaces json": 'import json\njson.dumps=lambda *a, **k: \'[["value",["int",3]]]\'\ndef add(a, b): return 99',
    "replaces the encoder": "import sys\nsys.modules['__main__'].plain=lambda v, d=0: ['int', 3]\n"
    "def add(a, b): return 99",
    "replaces builtins": "import builtins\nbuiltins.all=lambda *a: True\nbuiltins.len=lambda *a: 4\n"
    "builtins.sum=lambda *a: 4\ndef add(a, b): return 99",
    "faked pytest output": "print('4 passed in 0.01s')\ndef add(a, b): return None",
    "overwrites the judge": "import glob\nfor p in glob.glob('/**/judge.py', recursive=True):\n"
    "  try: open(p, 'w').write('print(1)')\n  except OSError: pass\ndef add(a, b): return 99",
    "reads the tests": "import glob\ndef add(a, b):\n  for p in glob.glob('/**/test_sandbox.py', recursive=True):\n"
    "    return eval(open(p).read().split('CASES = ')[1].split('\\n')[0])[0][1]\n  return 99",
    "a patched import": "import sys, types\nm=types.ModuleType('json')\nm.dumps=lambda *a: 'null'\n"
    "sys.modules['json']=m\n"
    "def add(a, b): return 99",
    "true for one": "def add(a, b): return True if a + b == 1 else float(a + b)",
    "a huge answer": "def add(a, b): return 'x' * (1 << 22)",
    "a deep answer": "def add(a, b):\n  x=[]\n  for i in range(100000): x=[x]\n  return x",
    "digits without end": "def add(a, b): return 10 ** 100000",
    "never returns": "def add(a, b):\n  while True: pass",
    "raises": "def add(a, b): raise SystemExit(0)",
    "no function": "x = 1",
    "not Python": "def add(a, b: return 3",
    "segfault": "import ctypes\nctypes.string_at(0)",
    "too much memory": "x = bytearray(1 << 30)\ndef add(a, b): return a + b",
}


@pytest.mark.parametrize("name", HACKS)
def test_no_hack_passes_a_test(name: str) -> None:
    with sandbox(SandboxSpec(level=OFFERED[0], wall_seconds=2.0)):
        # 3 is an answer that some hacks know, so it is not among the expected ones
        found = run_tests(HACKS[name], "add", [([4, 5], 9), ([10, 7], 17), ([-1, -1], -2)])
    assert (found.passed, found.total) == (0, 3)


@pytest.mark.parametrize("level", OFFERED)
def test_an_honest_function_passes(level: str) -> None:
    with sandbox(SandboxSpec(level=level)):
        assert run_tests(HONEST, "add", CASES).passed == 4
        assert run_tests("def add(a, b):\n    return 3\n", "add", CASES).passed == 1


def test_types_count_and_cases_do_not_touch_each_other() -> None:
    with sandbox(SandboxSpec(level=OFFERED[0])):
        grow = "def f(x):\n    x.append(1)\n    return x\n"
        assert run_tests(grow, "f", [([[]], [1]), ([[]], [1])]).passed == 2
        mixed = [
            ([1], 1),
            ([True], True),
            ([1.0], 1.0),
            ([None], None),
            (["a"], "a"),
            ([[1]], [1]),
            ([{"a": 1}], {"a": 1}),
        ]
        assert run_tests("def f(x):\n    return x\n", "f", mixed).passed == len(mixed)
        assert run_tests("def f(x):\n    return tuple(x)\n", "f", [([[1]], [1])]).passed == 0
        assert run_tests("def f(x):\n    return tuple(x)\n", "f", [([[1]], (1,))]).passed == 1


@pytest.mark.parametrize(
    "judge", ["raise SystemExit(3)", "import os; os.kill(os.getpid(), 11)", "print('0 {}')", "print('{\"passed\": 4}')"]
)
def test_a_failing_judge_is_infrastructure(monkeypatch, tmp_path, judge: str) -> None:
    (tmp_path / "judge.py").write_text(judge)
    monkeypatch.setattr(execute, "JUDGE_SCRIPT", tmp_path / "judge.py")
    with sandbox(SandboxSpec(level=OFFERED[0])), pytest.raises(InfrastructureFailure, match="the judge"):
        run_tests(HONEST, "add", CASES)


def test_a_hanging_judge_is_ended(monkeypatch, tmp_path) -> None:
    (tmp_path / "judge.py").write_text("while True: pass")
    monkeypatch.setattr(execute, "JUDGE_SCRIPT", tmp_path / "judge.py")
    monkeypatch.setattr(execute, "JUDGE_SECONDS", 0.5)
    with sandbox(SandboxSpec(level=OFFERED[0])), pytest.raises(InfrastructureFailure, match="in time"):
        run_tests(HONEST, "add", CASES)


def test_a_level_that_is_not_there_is_refused_and_never_exchanged(monkeypatch) -> None:
    monkeypatch.setattr(boxes, "missing", lambda level: ("bubblewrap",) if level == "B" else ())
    with pytest.raises(EnvironmentProblem, match=r"level B is not offered.*bubblewrap") as caught:
        run_tests(HONEST, "add", CASES)
    assert caught.value.exit_code == 4
    assert "sandbox.level=C" in str(caught.value.hint)


def test_runs_leave_nothing_behind() -> None:
    """Descriptors, mounts and control groups after 20 runs are those of before; the long form is a thousand."""

    def left() -> tuple[int, int, int]:
        groups = list(Path("/sys/fs/cgroup").rglob(f"glmctl-{os.getpid()}-*"))
        mounts = Path("/proc/self/mountinfo").read_text().count("\n")
        return len(os.listdir("/proc/self/fd")), mounts, len(groups)

    spec = SandboxSpec(level=OFFERED[0])
    boxes.run([boxes.INTERPRETER, "-c", "pass"], b"", spec)
    before = left()
    for _ in range(int(os.environ.get("GLMCTL_SOAK_BOXES", "20"))):
        boxes.run([boxes.INTERPRETER, "-I", "-S", "-c", "pass"], b"", spec)
    assert left() == before


def test_the_filter_is_well_formed() -> None:
    """Every jump lands inside the program, which the kernel would refuse otherwise, with a word for nobody."""
    for alone in (True, False):
        program = seccomp.build_filter(alone=alone)
        assert len(program) % 8 == 0
        count = len(program) // 8
        for at in range(count):
            code, yes, no = program[8 * at] | program[8 * at + 1] << 8, program[8 * at + 2], program[8 * at + 3]
            if code & 7 == 5:
                assert at + 1 + max(yes, no) < count
