"""Attempts to leave the sandbox, run as a program: `escape_corpus.py LEVEL [PROBE...]` prints {probe: what it got}.

A probe is code that leaves a truthy `got` when it reached what it must not. Probes of one kind run in one box; those
that would take the box down with them each have their own. `HOST` is what the host put in their way. Some escapes only
the host can see: a file that appears on its disk, a byte on its terminal, a process that lives on.

Level `unsafe-none` with named probes shows that these can get something. Never all of them: some would harm the user
that they run as.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glmctl.recipe.schema import SandboxSpec
from glmctl.rl.sandbox import boxes

MEMORY_MB = 256

QUIET = {
    # ---- network
    "tcp to a host listener": "s=socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', HOST['tcp'])); got=1",
    "tcp over ipv6": "s=socket.socket(socket.AF_INET6); s.settimeout(1); s.connect(('::1', HOST['tcp6'])); got=1",
    "udp": "s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', HOST['udp'])); got=1",
    "raw socket": "s=socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); got=1",
    "packet socket": "s=socket.socket(17, socket.SOCK_RAW); got=1",
    "netlink": "s=socket.socket(16, socket.SOCK_RAW, 0); got=1",
    "vsock": "s=socket.socket(40, socket.SOCK_STREAM); got=1",
    "bluetooth or alg": "s=socket.socket(38, socket.SOCK_SEQPACKET); got=1",
    "unix socket by path": "s=socket.socket(socket.AF_UNIX); s.connect(HOST['unix']); got=1",
    "abstract unix socket": "s=socket.socket(socket.AF_UNIX); s.connect('\\0'+HOST['abstract']); got=1",
    "listen": "s=socket.socket(); s.bind(('0.0.0.0', 0)); s.listen(); got=1",
    "name look-up": "got=socket.getaddrinfo('example.com', 80)",
    "dns server": "s=socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('8.8.8.8', 53)); got=1",
    # ---- files of the host
    "world-readable secret": "got=CANARY in open(HOST['secret']).read()",
    "secret through /proc/1/root": "got=CANARY in open('/proc/1/root'+HOST['secret']).read()",
    "secret through O_PATH": "f=os.open(HOST['secret'], os.O_PATH); got=CANARY in open(f'/proc/self/fd/{f}').read()",
    "secret through a symlink":
        "os.symlink(HOST['secret'], '/tmp/link'); got=CANARY in open('/tmp/link').read()",
    "secret through a hard link": "os.link(HOST['secret'], '/tmp/hard'); got=CANARY in open('/tmp/hard').read()",
    "secret through dot-dot": "got=CANARY in open('/usr/../'+HOST['secret']).read()",
    "open by handle": "got=libc.syscall(304, -100, b'x'*16, 0)>=0",
    "password file": "got='root:' in open('/etc/shadow').read()",
    "users": "got='root:' in open('/etc/passwd').read()",
    "home of root": "got=os.listdir('/root')",
    "ssh keys": "got=os.listdir('/etc/ssh')",
    "the checkout": "got=os.listdir(HOST['checkout'])",
    "write below /usr": "open('/usr/lib/glmctl-probe','w').write('x'); got=1",
    "write below /": "open('/glmctl-probe','w').write('x'); got=1",
    "write into /etc": "open('/etc/glmctl-probe','w').write('x'); got=1",
    "write next to the secret": "open(HOST['secret']+'.new','w').write('x'); got=1",
    "append to the secret": "open(HOST['secret'],'a').write('x'); got=1",
    "truncate the secret": "os.truncate(HOST['secret'],0); got=1",
    "delete the secret": "os.unlink(HOST['secret']); got=1",
    "rename the secret": "os.rename(HOST['secret'], HOST['secret']+'.moved'); got=1",
    "chmod the secret": "os.chmod(HOST['secret'], 0o777); got=1",
    "block device": "got=open('/dev/vda','rb').read(1)",
    "make a device": "os.mknod('/tmp/dev', 0o666|0o020000, os.makedev(1,1)); got=open('/tmp/dev','rb').read(1)",
    "kernel memory": "got=open('/dev/mem','rb').read(1)",
    "kernel messages": "got=open('/dev/kmsg').read(1)",
    "host shared memory": "got=[n for n in os.listdir('/dev/shm') if n==HOST['shm']]",
    # what a harness does that collects files: looks, and then opens what is no longer what it looked at
    "symlink swap in outputs":
        "import shutil; place='/tmp/outputs-'+CANARY; os.mkdir(place); out=place+'/answer'; open(out, 'w').write('x')\n"
        "plain=os.path.isfile(out) and not os.path.islink(out)\n"
        "os.symlink(HOST['secret'], place+'/link'); os.rename(place+'/link', out)\n"
        "try: got=plain and CANARY in open(out).read()\n"
        "finally: shutil.rmtree(place)",
    "symlink swap of the folder of outputs":
        "place='/tmp/folder-'+CANARY; os.mkdir(place); plain=os.path.isdir(place); os.rmdir(place)\n"
        "os.symlink(os.path.dirname(HOST['secret']), place)\n"
        "try: got=plain and CANARY in open(place+'/secret').read()\n"
        "finally: os.unlink(place)",
    # forced writes pass by the page's protection: into the file itself, if a kernel is broken or the file was ours
    "/proc/self/mem":
        "libc.mmap.restype=ctypes.c_void_p; libc.mmap.argtypes=[ctypes.c_void_p]+[ctypes.c_long]*5\n"
        "for path, mode, pages, share in ((HOST['secret'], os.O_RDWR, 3, 1), ('/usr/lib/os-release', 0, 1, 1),\n"
        "                                 ('/usr/lib/os-release', 0, 1, 2)):\n"
        "  try:\n"
        "    f=os.open(path, mode); old=os.pread(f, 1, 0); at=libc.mmap(None, 4096, pages, share, f, 0)\n"
        "    mem=os.open('/proc/self/mem', os.O_RDWR); os.pwrite(mem, b'!', at)\n"
        "    got=got or os.pread(os.open(path, os.O_RDONLY), 1, 0)==b'!'; os.pwrite(mem, old, at)\n"
        "  except OSError: pass",
    # ---- kernel interfaces
    "sysctl": "open('/proc/sys/vm/stat_interval','w').write('1'); got=1",
    "core pattern": "open('/proc/sys/kernel/core_pattern','w').write('|/bin/sh'); got=1",
    "sysrq": "open('/proc/sysrq-trigger','w').write('h'); got=1",
    "cgroup release agent": "open('/sys/fs/cgroup/release_agent','w').write('/x'); got=1",
    "cgroup tree": "got=os.listdir('/sys/fs/cgroup')",
    "mount": "got=libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)==0",
    "umount": "got=libc.umount2(b'/proc', 2)==0",
    "chroot": "os.chroot('/tmp'); got=1",
    "pivot_root": "got=libc.syscall(155, b'/', b'/tmp')==0",
    "user namespace": "got=libc.unshare(0x10000000)==0",
    "network namespace": "got=libc.unshare(0x40000000)==0",
    "clone into a user namespace": "p=libc.syscall(56, 0x10000000|17, 0, 0, 0, 0); p==0 and os._exit(0); got=p>0",
    "clone3": "got=libc.syscall(435, b'\\0'*88, 88)>0 or ctypes.get_errno()!=38",
    "setns": "f=os.open('/proc/1/ns/net', 0); got=libc.setns(f, 0)==0",
    "io_uring": "got=libc.syscall(425, 1, b'\\0'*120)>=0",
    "bpf": "got=libc.syscall(321, 0, b'\\0'*64, 64)>=0",
    "perf events": "got=libc.syscall(298, b'\\0'*128, 0, -1, -1, 0)>=0",
    "userfaultfd": "got=libc.syscall(323, 1)>=0",
    "keyring": "got=libc.syscall(250, 0, -3, 1)>=0",
    "kernel module": "got=libc.syscall(175, b'', 0, b'')==0",
    "kexec": "got=libc.syscall(246, 0, 0, 0, 0)==0",
    "set the clock": "time.clock_settime(time.CLOCK_REALTIME, time.time()); got=1",
    "host name": "socket.sethostname('probe'); got=1",
    "32-bit calls": "got=libc.syscall(0x40000000|39)>0",
    # ---- other processes
    "signal a host process": "os.kill(HOST['pid'], 0); got=1",
    "signal the trainer": "os.kill(HOST['trainer'], 0); got=1",
    "ptrace a host process": "got=libc.ptrace(16, HOST['pid'], 0, 0)==0",
    "memory of a host process": "got=open(f\"/proc/{HOST['pid']}/mem\",'rb')",
    "read across processes": "got=libc.process_vm_readv(HOST['pid'], b'\\0'*16, 1, b'\\0'*16, 1, 0)>=0",
    "environment of the trainer": "got=CANARY in open(f\"/proc/{HOST['trainer']}/environ\").read()",
    "command line of a host process": "got='sleep' in open(f\"/proc/{HOST['pid']}/cmdline\").read()",
    "pidfd": "got=libc.syscall(434, HOST['pid'], 0)>=0",
    "priority of a host process": "os.setpriority(0, HOST['pid'], 19); got=1",
    "limits of a host process":
        "import resource; resource.prlimit(HOST['pid'], resource.RLIMIT_CPU, (1,1)); got=1",
    # ---- what leaks in
    "environment": "got=[k for k, v in os.environ.items() if CANARY in v]",
    "inherited descriptors":
        "got=[f for f in os.listdir('/proc/self/fd') if int(f)>2 and 'secret' in os.readlink('/proc/self/fd/'+f)]",
    "uid 0": "got=0 in os.getresuid()+os.getresgid()",
    "setuid back": "os.setuid(0); got=1",
    "groups": "got=[g for g in os.getgroups() if g in (0, 27, 44, 999)]",
    "capabilities": "got=int(next(l for l in open('/proc/self/status') if l.startswith('CapEff')).split()[1],16)",
    "new privileges": "got=libc.prctl(39,0,0,0,0)!=1",
    "setuid program": "got=os.popen('/usr/bin/su -c id 2>/dev/null </dev/null').read()",
    "type into the terminal": "import fcntl; fcntl.ioctl(0, 0x5412, b'x'); got=1",
    "terminal of the session": "got=os.open('/dev/tty', os.O_RDWR)",
    "raise the limits":
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (4096,4096)); got=1",
}  # fmt: skip

LOUD = {
    "fork bomb": "n=0\ntry:\n  while n<400:\n    p=os.fork()\n    if p==0: time.sleep(9); os._exit(0)\n    n+=1\n"
    "except OSError: pass\ngot=n>=64",
    "memory": "x=[]\nfor i in range(64): x.append(bytearray(16<<20))\ngot=1",
    "memory in many processes": "for i in range(8):\n  if os.fork()==0:\n    x=bytearray(150<<20); time.sleep(1)\n"
    "    os._exit(0)\nn=[os.waitstatus_to_exitcode(os.wait()[1]) for i in range(8)]\ngot=n.count(0)==8",
    "endless output": "os.write(1,b'')\nwhile True: os.write(1, b'x'*65536)",
    "closed outputs": "os.close(1); os.close(2)\ntime.sleep(60)",
    "ignored signals": "import signal\nfor s in range(1,32):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\ntime.sleep(60)",
    "spinning": "while True: pass",
    "daemon": "if os.fork()==0:\n  os.setsid()\n  if os.fork()==0:\n    time.sleep(60)\n  os._exit(0)\n",
    "kill everything": "os.kill(-1, 9)",
    "full disk": "import itertools\ntry:\n  for i in itertools.count():\n    f=open(f'/tmp/{i}','wb')\n"
    "    f.write(b'x'*(8<<20)); f.close()\n    if i>40: break\nexcept OSError: pass\n"
    "got=sum(os.path.getsize('/tmp/'+n) for n in os.listdir('/tmp'))>200<<20",
    # the host looks for them on its own disks: inside, they are the box's own affair
    "many files": "for place in ('/tmp', '/var/tmp', '/dev/shm', '/run', os.path.dirname(HOST['secret'])):\n  try:\n"
    "    for n in range(HOST['files']): open(f'{place}/{CANARY}-{n}','w').close()\n  except OSError: pass\n",
    # each frame takes memory, and the limit must end it; it looks on the way, for it may end in a segmentation fault
    "deep recursion": "import resource\nsys.setrecursionlimit(10**9)\ndef f(n):\n"
    "  if n%10000==0 and resource.getrusage(0).ru_maxrss>HOST['memory_mb']<<10: os.write(1, b'GOT'); os._exit(0)\n"
    "  f(n+1)\nf(1)",
    # they are data in the output, and harm where a terminal shows them: the host listens on one
    "terminal escapes": "text=b'\\x1b]0;owned\\x07\\x1b[2J'\n"
    "for path in ('/dev/tty', HOST['tty'], *(f'/proc/{os.getppid()}/fd/{n}' for n in (0, 2))):\n"
    "  try: os.open(path, os.O_WRONLY|os.O_NOCTTY|os.O_NONBLOCK)\n  except OSError: pass\n"
    "for f in range(256):\n  try: os.write(f, text)\n  except OSError: pass\n",
}  # fmt: skip

PRELUDE = """import ctypes, json, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
CANARY, HOST, PROBES = json.loads(sys.stdin.readline())
"""
LOOP = """
found = {}
for name, code in PROBES.items():
    scope = dict(globals(), got=0)
    try:
        exec(code, scope)
        found[name] = str(scope["got"]) if scope["got"] else ""
    except Exception as error:
        found[name] = ""
os.write(1, json.dumps(found).encode())
os._exit(0)
"""


def marked(needle: str) -> list[str]:
    """Processes of the machine whose command line holds `needle`."""
    hits = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if needle in (folder / "cmdline").read_text(errors="replace") and int(folder.name) != os.getpid():
                hits.append(folder.name)
        except OSError:
            continue
    return hits


def shown(terminal: int) -> bytes:
    """What has been written to the other side of a terminal."""
    return os.read(terminal, 1 << 16) if select.select([terminal], [], [], 0)[0] else b""


@contextmanager
def sitting_at(terminal: int) -> Iterator[None]:
    """Its descriptors 0 and 2 inside the `with`, as in a user's shell; 1 is where the findings go."""
    kept = {descriptor: os.dup(descriptor) for descriptor in (0, 2)}
    for descriptor in kept:
        os.dup2(terminal, descriptor)
    try:
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def left_files(canary: str, place: Path) -> list[Path]:
    """Files on the host's disks that a probe named after the canary; they are removed."""
    places = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/run"), place)
    found = [path for folder in places for path in folder.glob(f"{canary}-*")]
    for path in found:
        path.unlink()
    return found


def main(level: str, names: list[str]) -> None:
    """Set the scene, run every probe (or those named), look at what is left."""
    quiet = {name: code for name, code in QUIET.items() if not names or name in names}
    loud = {name: code for name, code in LOUD.items() if not names or name in names}
    unprotected = level == "unsafe-none"
    assert names or not unprotected, "all of them, unprotected, would harm the user they run as"
    canary = "canary-" + os.urandom(8).hex()
    os.environ["GLMCTL_PROBE"] = canary
    place = Path(tempfile.mkdtemp(prefix="escape-"))
    place.chmod(0o777)
    secret = place / "secret"
    secret.write_text(canary)
    secret.chmod(0o666)
    os.set_inheritable(os.open(secret, os.O_RDONLY), True)
    listeners = {}
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6), ("unix", socket.AF_UNIX)):
        listener = socket.socket(family)
        listener.bind(str(place / "socket") if name == "unix" else ("::1" if name == "tcp6" else "127.0.0.1", 0))
        listener.listen()
        listeners[name] = listener
    (place / "socket").chmod(0o777)
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + canary)
    abstract.listen()
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    shm = Path("/dev/shm") / canary
    shm.write_text("x")
    sleeper = subprocess.Popen(["sleep", "300"])
    screen, terminal = os.openpty()
    os.chmod(os.ttyname(terminal), 0o666)
    host = {
        "tcp": listeners["tcp"].getsockname()[1], "tcp6": listeners["tcp6"].getsockname()[1],
        "udp": udp.getsockname()[1], "unix": str(place / "socket"), "abstract": canary, "secret": str(secret),
        "shm": canary, "pid": sleeper.pid, "trainer": os.getpid(), "checkout": str(Path(__file__).parents[2]),
        "tty": os.ttyname(terminal), "memory_mb": MEMORY_MB, "files": 100 if unprotected else 100_000,
    }  # fmt: skip
    memory_mb = 2 * MEMORY_MB if unprotected else MEMORY_MB
    spec = SandboxSpec(level=level, wall_seconds=3.0, memory_mb=memory_mb, processes=32)  # type: ignore[arg-type]
    limits = (
        "import resource\n"
        "for n, v in json.loads(sys.argv[1]).items():\n"
        "  resource.setrlimit(getattr(resource, n), (v, v))\n"
    )
    inside = json.dumps(boxes.limits_inside(spec))

    def run(code: str, probes: dict[str, str]) -> boxes.Finished:
        argv = [boxes.INTERPRETER, "-I", "-S", "-c", PRELUDE + limits + code, inside, canary]
        return boxes.run(argv, json.dumps([canary, host, probes]).encode() + b"\n", spec)

    try:
        done = run(LOOP, quiet)
        found = json.loads(done.output)
        assert found.keys() == quiet.keys(), done.errors
        for name, code in loud.items():
            began = time.monotonic()
            with sitting_at(terminal):
                done = run(code + "\nimport json\nif 'got' in globals() and got: os.write(1, b'GOT')\n", {})
            seconds = time.monotonic() - began
            found[name] = "GOT" if done.output.endswith(b"GOT") else ""
            if seconds > spec.wall_seconds + 1.5:
                found[name] = f"held the run for {seconds:.1f} s"
            if survivors := marked(canary):
                found[name] = f"left processes {survivors}"
            if text := shown(screen):
                found[name] = f"wrote {text[:40]!r} to a terminal"
            if files := left_files(canary, place):
                found[name] = f"left {len(files)} files, such as {files[0]}"
        if secret.read_text() != canary or oct(secret.stat().st_mode)[-3:] != "666":
            found["the secret is as it was"] = "changed"
        if sleeper.poll() is not None:
            found["the host's process lives"] = "killed"
        extra = sorted(p.name for p in place.iterdir() if p.name not in ("secret", "socket"))
        found["no host file is left"] = " ".join(extra)
        found["no control group is left"] = " ".join(
            str(p) for p in Path("/sys/fs/cgroup").rglob(f"glmctl-{os.getpid()}-*")
        )
        found["no thread is left"] = str(threading.active_count() - 1 or "")
        print(json.dumps(found))
    finally:
        sleeper.kill()
        sleeper.wait()
        shm.unlink()
        shutil.rmtree(place)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
