"""The untrusted side: loads a candidate behind walls and answers calls over a socket with plain data.

Runs under `python -I`, started by `code_judge`; standard library only, and no import of the package. Nothing here is trusted
once the candidate is loaded: what comes out of the socket is checked and rebuilt by `decode` in the other process.

Plain data travel as JSON. Lists, strings, floats (inf and nan too), integers of up to 64 bits, booleans and None stand for
themselves; all else is an object with one key, its type: {"tuple": [...]}, {"dict": [[key, value], ...]}, {"int": "0x..."} …
"""

from __future__ import annotations

import json
import os
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

from .code_walls import raise_walls

NAME = "candidate"  # the module in which the candidate's source runs
_REBUILD: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "dict": lambda pairs: {decode(key): decode(value) for key, value in pairs},
}


class TooLong(ValueError):
    """A message longer than will be read."""


def encode(value: Any) -> Any:
    """Plain data as a JSON tree; subclasses (namedtuple, Counter, IntEnum …) go as what they extend, NumPy scalars as numbers.

    Raises:
        TypeError: anything else.
        RecursionError: nested too deeply, or inside itself.
    """
    kind = type(value)
    if value is None or kind is bool:
        return value
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, int):
        number = int.__int__(value)
        return number if -(1 << 63) <= number < 1 << 63 else {"int": hex(number)}
    if issubclass(kind, float):
        return float.__float__(value)
    if issubclass(kind, complex):
        return {"complex": [value.real, value.imag]}
    if issubclass(kind, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if issubclass(kind, list):
        return [encode(item) for item in list.__iter__(value)]
    if issubclass(kind, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for container in (tuple, set, frozenset):
        if issubclass(kind, container):
            return {container.__name__: [encode(item) for item in container.__iter__(value)]}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item())
    raise TypeError(f"{kind.__module__}.{kind.__qualname__}" if kind.__module__ != "builtins" else kind.__qualname__)


def decode(tree: Any) -> Any:
    """The value of a JSON tree, made of builtins only.

    Raises:
        ValueError, TypeError, RecursionError, MemoryError: not what `encode` writes.
    """
    if type(tree) is list:
        return [decode(item) for item in tree]
    if type(tree) is dict:
        ((kind, content),) = tree.items()
        if kind not in _REBUILD:
            raise ValueError(f"unknown type {kind!r}")
        return _REBUILD[kind](content)
    return tree


def send(socket: int, message: Any) -> None:
    """Write one JSON message with its length (8 bytes, big-endian) in front."""
    body = json.dumps(message).encode()
    data = memoryview(struct.pack(">Q", len(body)) + body)
    while data:
        data = data[os.write(socket, data) :]


def receive(socket: int, most: int | None = None) -> Any:
    """Read one message of at most `most` bytes.

    Raises:
        EOFError: the other side is gone.
        TooLong, ValueError: longer than that; not JSON.
    """
    (length,) = struct.unpack(">Q", _read(socket, 8))
    if most is not None and length > most:
        raise TooLong(f"an answer of {length} bytes; at most {most} are read")
    return json.loads(_read(socket, length))


def _read(socket: int, length: int) -> bytes:
    parts = []
    while length:
        part = os.read(socket, min(length, 1 << 20))
        if not part:
            raise EOFError("the other side closed the socket")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def load(source: str, entry_point: str) -> Callable[..., Any]:
    """Run a source and return the function. A tail that does not parse (an answer cut off, prose after the code) is left out.

    Raises:
        SyntaxError, NameError, TypeError: no such function is left. And whatever the source raises.
    """
    code, error = compile_without_tail(source)
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module  # dataclasses and pickle look the module up
    exec(code, module.__dict__)
    if entry_point not in module.__dict__:
        raise error or NameError(f"{entry_point} is not defined")
    function = module.__dict__[entry_point]
    if not callable(function):
        raise TypeError(f"{entry_point} is not callable")
    return function


def compile_without_tail(source: str) -> tuple[types.CodeType, SyntaxError | None]:
    """The source up to the last unindented line from which it does not parse, and the first error that was met on the way."""
    lines, first = source.splitlines(keepends=True), None
    while True:
        try:
            return compile("".join(lines), f"<{NAME}>", "exec", dont_inherit=True), first
        except SyntaxError as error:
            first = first or error
            starts = [i for i, line in enumerate(lines) if line.strip() and not line[0].isspace()]
            before = [i for i in starts if i < (error.lineno or 0)] or starts or [0]
            del lines[before[-1] :]


def answer(function: Callable[..., Any], call: dict[str, Any]) -> dict[str, Any]:
    """One call's reply: its number, and `value`, `raised` or `not_plain`."""
    reply: dict[str, Any] = {"call": call["call"]}
    try:
        value = function(*decode(call["args"]), **decode(call["kwargs"]))
    except BaseException as error:  # SystemExit and KeyboardInterrupt are failures of the candidate too
        return reply | {"raised": [type(error).__name__, describe(error)]}
    try:
        return reply | {"value": encode(value)}
    except BaseException as error:
        return reply | {"not_plain": describe(error) or type(error).__name__}


def describe(error: BaseException) -> str:
    """An exception's text, short; a candidate's exception may fail at even that."""
    try:
        return str(error)[:300]
    except BaseException:
        return ""


def main() -> None:
    """Arguments: the folder of this file, the socket's number. First message: the settings; second: the source; then calls."""
    socket = int(sys.argv[2])
    settings = receive(socket)
    null = os.open(os.devnull, os.O_RDWR)  # behind the walls it may not open
    send(socket, {"walls": raise_walls(**settings)})
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    try:
        function = load(**receive(socket))
    except BaseException as error:
        send(socket, {"raised": [type(error).__name__, describe(error)]})
        return
    send(socket, {"loaded": True})
    while True:
        send(socket, answer(function, receive(socket)))
