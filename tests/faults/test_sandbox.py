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
from glmctl.rl.sandbox import boxes, execute, judge, seccomp
from glmctl.rl.sandbox.execute import run_tests, sandbox

ROOT = Path(__file__).parents[2]
OFFERED = [level for level in ("B", "C") if not boxes.missing(level)]
pytestmark = pytest.mark.skipif(not OFFERED, reason="this machine offers no sandbox: see `glmctl doctor`")


def run_as(uid: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with `words`, run as `uid`, with this checkout to import."""
    command = [sys.executable, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    if uid != os.getuid():
        # an interpreter in root's home is out of reach for others; the system's takes the same packages
        packages = sysconfig.get_paths()["purelib"]
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"}
        if bwrap := boxes.bubblewrap():
            environment["GLMCTL_BWRAP"] = bwrap
        command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", boxes.INTERPRETER, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def corpus(level: str, uid: int, *names: str) -> dict[str, str]:
    """The corpus of probes, or those named, as a program of its own, run as `uid`."""
    done = run_as(uid, str(ROOT / "tests/faults/escape_corpus.py"), level, *names)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= (60 if not names else len(names))
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


def test_probes_that_the_kernel_or_the_host_answers_can_fail() -> None:
    """Where nothing holds them they escape, so that in a box their silence says something."""
    names = {
        "symlink swap in outputs",
        "symlink swap of the folder of outputs",
        "/proc/self/mem",
        "many files",
        "deep recursion",
        "terminal escapes",
    }
    found = corpus("unsafe-none", os.getuid(), *names)
    assert {name for name, got in found.items() if got} >= names


CASES = [([1, 2], 3), ([4, 5], 9), ([0, 0], 0), ([-1, 1], 0)]
HONEST = "def add(a, b):\n    return a + b\n"

WRITES = """import json, os, sys
frame = sys._getframe()
while 'task' not in frame.f_locals: frame = frame.f_back
task = frame.f_locals['task']
def write(text):
    os.write(frame.f_locals['out'], text.encode())
    os._exit(1)
"""
"""a candidate that writes on the descriptor of the results"""

# a masked sample is no zero, so a sample that is about to fail would like to be one
MASKING = {
    "fails like a launcher": "import os, sys\nfor p in ('self', '1', os.getppid()):\n  for n in range(64):\n    try:\n"
    "      f=os.open(f'/proc/{p}/fd/{n}', os.O_WRONLY|os.O_NONBLOCK)\n"
    "      os.write(f, b'launcher: no memory\\nbwrap: no memory\\n')\n    except OSError: pass\n"
    "sys.stderr.write('launcher: no memory')\nos._exit(1)",
    "takes the nonce back": "import os\nfor n in range(64):\n  try:\n"
    "    f=os.open(f'/proc/self/fd/{n}', os.O_RDONLY|os.O_NONBLOCK)\n    while os.read(f, 65536): pass\n"
    "  except OSError: pass\nos._exit(1)",
    "fails like an interpreter": "import os\nos.write(2, b'Traceback (most recent call last):\\n')\nos._exit(1)",
    "ends the box": "import os\nfor p in (os.getppid(), 1, -1):\n  try: os.kill(p, 9)\n  except OSError: pass",
    "results that end the judge": WRITES + "write('['+'['*991+'1'+']'*991+',1,1]')",
    "half a character": WRITES + "os.write(frame.f_locals['out'], bytes(range(128, 256))); write('[')",
}

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
    "writes results itself": WRITES + "write(json.dumps([['value',['int',99]]]*3))",
    "steals the nonce and writes results": WRITES + "write(task['nonce']+json.dumps([['value',['int',99]]]*3))",
    "results of another length": WRITES + "write('[]')",
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


@pytest.mark.parametrize("name", [*HACKS, *MASKING])
def test_no_hack_passes_a_test(name: str) -> None:
    with sandbox(SandboxSpec(level=OFFERED[0], wall_seconds=2.0)):
        # 3 is an answer that some hacks know, so it is not among the expected ones
        found = run_tests({**HACKS, **MASKING}[name], "add", [([4, 5], 9), ([10, 7], 17), ([-1, -1], -2)])
    assert (found.passed, found.total) == (0, 3)


@pytest.mark.parametrize("level", OFFERED)
def test_nor_is_one_masked_that_owns_the_pipes(level: str) -> None:
    """Without root the candidate runs as our own user, which may open either end of any pipe that it can name."""
    program = (
        "import json, sys\n"
        "from glmctl.recipe.schema import SandboxSpec\n"
        "from glmctl.rl.sandbox.execute import run_tests, sandbox\n"
        "with sandbox(SandboxSpec(level=sys.argv[1], wall_seconds=2.0)):\n"
        "  for code in json.loads(sys.argv[2]): print(run_tests(code, 'add', [([4, 5], 9)]).passed)\n"
    )
    done = run_as(os.getuid() or 1000, "-c", program, level, json.dumps([HONEST, *MASKING.values()]))
    assert done.stdout.split() == ["1", *["0"] * len(MASKING)], done.stderr


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


def above_nofile(*args: object, **kwargs: object) -> dict[str, int]:
    """A limit that the kernel refuses even to root."""
    return {"RLIMIT_NOFILE": 1 << 40}


@pytest.mark.parametrize("level", OFFERED)
@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (boxes, "_rlimits", above_nofile, "launcher: .*maximum limit"),
        (boxes, "limits_inside", above_nofile, "ValueError: .*maximum limit"),
        (boxes, "limits_inside", lambda spec: {"RLIMIT_OF_NOTHING": 1}, "AttributeError"),
        (boxes, "INTERPRETER", "/usr/bin/python-that-is-not-there", "No such file"),
        (boxes, "INTERPRETER", "/usr/bin/false", "exit code 1"),
        (boxes, "INTERPRETER", "/usr/bin/echo", "exit code 0"),
        (sys, "executable", "/nonexistent/python", "No such file"),
    ],
)
def test_a_box_that_fails_before_the_candidates_code_is_infrastructure(
    monkeypatch: pytest.MonkeyPatch, level: str, owner: object, name: str, value: object, said: str
) -> None:
    monkeypatch.setattr(owner, name, value)
    with sandbox(SandboxSpec(level=level)), pytest.raises(InfrastructureFailure, match=said):
        run_tests(HONEST, "add", CASES)


def test_a_box_that_is_not_ready_in_time_is_infrastructure() -> None:
    """The greeting is waited for with stdin open, or this program would get to the end of it and greet."""
    program = "import sys; sys.stdin.readline(); sys.stdin.read(); sys.stdout.write('ready')"
    argv = [boxes.INTERPRETER, "-I", "-S", "-c", program]
    spec = SandboxSpec(level=OFFERED[0], wall_seconds=1.0)
    with pytest.raises(InfrastructureFailure, match="not ready within 1 s"):
        boxes.run(argv, b"line\n", spec, greeting=b"ready")
    assert boxes.run(argv, b"line\n", spec).output == b"ready"


def test_the_candidates_code_is_loaded_when_stdin_ends() -> None:
    task = {"code": HONEST, "entry": "add", "calls": ["[1, 2]"], "nonce": "n" * 32, "rlimits": {}}
    process = subprocess.Popen(
        [boxes.INTERPRETER, "-I", "-S", str(ROOT / "glmctl/rl/sandbox/candidate.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(task).encode() + b"\n")
    process.stdin.flush()
    assert process.stdout.read(32) == b"n" * 32
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert process.communicate()[0] == b'[["value", ["int", 3]]]'


def test_no_results_end_the_judge() -> None:
    """A judge that dies masks the sample, so whatever a candidate writes, it must come to a verdict."""
    for depth in range(1, 1100):
        for start, end in ("[", "]"), ('{"a":', "}"):
            output = f"n[{start * depth}1{end * depth}]"
            assert judge.verdict(output, "n", [["int", 1]]) == {"passed": 0, "total": 1}


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
