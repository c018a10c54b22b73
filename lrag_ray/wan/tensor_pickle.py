"""Pickles of tensors, interpreted opcode by opcode: nothing that a stream names is imported or called.

Only the opcodes and names that state dicts need are understood; everything else is refused by name. Python's own
unpickler cannot be confined as tightly: it calls what its hooks return, applies state to any object, and takes
extension codes from a process-wide cache.

The result holds dicts, lists, tuples, sets, numbers, text, bytes and tensors; classes of TorchScript become `Module`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from lrag_ray.wan.tensor_rebuild import (
    MAX_NAME,
    REBUILDERS,
    Allowance,
    Global,
    PickleDamagedError,
    PickleRefusedError,
    StoredValues,
    expected,
    hashed,
    is_count,
    pairs,
    rebuilt,
    shown,
)

_MAX_INT_BYTES = 16
_MAX_DEPTH = 100
_MAX_LINE = 10_000
_MAX_ENTRIES = Allowance.MAX_STEPS
MAX_BYTES = 1 << 26
"""Of one pickle; with its optimizer's state, a generator's has one or two megabytes."""


@dataclass
class Module:
    """An object of a TorchScript class: its attributes, without its code."""

    kind: str
    attributes: dict[str, Any] = field(default_factory=dict)


class StorageNeed(NamedTuple):
    """A storage that a pickle refers to."""

    key: str
    nbytes: int
    view: tuple[int, int] | None
    """First byte and length of the part that is meant, in files of the oldest torch versions."""


class _Mark:
    pass


_MARK = _Mark()
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_STORAGE_COST = 8
"""Finding a storage in an archive takes as long as copying some values."""
_TYPES = {Global("torch", "Tensor"), Global("torch._tensor", "Tensor")}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_VALUES = _CONSTANTS.keys() | _NUMBERS | _TEXTS | _BYTES
"""Opcodes that push their argument."""


def read_pickle(
    stream: BinaryIO, storage: Callable[[StorageNeed], torch.UntypedStorage | None], allowance: Allowance
) -> Any:
    """The value of the pickle that begins at the stream's position, which is left behind it.

    `storage` gives the bytes of the storages that the pickle refers to; where it gives None, tensors are None.
    `allowance` is what reading the whole file may take.

    Raises PickleRefusedError, PickleDamagedError, and ValueError for a stream that is not a pickle.
    """
    value = _Machine(storage, allowance).run(_Bounded(stream))
    _check_containers(value)
    return value


class _Bounded:
    """What `pickletools` reads from: no step takes what no checkpoint needs into memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._left = MAX_BYTES
        self.tell = stream.tell

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise PickleRefusedError(f"its pickle has more than {MAX_BYTES:,} bytes, as no checkpoint has")
        return self._stream.read(size)

    def readline(self) -> bytes:
        line = self._stream.readline(_MAX_LINE + 1)
        if len(line) > _MAX_LINE:
            raise PickleRefusedError(f"its pickle has a line of more than {_MAX_LINE:,} characters")
        self._left -= len(line)
        return line


class _Machine:
    def __init__(self, storage: Callable[[StorageNeed], torch.UntypedStorage | None], allowance: Allowance) -> None:
        self._storage = storage
        self._allowance = allowance
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: _Bounded) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(cast(BinaryIO, stream)):
                if opcode.name == "STOP":
                    return self._plain(self._stack.pop())
                self._allowance.step()
                self._step(opcode.name, argument)
        except (IndexError, KeyError, AttributeError, TypeError, OverflowError) as error:
            # What a stream does that pops more than it pushed or treats one kind of value as another.
            raise PickleDamagedError(f"its pickle is inconsistent ({type(error).__name__})") from error
        raise PickleDamagedError("its pickle has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(_CONSTANTS[name] if name in _CONSTANTS else _small(argument))
            return
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._above_mark()
            case "DUP":
                stack.append(stack[-1])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(set())
            case "LIST":
                stack.append(self._above_mark())
            case "TUPLE":
                stack.append(tuple(self._above_mark()))
            case "FROZENSET":
                stack.append(frozenset(map(self._hashed, self._above_mark())))
            case "DICT":
                stack.append(dict(pairs(self._above_mark(), self._allowance)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise PickleDamagedError("its pickle is inconsistent (a tuple of nothing)")
                stack[-count:] = [tuple(map(self._plain, stack[-count:]))]
            case "APPEND" | "APPENDS":
                values = self._above_mark() if name == "APPENDS" else [self._plain(stack.pop())]
                expected(stack[-1], list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self._above_mark() if name == "SETITEMS" else [self._plain(stack.pop()) for _ in "kv"][::-1]
                expected(stack[-1], dict).update(pairs(values, self._allowance))
            case "ADDITEMS":
                values = self._above_mark()
                expected(stack[-1], set).update(map(self._hashed, values))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                stack.append(_known(Global(module, attribute)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_known(Global(expected(module, str), expected(attribute, str))))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "REDUCE":
                arguments = expected(stack.pop(), tuple)
                stack.append(rebuilt(expected(stack.pop(), Global), arguments, self._allowance))
            case "NEWOBJ":
                arguments, kind = stack.pop(), expected(stack.pop(), Global)
                if not _is_script_class(kind) or arguments != ():
                    raise PickleRefusedError(f"it makes an object of {kind}, which is not a tensor")
                stack.append(Module(kind.name))
            case "BUILD":
                self._build(self._plain(stack.pop()), stack[-1])
            case _:
                raise PickleRefusedError(f"its pickle uses {name}, which no tensor needs and which could run code")

    def _above_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleDamagedError("its pickle is inconsistent (no mark)")
        values = [self._plain(value) for value in stack[at + 1 :]]
        del stack[at:]
        return values

    def _plain(self, value: Any) -> Any:
        if value is _MARK:
            raise PickleDamagedError("its pickle is inconsistent (a mark as a value)")
        return value

    def _hashed(self, value: Any) -> Any:
        return hashed(value, self._allowance)

    def _build(self, state: Any, target: Any) -> None:
        if isinstance(target, Module):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise PickleRefusedError(
                    f"its module {target.kind} stores a {type(state).__name__} for loading code of its own "
                    "(__setstate__), which is not run"
                )
            self._allowance.spend(len(state))
            target.attributes.update(state)
        elif not isinstance(target, dict) or not isinstance(state, dict):
            raise PickleRefusedError(f"it sets the state of a {type(target).__name__}, which no tensor needs")
        # Else: what modules note beside their state dicts (_metadata), of no use here.

    def _persistent(self, reference: Any) -> StoredValues:
        if (
            not isinstance(reference, tuple)
            or len(reference) not in (5, 6)
            or reference[0] not in ("storage", b"storage")
        ):
            kind = reference[0] if isinstance(reference, tuple) and reference else reference
            named = f" {kind[:40]!r}" if isinstance(kind, str) else ""
            raise PickleRefusedError(f"it refers to an object{named} outside of the file, where a storage is expected")
        kind, key, numel = expected(reference[1], Global), str(expected(reference[2], str)), reference[4]
        if len(key) > MAX_NAME:
            raise PickleRefusedError(f"it has a storage with a name of {len(key):,} characters")
        self._allowance.spend(_STORAGE_COST)
        dtype = _STORAGES.get(kind.name)
        if dtype is None and kind.name != "UntypedStorage":
            raise PickleRefusedError(f"it holds a storage of {kind}, which is not supported")
        width = dtype.itemsize if dtype else 1
        if not is_count(numel):
            raise PickleDamagedError(f"its storage {key[:40]!r} has {shown(numel)} elements")
        view = reference[5] if len(reference) == 6 else None
        part = None
        if view is not None:
            _, first, count = expected(view, tuple)
            if not (is_count(first) and is_count(count) and first + count <= numel):
                raise PickleDamagedError(f"a part of its storage {key[:40]!r} lies outside")
            part = (first * width, count * width)
        return StoredValues(self._storage(StorageNeed(key, numel * width, part)), dtype)


def _small(value: Any) -> Any:
    """The value of an opcode; numbers that no checkpoint needs are refused before anybody prints them."""
    if isinstance(value, int) and value.bit_length() > 8 * _MAX_INT_BYTES:
        raise PickleDamagedError(f"its pickle holds a number of {value.bit_length()} bits")
    return value


def _is_script_class(name: Global) -> bool:
    # TorchScript writes the whole dotted name into one line: module and class arrive split at the last dot or not.
    return name.module.partition(".")[0] == "__torch__"


def _known(name: Global) -> Any:
    """A name that may stand in a pickle: itself, or the precision it means."""
    if name.module == "torch" and name.name in _DTYPES:
        return _DTYPES[name.name]
    if len(name.module) + len(name.name) > MAX_NAME:
        raise PickleRefusedError(f"it has a name of {len(name.module) + len(name.name):,} characters")
    is_storage = name.module in ("torch", "torch.storage") and (name.name in _STORAGES or name.name == "UntypedStorage")
    if not (is_storage or _is_script_class(name) or name in REBUILDERS or name in _TYPES):
        raise PickleRefusedError(
            f"it holds {_printable(str(name))}, which is not a tensor and could run code on loading"
        )
    return name


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:120])


def _children(value: Any) -> list[Any]:
    if isinstance(value, Module):
        return list(value.attributes.values())
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else []


def _check_containers(value: Any) -> None:
    """Refuse containers that hold themselves, and those too deep or too large to be walked or printed."""
    measured: dict[int, tuple[int, int]] = {}
    open_now: set[int] = set()
    pending = [(value, False)]
    while pending:
        held, is_done = pending.pop()
        if id(held) in measured or not (children := _children(held)):
            continue
        if is_done:
            open_now.discard(id(held))
            parts = [measured.get(id(child), (1, 0)) for child in children]
            entries, depth = 1 + sum(size for size, _ in parts), 1 + max(deep for _, deep in parts)
            if depth > _MAX_DEPTH or entries > _MAX_ENTRIES:
                raise PickleRefusedError(f"its pickle nests {depth} levels with {entries:,} entries")
            measured[id(held)] = entries, depth
            continue
        if id(held) in open_now:
            raise PickleRefusedError("its pickle has a container that holds itself")
        open_now.add(id(held))
        pending.append((held, True))
        pending += ((child, False) for child in children if id(child) not in measured)
