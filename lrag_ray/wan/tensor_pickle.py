"""Pickles of tensors, interpreted opcode by opcode: nothing that a stream names is imported or called.

Only the opcodes and names that state dicts need are understood; everything else is refused by name. Python's own
unpickler cannot be confined as tightly: it calls what its hooks return, applies state to any object, and takes
extension codes from a process-wide cache.

The result holds dicts, lists, tuples, sets, numbers, text, bytes and tensors; classes of TorchScript become `Module`.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

_MAX_INT_BYTES = 16
_MAX_DIMENSIONS = 32
_MAX_DEPTH = 100
_MAX_NAME = 1000
_MAX_LINE = 10_000
_MAX_ENTRIES = 10_000_000
MAX_BYTES = 1 << 26
"""Of one pickle; with its optimizer's state, a generator's has one or two megabytes."""
_MAX_OPCODES = 1 << 21
"""Of one pickle, that is a few seconds: about forty make a tensor, and compressed ones cost a file nothing."""


class PickleRefusedError(ValueError):
    """A pickle holds something that is neither a tensor nor a plain container; the text names it."""


class PickleDamagedError(ValueError):
    """A pickle contradicts itself or the storages beside it; the text says how."""


class Global(NamedTuple):
    """A name in a pickle. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return self.name if self.module in ("builtins", "__builtin__") else f"{self.module}.{self.name}"


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


class _Storage(NamedTuple):
    data: torch.UntypedStorage | None
    dtype: torch.dtype | None


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
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_TEXTS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_VALUES = _CONSTANTS.keys() | _NUMBERS | _TEXTS | _BYTES
"""Opcodes that push their argument."""


def read_pickle(stream: BinaryIO, storage: Callable[[StorageNeed], torch.UntypedStorage | None]) -> Any:
    """The value of the pickle that begins at the stream's position, which is left behind it.

    `storage` gives the bytes of the storages that the pickle refers to; where it gives None, tensors are None.
    Raises PickleRefusedError, PickleDamagedError, and ValueError for a stream that is not a pickle.
    """
    value = _Machine(storage).run(_Bounded(stream))
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
    def __init__(self, storage: Callable[[StorageNeed], torch.UntypedStorage | None]) -> None:
        self._storage = storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, stream: _Bounded) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(BinaryIO, stream))):
                if opcode.name == "STOP":
                    return self._plain(self._stack.pop())
                if count >= _MAX_OPCODES:
                    raise PickleRefusedError(f"its pickle has more than {_MAX_OPCODES:,} steps, as no checkpoint has")
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
                stack.append(frozenset(map(_key, self._above_mark())))
            case "DICT":
                stack.append(dict(_pairs(self._above_mark())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise PickleDamagedError("its pickle is inconsistent (a tuple of nothing)")
                stack[-count:] = [tuple(map(self._plain, stack[-count:]))]
            case "APPEND" | "APPENDS":
                values = self._above_mark() if name == "APPENDS" else [self._plain(stack.pop())]
                _expected(stack[-1], list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self._above_mark() if name == "SETITEMS" else [self._plain(stack.pop()) for _ in "kv"][::-1]
                _expected(stack[-1], dict).update(_pairs(values))
            case "ADDITEMS":
                values = self._above_mark()
                _expected(stack[-1], set).update(map(_key, values))
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
                stack.append(_known(Global(_expected(module, str), _expected(attribute, str))))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "REDUCE":
                arguments = _expected(stack.pop(), tuple)
                stack.append(_rebuilt(_expected(stack.pop(), Global), arguments))
            case "NEWOBJ":
                arguments, kind = stack.pop(), _expected(stack.pop(), Global)
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

    def _build(self, state: Any, target: Any) -> None:
        if isinstance(target, Module):
            if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
                raise PickleRefusedError(
                    f"its module {target.kind} stores a {type(state).__name__} for loading code of its own "
                    "(__setstate__), which is not run"
                )
            target.attributes.update(state)
        elif not isinstance(target, dict) or not isinstance(state, dict):
            raise PickleRefusedError(f"it sets the state of a {type(target).__name__}, which no tensor needs")
        # Else: what modules note beside their state dicts (_metadata), of no use here.

    def _persistent(self, reference: Any) -> _Storage:
        if (
            not isinstance(reference, tuple)
            or len(reference) not in (5, 6)
            or reference[0] not in ("storage", b"storage")
        ):
            kind = reference[0] if isinstance(reference, tuple) and reference else reference
            shown = f" {kind[:40]!r}" if isinstance(kind, str) else ""
            raise PickleRefusedError(f"it refers to an object{shown} outside of the file, where a storage is expected")
        kind, key, numel = _expected(reference[1], Global), str(_expected(reference[2], str)), reference[4]
        dtype = _STORAGES.get(kind.name)
        if dtype is None and kind.name != "UntypedStorage":
            raise PickleRefusedError(f"it holds a storage of {kind}, which is not supported")
        width = dtype.itemsize if dtype else 1
        if not _is_count(numel):
            raise PickleDamagedError(f"its storage {key[:40]!r} has {numel!r} elements")
        view = reference[5] if len(reference) == 6 else None
        part = None
        if view is not None:
            _, first, count = _expected(view, tuple)
            if not (_is_count(first) and _is_count(count) and first + count <= numel):
                raise PickleDamagedError(f"a part of its storage {key[:40]!r} lies outside")
            part = (first * width, count * width)
        return _Storage(self._storage(StorageNeed(key, numel * width, part)), dtype)


def _small(value: Any) -> Any:
    """The value of an opcode; numbers that no checkpoint needs are refused before anybody prints them."""
    if isinstance(value, int) and value.bit_length() > 8 * _MAX_INT_BYTES:
        raise PickleDamagedError(f"its pickle holds a number of {value.bit_length()} bits")
    return value


def _expected(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise PickleDamagedError(f"its pickle has a {type(value).__name__} where a {kind.__name__} is expected")
    return value


def _key(value: Any) -> Any:
    # Not tuples: hashing a deep one overflows the stack.
    if value is not None and not isinstance(value, (str, bytes, int, float)):
        raise PickleRefusedError(f"it has a {type(value).__name__} as a key, expected names")
    if isinstance(value, (str, bytes)) and len(value) > _MAX_NAME:
        raise PickleRefusedError(f"it has a name of {len(value):,} characters")
    return value


def _pairs(values: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(values) % 2:
        raise PickleDamagedError("its pickle is inconsistent (a key without a value)")
    keys = iter(values)
    for key, value in zip(keys, keys, strict=True):
        yield _key(key), value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _is_script_class(name: Global) -> bool:
    # TorchScript writes the whole dotted name into one line: module and class arrive split at the last dot or not.
    return name.module.partition(".")[0] == "__torch__"


def _known(name: Global) -> Any:
    """A name that may stand in a pickle: itself, or the precision it means."""
    if name.module == "torch" and name.name in _DTYPES:
        return _DTYPES[name.name]
    shown = _printable(str(name))
    is_storage = name.module in ("torch", "torch.storage") and (name.name in _STORAGES or name.name == "UntypedStorage")
    if not (is_storage or _is_script_class(name) or (name.module, name.name) in _REBUILDERS or name in _TYPES):
        raise PickleRefusedError(f"it holds {shown}, which is not a tensor and could run code on loading")
    return name


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:120])


def _rebuilt(name: Global, arguments: tuple[Any, ...]) -> Any:
    rebuild = _REBUILDERS.get((name.module, name.name))
    if rebuild is None:
        raise PickleRefusedError(f"it calls {name}, which makes no tensor")
    return rebuild(*arguments)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor | None:
    return _tensor_as(_expected(storage, _Storage).dtype or torch.uint8, storage, offset, size, stride)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Tensor | None:
    return _tensor_as(_expected(dtype, torch.dtype), storage, offset, size, stride)


def _tensor_as(dtype: torch.dtype, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor | None:
    data = _expected(storage, _Storage).data
    _check_shape(size, stride)
    if not _is_count(offset):
        raise PickleDamagedError(f"a tensor begins at {offset!r}")
    if data is None:
        return None
    numel, held = math.prod(size), data.nbytes() // dtype.itemsize
    if not numel:
        return torch.empty(size, dtype=dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= held:
        raise PickleDamagedError(f"a tensor of {list(size)} reaches beyond its {held:,} stored values")
    if numel > held - offset:
        raise PickleRefusedError(
            f"a tensor of {list(size)} repeats {held - offset:,} stored values (it is expanded) and would fill "
            f"{numel * dtype.itemsize:,} bytes once it is used"
        )
    return torch.empty(0, dtype=dtype).set_(data, offset, tuple(size), tuple(stride))


def _check_shape(size: Any, stride: Any) -> None:
    shape, steps = _expected(size, (tuple, list)), _expected(stride, (tuple, list))  # type: ignore[arg-type]
    if len(shape) != len(steps) or len(shape) > _MAX_DIMENSIONS or not all(map(_is_count, [*shape, *steps])):
        raise PickleDamagedError("a tensor has an impossible shape")


def _without_values(dtype: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    _check_shape(size, stride)
    return torch.empty(tuple(size), dtype=_expected(dtype, torch.dtype), device="meta")


def _sparse(layout: Any, parts: Any) -> Tensor:
    """A sparse tensor without its values, which nothing here uses: misfits call it sparse."""
    size = _expected(_expected(parts, tuple)[2], (tuple, list))  # type: ignore[arg-type]
    _check_shape(size, size)
    return torch.empty(tuple(size), layout=torch.sparse_coo, device="meta")


def _first(value: Any, *_: Any) -> Any:
    return value


def _subclass(rebuild: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor with attributes of its own, which are dropped."""
    return _rebuilt(_expected(rebuild, Global), _expected(arguments, tuple))


def _dictionary(*entries: Any) -> dict[Any, Any]:
    if not entries:
        return {}
    (content,) = entries
    if isinstance(content, dict):
        return dict(content)
    return dict(_pairs([part for entry in _expected(content, list) for part in entry]))


def _plain_tuple(values: Any = ()) -> tuple[Any, ...]:
    return tuple(_expected(values, (tuple, list)))  # type: ignore[arg-type]


def _latin(text: Any, encoding: Any) -> bytes:
    """Bytes, as Python writes them in the second protocol."""
    if encoding != "latin1":
        raise PickleRefusedError("it holds text in an unusual encoding")
    return bytes(_expected(text, str).encode("latin1"))


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): _without_values,
    ("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    ("torch.nn.parameter", "Parameter"): _first,
    ("torch.nn", "Parameter"): _first,
    ("torch", "Size"): _plain_tuple,
    ("torch", "device"): _first,
    ("torch.serialization", "_get_layout"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    ("collections", "OrderedDict"): _dictionary,
    ("typing", "OrderedDict"): _dictionary,
    ("collections", "Counter"): _dictionary,
    ("_codecs", "encode"): _latin,
    ("builtins", "set"): lambda values=(): set(map(_key, values)),
    ("__builtin__", "set"): lambda values=(): set(map(_key, values)),
}
_TYPES = {Global("torch", "Tensor"), Global("torch._tensor", "Tensor")}


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
        children = _children(held)
        if id(held) in measured or not children:
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
