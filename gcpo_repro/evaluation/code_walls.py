"""Walls around untrusted code, raised by the process itself before that code is loaded; none of them needs root.

Runs under `python -I`; standard library only, and no import of the package. Linux, through ctypes:

* namespaces: its own user, network and IPC namespace: no interface, not even loopback, and no power over other processes.
* landlock: reads only Python's own files, writes only the scratch folder, no TCP, no signal to a process outside.
* capabilities: root's powers dropped for good.
* seccomp: no new process or program, no socket, no signal (nor a file or pipe that sends one), no tracing, no System V memory,
  no change of owners, modes, flags and times. Where Landlock is missing or old, no file can be opened for writing at all.
* limits: address space, CPU seconds, file size, open files, threads (the last does not bind root).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Collection

WALLS = ("namespaces", "landlock", "capabilities", "seccomp")
FILE_BYTES, OPEN_FILES, THREADS = 4 << 20, 64, 64
_libc = ctypes.CDLL(None, use_errno=True)

# Python's own files, the C library's, the time zones. Not /proc (other processes' environments), not the home folder.
READABLE = [sys.prefix, sys.base_prefix, sys.exec_prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
READABLE += ["/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime", "/dev/zero", "/dev/random", "/dev/urandom"]

# System call → number on (x86_64, aarch64), from Linux's unistd.h; None where that machine lacks it.
_DENIED = {
    # processes, and power over others
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    # network; io_uring would do all of this unseen
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "io_uring_setup": (425, 425),
    # owners, modes, times: what Landlock does not cover
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    # System V's memory and queues, whose numbers can be guessed: without a namespace those of the user's other processes
    "shmget": (29, 194), "shmctl": (31, 195), "shmat": (30, 196), "msgget": (68, 186), "msgctl": (71, 187),
    "msgsnd": (69, 189), "msgrcv": (70, 188), "semget": (64, 190), "semctl": (66, 191), "semop": (65, 193),
    "semtimedop": (220, 192), "mq_open": (240, 180), "mq_unlink": (241, 181),
    # memory that escapes the limits; ways into the kernel
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218),
}  # fmt: skip
_FILE_CHANGES = {
    "openat2": (437, 437), "creat": (85, None), "mkdir": (83, None), "mkdirat": (258, 34), "mknod": (133, None),
    "mknodat": (259, 33), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "truncate": (76, 45),
}  # fmt: skip
_OPEN, _OPENAT, _CLONE, _CLONE3, _PRLIMIT = (2, None), (257, 56), (56, 220), (435, 435), (302, 261)
_FCNTL, _IOCTL, _PRCTL = (72, 25), (16, 29), (157, 167)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def raise_walls(wanted: Collection[str], scratch: str, seconds: int, memory_mb: int) -> dict[str, str]:
    """Raise the wanted walls, and the limits always; wall → "in force" or why it is not.

    Args:
        wanted: names out of `WALLS`.
        scratch: the only folder in which files may be made.
        seconds: CPU seconds.
        memory_mb: address space in MiB.
    """
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS: Landlock and seccomp ask for it
    found: dict[str, str] = {}
    steps: dict[str, Callable[[], object]] = {
        "namespaces": lambda: _checked(_libc.unshare(0x10000000 | 0x40000000 | 0x08000000)),  # CLONE_NEWUSER, NEWNET, NEWIPC
        "landlock": lambda: _landlock(scratch),
        "capabilities": _drop_capabilities,
        # Before its third version Landlock lets files be emptied.
        "seccomp": lambda: _seccomp(may_write=found["landlock"] == "in force" and _landlock_version() >= 3),
    }
    for wall in WALLS:
        if wall == "seccomp":
            _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the judge; the walls before reset it, this one keeps it
        if wall not in wanted:
            found[wall] = "not asked for"
            continue
        try:
            steps[wall]()
            found[wall] = "in force"
        except (OSError, AttributeError) as error:  # AttributeError: a C library without the call
            found[wall] = f"not in force: {error}"
    _limit(seconds, memory_mb)
    return found | {"limits": "in force"}


def _limit(seconds: int, memory_mb: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_mb << 20,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: THREADS,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _prctl(option: int, *values: int | bytes) -> None:
    words = [v if isinstance(v, bytes) else ctypes.c_ulong(v) for v in values]
    _checked(_libc.prctl(option, *words, *[ctypes.c_ulong(0)] * (4 - len(words))))


def _syscall(number: int, *values: int | bytes | None) -> int:
    return _checked(_libc.syscall(number, *[ctypes.c_long(v) if isinstance(v, int) else v for v in values]))


def _drop_capabilities() -> None:
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3, this process
    _checked(_libc.capset(header, none))


def _landlock_version() -> int:
    return _syscall(444, None, 0, 1)


def _landlock(scratch: str) -> None:
    abi = _landlock_version()
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    network, scopes = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)  # TCP bind, connect; abstract sockets, signals
    ruleset = _syscall(444, struct.pack("QQQ", rights, network, scopes), 24, 0)
    try:
        read_file, read_folder, write_file = 4, 8, 2
        for path in READABLE:
            _allow(ruleset, path, read_file | read_folder)
        _allow(ruleset, "/dev/null", read_file | write_file)
        devices, execute, sockets = 1 << 6 | 1 << 11 | 1 << 15, 1, 1 << 9
        _allow(ruleset, scratch, rights & ~(devices | execute | sockets))
        _syscall(446, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not on this machine: nothing to allow
        return
    try:
        if not os.path.isdir(path):
            rights &= 1 << 1 | 1 << 2  # a rule for a file may name only a file's rights
        _syscall(445, ruleset, 1, struct.pack("=Qi", rights, beneath), 0)
    finally:
        os.close(beneath)


def _seccomp(may_write: bool) -> None:
    if platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    program = b"".join(_filter(*_MACHINES[platform.machine()], may_write))
    code = ctypes.create_string_buffer(program)
    _prctl(22, 2, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code)))  # PR_SET_SECCOMP, a filter


def _filter(column: int, machine: int, may_write: bool) -> list[bytes]:
    """The classic BPF program: what is listed fails with EPERM, all else is let through."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, deny, missing = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    def on_argument(call: tuple[int | None, int | None], argument: int, test: int, value: int, denied: bool) -> list[bytes]:
        """Deny a call if the test of its argument's lower half holds (`denied`) or if it does not, and allow it otherwise."""
        number = call[column]
        if number is None:
            return []
        skip = (0, 1) if denied else (1, 0)
        steps = [op(load, 16 + 8 * argument), op(test, value, *skip), op(give, deny), op(give, allow)]
        return [op(equal, number, 0, len(steps)), *steps]

    program = [op(load, 4), op(equal, machine, 1, 0), op(give, kill), op(load, 0)]
    if column == 0:
        program += [op(at_least, 0x40000000, 0, 1), op(give, deny)]  # the x32 numbers
    calls = _DENIED if may_write else _DENIED | _FILE_CHANGES
    for number in (numbers[column] for numbers in calls.values()):
        if number is not None:
            program += [op(equal, number, 0, 1), op(give, deny)]
    program += [op(equal, _CLONE3[column], 0, 1), op(give, missing)]  # the C library then uses clone, whose flags show
    program += on_argument(_CLONE, 0, any_bit, 0x10000, denied=False)  # CLONE_THREAD
    program += on_argument(_PRLIMIT, 0, any_bit, 0xFFFFFFFF, denied=True)  # the limits of another process
    program += on_argument(_PRCTL, 0, equal, 1, denied=True)  # PR_SET_PDEATHSIG: to outlive the judge
    # F_SETOWN, F_SETOWN_EX, F_SETSIG (8 to 15): a pipe that sends any signal to any process of this user
    program += on_argument(_FCNTL, 1, any_bit, 8, denied=True)
    program += on_argument(_IOCTL, 1, any_bit, 0xFFFFAB00, denied=True)  # all but a terminal's, 0x54..: FIOSETOWN, files' flags
    if not may_write:
        program += on_argument(_OPEN, 1, any_bit, _WRITING, denied=True)
        program += on_argument(_OPENAT, 2, any_bit, _WRITING, denied=True)
    return [*program, op(give, allow)]
