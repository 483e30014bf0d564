"""A seccomp filter in classic BPF, assembled here: what a sandboxed candidate may not ask of the kernel.

x86-64 only; on another architecture the levels that need it are not offered. Refused calls return EPERM, except
clone3, whose flags a filter cannot read: it "does not exist" (ENOSYS), so that libc falls back to clone, whose it can.
"""

from __future__ import annotations

import struct

ARCHITECTURE = "x86_64"
_AUDIT_ARCH = 0xC000003E
_X32 = 0x40000000

# no legitimate solution of a programming exercise needs these; several are how containers are left
_DENIED = {
    "ptrace": 101, "syslog": 103, "personality": 135, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163,
    "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
    "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "quotactl": 179, "clock_settime": 227, "mbind": 237, "kexec_load": 246, "add_key": 248, "request_key": 249,
    "keyctl": 250, "migrate_pages": 256, "unshare": 272, "move_pages": 279, "perf_event_open": 298,
    "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310,
    "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320, "bpf": 321,
    "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434,
    "pidfd_getfd": 438, "mount_setattr": 442, "quotactl_fd": 443,
    # every socket family at once: vsock and netlink are in no network namespace. socketpair stays
    "socket": 41,
}  # fmt: skip
_SIGNALS = {"kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "pidfd_send_signal": 424}
# what Landlock leaves open on the files and processes of the same user
_METADATA = {
    "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "utime": 132, "setpriority": 141,
    "sched_setparam": 142, "sched_setscheduler": 144, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
    "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "sched_setaffinity": 203, "utimes": 235,
    "ioprio_set": 251, "fchownat": 260, "futimesat": 261, "fchmodat": 268, "utimensat": 280, "sched_setattr": 314,
    "fchmodat2": 452,
}  # fmt: skip
_CLONE, _CLONE3, _IOCTL, _PRLIMIT = 56, 435, 16, 302
_NAMESPACES = 0x7E020000
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}"""
_TERMINAL_INPUT = (0x5412, 0x541C)
"""TIOCSTI types into the terminal, TIOCLINUX pastes into a console"""

_LOAD, _EQUAL, _GREATER_EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
_NUMBER, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24


def build_filter(*, alone: bool) -> bytes:
    """The program as an array of `struct sock_filter`.

    `alone`: nothing but this filter and Landlock stands between the candidate and what else its user owns, so it may
    signal no process and change no file's mode, owner or times either.
    """
    denied = sorted({**_DENIED, **(_SIGNALS | _METADATA if alone else {})}.values())
    code: list[bytes] = []

    def emit(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        code.append(struct.pack("<HBBI", operation, if_true, if_false, value))

    emit(_LOAD, _ARCH)
    emit(_EQUAL, _AUDIT_ARCH, 1, 0)
    emit(_RETURN, _KILL)
    emit(_LOAD, _NUMBER)
    emit(_GREATER_EQUAL, _X32, 0, 1)
    emit(_RETURN, _EPERM)
    for number in denied:
        emit(_EQUAL, number, 0, 1)
        emit(_RETURN, _EPERM)
    emit(_EQUAL, _CLONE3, 0, 1)
    emit(_RETURN, _ENOSYS)
    emit(_EQUAL, _CLONE, 0, 4)
    emit(_LOAD, _ARG0)
    emit(_ANY_BIT, _NAMESPACES, 0, 1)
    emit(_RETURN, _EPERM)
    emit(_RETURN, _ALLOW)
    emit(_EQUAL, _PRLIMIT, 0, 4)
    emit(_LOAD, _ARG0)
    emit(_EQUAL, 0, 1, 0)
    emit(_RETURN, _EPERM)
    emit(_RETURN, _ALLOW)
    emit(_EQUAL, _IOCTL, 0, 4)
    emit(_LOAD, _ARG1)
    emit(_EQUAL, _TERMINAL_INPUT[0], 1, 0)
    emit(_EQUAL, _TERMINAL_INPUT[1], 0, 1)
    emit(_RETURN, _EPERM)
    emit(_RETURN, _ALLOW)
    return b"".join(code)
