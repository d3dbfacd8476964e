"""No way out; each attack is shown to work where no wall stands."""

import os
import platform
import re
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from gcpo_repro.evaluation import code_execution, code_walls
from gcpo_repro.evaluation.code_execution import isolation
from tests.evaluation.code_cases import PROBLEM, WALLS, need, nothing_left, probe, run, tried  # noqa: F401


def test_every_wall_is_reported():
    states = isolation()
    assert list(states) == [*WALLS, "limits"] and all(s == "in force" or s.startswith("not in force: ") for s in states.values())
    verdict, found = code_execution._run(PROBLEM, "def f(x): return x * x", 5.0, 1024, ["seccomp"])
    assert verdict and [found[w] for w in WALLS if w != "seccomp"] == ["not asked for"] * 3


@pytest.mark.parametrize("walls", [WALLS, ("landlock",), ("seccomp",)])
def test_no_file_is_written_outside(walls, tmp_path):
    need(*({"landlock"} if walls == WALLS else walls))
    path = tmp_path / "outside"
    source = tried(f"open({str(path)!r}, 'w').close() or 'written'")
    assert probe(source, walls) in ("Permission denied", "Operation not permitted") and not path.exists()
    assert probe(source, ()) == "written" and path.exists()
    inside = "def f():\n    open('inside', 'w').close()\n    return 'written'"
    if "landlock" in walls:
        assert probe(inside, walls) == "written"
    changes = f"""
        import os
        def f():
            found = []
            rename, link, cut = lambda p: os.rename(p, 'x'), lambda p: os.link(p, 'x'), lambda p: os.truncate(p, 0)
            for change in (os.unlink, os.rmdir, rename, link, cut):
                try:
                    change({str(path)!r})
                    found.append('done')
                except OSError:
                    pass
            return str(found)
    """
    assert probe(changes, walls) == "[]" and path.exists()


def test_modes_of_files_outside_stay(tmp_path):
    need("seccomp")
    path = tmp_path / "outside"
    path.write_text("x")
    path.chmod(0o640)
    source = f"import os\ndef f():\n    os.{{}}({str(path)!r}, {{}})\n    return 'done'"
    for call, value in (("chmod", "0o777"), ("chown", "1, 1"), ("utime", "(1, 1)")):
        test = "def check(candidate):\n    candidate()\n"
        verdict = run(source.format(call, value), problem=PROBLEM | {"test": test})
        assert verdict.reason.startswith("raised: PermissionError"), (call, verdict)
    assert path.stat().st_mode & 0o777 == 0o640 and path.stat().st_mtime > 1e9


def test_secrets_are_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert probe("import os\ndef f(): return str('HF_TOKEN' in os.environ)") == "False"
    need("landlock")
    (tmp_path / "secret").write_text("hf_secret")
    for path in (tmp_path / "secret", f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem", Path(__file__)):
        source = tried(f"open({str(path)!r}, 'rb').read(9).hex()")
        assert probe(source) == "Permission denied", path
    assert probe(f"def f(): return open({str(tmp_path / 'secret')!r}).read()", ()) == "hf_secret"


@pytest.mark.parametrize("walls", [WALLS, ("namespaces",), ("landlock",), ("seccomp",)])
def test_no_network(walls):
    need(*({"seccomp"} if walls == WALLS else walls))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        source = f"""
            import socket
            def f():
                try:
                    socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1).close()
                    return 'connected'
                except OSError as e:
                    return e.strerror
        """
        assert probe(source, walls) != "connected"
        with pytest.raises(TimeoutError):
            server.accept()
        assert probe(source, ()) == "connected"
        server.accept()[0].close()


@pytest.mark.parametrize("walls", [WALLS, ("landlock",), ("seccomp",)])
def test_no_signal_reaches_another_process(walls):
    need(*({"seccomp"} if walls == WALLS else walls))
    with subprocess.Popen(["sleep", "60"]) as victim:
        source = f"""
            import os, resource
            def f():
                found = []
                signal = lambda: os.kill({victim.pid}, 9)
                limit = lambda: resource.prlimit({victim.pid}, resource.RLIMIT_CPU, (0, 0))
                for attempt in (signal, limit):
                    try:
                        attempt()
                        found.append('done')
                    except OSError as e:
                        found.append(e.strerror)
                return found[0] if {walls == ("landlock",)} else str(sorted(set(found)))
        """
        assert probe(source, walls) in ("Operation not permitted", "['Operation not permitted']")
        assert victim.poll() is None
        assert "done" in probe(source, ())
        assert victim.wait(5) == -9


def test_limits_cannot_be_raised_and_powers_are_gone():
    need("capabilities")
    source = """
        import os, resource
        def f():
            powers = [line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapEff', 'CapPrm'))]
            try:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            except (OSError, ValueError):
                powers.append('kept')
            return ' '.join(powers)
    """
    assert probe(source, ("capabilities",)) == f"{'0' * 16} {'0' * 16} kept"


def simulate(program, machine, number, arguments=(0,) * 6):
    """What the filter says to a call: a classic BPF interpreter for the five instructions in use."""

    data = struct.pack("<iIQ6Q", number, machine, 0, *arguments)
    at, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack("HBBI", program[at])
        if code == 0x06:
            return value
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
            at += 1
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += 1 + (if_true if holds else if_false)


@pytest.mark.parametrize("name", code_walls._MACHINES)
@pytest.mark.parametrize("may_write", [True, False])
def test_the_filter_denies_what_the_table_names(name, may_write):
    column, machine = code_walls._MACHINES[name]
    program = code_walls._filter(column, machine, may_write)
    table = code_walls._DENIED | ({} if may_write else code_walls._FILE_CHANGES)
    denied = {numbers[column] for numbers in table.values()} - {None}
    allow, deny, missing = 0x7FFF0000, 0x00050001, 0x00050026
    clone, clone3, prlimit = (numbers[column] for numbers in (code_walls._CLONE, code_walls._CLONE3, code_walls._PRLIMIT))
    for number in set(range(600)) - {clone}:
        expected = deny if number in denied else missing if number == clone3 else allow
        assert simulate(program, machine, number) == expected, number
    thread = 0x10000
    assert simulate(program, machine, clone, (17, *(0,) * 5)) == deny
    assert simulate(program, machine, clone, (thread | 0x100, *(0,) * 5)) == allow
    assert simulate(program, machine, prlimit, (5, *(0,) * 5)) == deny
    assert simulate(program, 12345, 0) == 0x80000000
    fcntl, ioctl, prctl = (numbers[column] for numbers in (code_walls._FCNTL, code_walls._IOCTL, code_walls._PRCTL))
    for command in (8, 10, 15):  # F_SETOWN, F_SETSIG, F_SETOWN_EX
        assert simulate(program, machine, fcntl, (5, command, 0, 0, 0, 0)) == deny
    for command in (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030):  # descriptors, flags, locks
        assert simulate(program, machine, fcntl, (5, command, 0, 0, 0, 0)) == allow
    for command in (0x8901, 0x8902, 0x40086602, 0x401C5820, 0x40045436):  # FIOSETOWN, SIOCSPGRP, FS_IOC_SETFLAGS, …
        assert simulate(program, machine, ioctl, (5, command, 0, 0, 0, 0)) == deny
    for command in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451):  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
        assert simulate(program, machine, ioctl, (5, command, 0, 0, 0, 0)) == allow
    assert [simulate(program, machine, prctl, (option, 0, 0, 0, 0, 0)) for option in (1, 15)] == [deny, allow]
    openat = code_walls._OPENAT[column]
    for flags, writes in ((os.O_RDONLY | os.O_CLOEXEC, 0), (os.O_WRONLY, 1), (os.O_RDWR, 1), (os.O_CREAT, 1), (os.O_TRUNC, 1)):
        assert simulate(program, machine, openat, (0, 0, flags, 0, 0, 0)) == (deny if writes and not may_write else allow)


def test_the_numbers_are_linuxs():
    """Against the kernel's own headers: this machine's, and the generic ones, which are aarch64's."""
    tables = [code_walls._DENIED, code_walls._FILE_CHANGES]
    ours = {name: numbers for table in tables for name, numbers in table.items()}
    by_argument = ("open", "openat", "clone", "clone3", "fcntl", "ioctl", "prctl")
    ours |= {name: getattr(code_walls, f"_{name.upper()}") for name in by_argument}
    ours["prlimit64"] = code_walls._PRLIMIT
    native = Path(f"/usr/include/{platform.machine()}-linux-gnu/asm/unistd_64.h")
    for column, header in ((0, native), (1, Path("/usr/include/asm-generic/unistd.h"))):
        if not header.exists() or (column == 0 and platform.machine() != "x86_64"):
            pytest.skip(f"no {header}")
        found = dict(re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", header.read_text(), re.MULTILINE))
        younger = {"fchmodat2", "setxattrat", "removexattrat", "file_setattr"}  # than some headers
        for name, numbers in ours.items():
            if name in found or name not in younger:
                assert str(numbers[column]) == found.get(name, "None"), (name, column)
