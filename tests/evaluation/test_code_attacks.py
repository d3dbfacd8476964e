"""Less usual ways to misbehave: signals by pipes, others' memory, outliving the evaluator, work made for the judge."""

import ctypes
import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gcpo_repro.evaluation import code_judge
from tests.evaluation.code_cases import PROBLEM, WALLS, marked, need, nothing_left, probe, run  # noqa: F401

OWNED = """
    import fcntl, os, socket, struct
    ends = [end.detach() for end in socket.socketpair()]
    def f():
        try:
            {own}
            fcntl.fcntl(ends[0], 10, 9)
            fcntl.fcntl(ends[0], fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            os.write(ends[1], b'x')
            return 'sent'
        except OSError as error:
            return error.strerror
"""
OWNERS = {
    "F_SETOWN": "fcntl.fcntl(ends[0], fcntl.F_SETOWN, {pid})",
    "F_SETOWN_EX": "fcntl.fcntl(ends[0], 15, struct.pack('ii', 1, {pid}))",
    "FIOSETOWN": "fcntl.ioctl(ends[0], 0x8901, struct.pack('i', {pid}))",
}


@pytest.mark.parametrize("owner", OWNERS)
def test_no_file_descriptor_sends_signals(owner):
    need("seccomp")
    source = OWNED.format(own=OWNERS[owner])
    with subprocess.Popen(["sleep", "60"]) as victim:
        assert probe(source.format(pid=victim.pid)) == "Operation not permitted"
        assert probe(source.format(pid=victim.pid), ("seccomp",)) == "Operation not permitted"
        assert victim.poll() is None
        assert probe(source.format(pid=victim.pid), ()) == "sent"
        assert victim.wait(5) == -9


def test_memory_shared_by_others_is_out_of_reach():
    need("seccomp")
    libc = ctypes.CDLL(None, use_errno=True)
    shared = libc.shmget(0, 4096, 0o1600)  # IPC_PRIVATE, IPC_CREAT
    source = f"""
        import ctypes
        def f():
            libc = ctypes.CDLL(None)
            libc.shmat.restype = ctypes.c_void_p
            attached, removed = libc.shmat({shared}, None, 0), libc.shmctl({shared}, 0, None)
            return str((attached not in (None, 2**64 - 1), removed))
    """
    try:
        assert shared >= 0 and probe(source) == probe(source, ("seccomp",)) == "(False, -1)"
        assert probe(source, ()) == "(True, 0)"
    finally:
        libc.shmctl(shared, 0, None)


OUTLIVE = """
    import ctypes, time
    def f(x):
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG
        open('ready', 'w').close()
        time.sleep({seconds})
"""
EVALUATOR = """
import json, sys
from gcpo_repro.evaluation.code_execution import _run
problem, source, walls = json.load(sys.stdin)
_run(problem, source, 60.0, 1024, walls)
"""


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


@pytest.mark.parametrize("walls, survives", [(WALLS, False), ((), True)])
def test_no_candidate_outlives_a_killed_evaluator(walls, survives, tmp_path):
    need(*walls)
    folder = tmp_path / "killed"
    folder.mkdir()
    source = textwrap.dedent(OUTLIVE.format(seconds=1.5 if survives else 30))
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", EVALUATOR], stdin=subprocess.PIPE, env=environment) as evaluator:
        evaluator.stdin.write(json.dumps([PROBLEM, source, walls]).encode())
        evaluator.stdin.close()
        assert until(lambda: list(folder.glob("*/ready")))
        evaluator.kill()
    time.sleep(0.3)
    assert bool(marked(folder)) == survives
    assert until(lambda: not marked(folder))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
@pytest.mark.parametrize(
    "code, end",
    [
        (b"\xb8\x02\x00\x00\x00\xcd\x80\xc3", "died: SIGSYS"),  # mov eax, 2; int 0x80; ret: fork by the 32-bit gate
        (b"\xb8\x39\x00\x00\x40\x0f\x05\xc3", "wrong: AssertionError: -1;"),  # mov eax, x32's 57; syscall; ret
        (b"\xb8\x39\x00\x00\x00\x0f\x05\xc3", "wrong: AssertionError: -1;"),  # fork, past the C library
    ],
)
def test_no_process_by_machine_code(code, end):
    need("seccomp")
    source = f"""
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=7)
        page.write({code!r})
        def f():
            return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
    """
    problem = PROBLEM | {"test": "def check(candidate):\n    raise AssertionError(candidate())\n"}
    assert run(source, problem=problem).reason.startswith(end)


def test_a_reply_that_is_slow_to_rebuild():
    """Numbers with the same hash: a set of n takes n² steps."""
    source = """
        import sys
        def f(x):
            same = [{'int': hex((2**61 - 1) * k)} for k in range(1, 150_000)]
            sys.modules['sandbox.code_worker'].encode = lambda value: {'set': same}
    """
    start = time.monotonic()
    assert run(source, timeout=1.5).reason == "timeout: no verdict within 1.5 s"
    assert time.monotonic() - start < 10


def test_a_reply_that_never_ends():
    source = """
        import os, time
        def f(x):
            os.write(3, b'')
            for descriptor in range(3, 20):
                try:
                    os.write(descriptor, (1000).to_bytes(8, 'big'))
                    break
                except OSError:
                    pass
            while True:
                os.write(descriptor, b' ')
                time.sleep(0.01)
    """
    assert run(source, timeout=0.7).reason == "timeout: no verdict within 0.7 s"


def test_descriptors_sent_with_a_reply_go_nowhere():
    source = """
        import array, os, socket
        def f(x):
            body = b'{"call": 1, "value": 4}'
            line = len(body).to_bytes(8, 'big') + body
            files = array.array('i', os.pipe())
            for descriptor in range(3, 20):
                try:
                    wire = socket.socket(fileno=descriptor)
                    wire.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
                    wire.detach()
                except OSError:
                    pass
            return 4
    """
    assert run(source).reason == "forged: a reply to another call"


def test_files_that_come_and_go_hide_no_flood():
    source = """
        import os, threading
        def churn(name):
            while True:
                open(name, 'w').close()
                os.unlink(name)
        def f(x):
            for k in range(4):
                threading.Thread(target=churn, args=(f'a{k}',), daemon=True).start()
            k = 0
            while True:
                open(f'b{k}', 'wb').write(bytes(1 << 20))
                k = (k + 1) % 400
    """
    assert run(source, timeout=10).reason == "flood: more than 500 files or 64 MiB in its folder"


def test_what_the_count_cannot_see_is_a_flood(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    assert code_judge.too_much(str(tmp_path)) is None
    scandir = os.scandir

    def closed(folder):  # mode 0300, for one that is not root
        if folder.endswith("a"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    assert code_judge.too_much(str(tmp_path)) == "a folder that hides what is in it"
    monkeypatch.setattr(os, "scandir", lambda folder: iter([Gone()]))
    assert code_judge.too_much(str(tmp_path)) is None


class Gone:
    def stat(self, **_):
        raise FileNotFoundError

    def is_dir(self, **_):
        return False


def test_a_reason_drives_no_terminal():
    reason = run("def f(x): raise ValueError('\\x1b[2J\\x07\\u202ered\\r\\nok')").reason
    assert reason == "raised: ValueError: \N{REPLACEMENT CHARACTER}[2J" + 2 * "\N{REPLACEMENT CHARACTER}" + "red ok"
