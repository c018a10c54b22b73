"""The names that a pickle of tensors may call, and what is made in their place.

No name is looked up or imported. Each stands for a function here that checks its arguments, which come from a stranger,
and makes a tensor or a plain container. `tensor_pickle` interprets the stream around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_NAME = 1000
"""Characters of a key, a storage's key or the name of a class."""
_MAX_DIMENSIONS = 32
_MAX_ELEMENTS = 1 << 36
"""Of a tensor without values, and the lengths of an empty one that are not 0: no storage bounds those."""
_SMALL_INT = 1 << 24
_ODD_KEY_COST = 200


class PickleRefusedError(ValueError):
    """A pickle holds something that is neither a tensor nor a plain container; the text names it."""


class PickleDamagedError(ValueError):
    """A pickle contradicts itself or the storages beside it; the text says how."""


class Allowance:
    """What reading one file may take, whatever its pickles say.

    A step of a pickle takes two or three bytes, fewer in a compressed one, and may name a list that is in memory
    already. So what steps copy is counted as well as the steps.
    """

    MAX_STEPS = 1 << 20
    """That is a few seconds. About forty steps make a tensor, so a checkpoint has room for 25,000."""
    MAX_VALUES = 1 << 21
    """A tensor takes about twenty: the arguments of its calls, its shape and strides."""

    def __init__(self) -> None:
        self._steps_left = self.MAX_STEPS
        self._values_left = self.MAX_VALUES

    def step(self) -> None:
        """Count a step; PickleRefusedError if there were too many."""
        self._steps_left -= 1
        if self._steps_left < 0:
            raise PickleRefusedError(f"its pickle has more than {self.MAX_STEPS:,} steps, as no checkpoint has")

    def spend(self, values: int) -> None:
        """Count values that are about to be copied; PickleRefusedError if there were too many."""
        self._values_left -= values
        if self._values_left < 0:
            raise PickleRefusedError(
                f"its pickle copies more than {self.MAX_VALUES:,} values while it is read, as no checkpoint does"
            )


class Global(NamedTuple):
    """A name in a pickle. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return self.name if self.module in ("builtins", "__builtin__") else f"{self.module}.{self.name}"


class StoredValues(NamedTuple):
    """A storage as a tensor refers to it; without data while sizes alone are measured."""

    data: torch.UntypedStorage | None
    dtype: torch.dtype | None


def rebuilt(name: Global, arguments: tuple[Any, ...], allowance: Allowance) -> Any:
    """What calling `name` stands for. PickleRefusedError, PickleDamagedError, TypeError or ValueError otherwise."""
    rebuild = REBUILDERS.get(name)
    if rebuild is None:
        raise PickleRefusedError(f"it calls {name}, which makes no tensor")
    allowance.spend(1 + len(arguments) + sum(map(_size, arguments)))
    return rebuild(allowance, *arguments)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (dict, list, tuple, set, frozenset, str, bytes)) else 0


def expected(value: Any, kind: type | tuple[type, ...]) -> Any:
    """The value, if it is of this kind; else PickleDamagedError."""
    if not isinstance(value, kind):
        named = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise PickleDamagedError(f"its pickle has a {type(value).__name__} where a {named} is expected")
    return value


def shown(value: Any) -> str:
    """A number as it is, of anything else its kind: what a stranger nests may have no end in print."""
    return str(value) if isinstance(value, int) else f"a {type(value).__name__}"


def hashed(value: Any, allowance: Allowance) -> Any:
    """The value, if it may be a key or an element of a set.

    Not tuples: hashing a deep one overflows the stack. The hashes of wide numbers can be chosen so that all collide,
    which makes a dict quadratic; those of text have a random seed.
    """
    if value is not None and not isinstance(value, (str, bytes, int, float)):
        raise PickleRefusedError(f"it has a {type(value).__name__} as a key, expected names")
    if isinstance(value, (str, bytes)) and len(value) > MAX_NAME:
        raise PickleRefusedError(f"it has a name of {len(value):,} characters")
    if isinstance(value, float) or (isinstance(value, int) and not -_SMALL_INT < value < _SMALL_INT):
        allowance.spend(_ODD_KEY_COST)
    return value


def pairs(values: list[Any], allowance: Allowance) -> Iterator[tuple[Any, Any]]:
    """Keys and values in turn, as pairs."""
    if len(values) % 2:
        raise PickleDamagedError("its pickle is inconsistent (a key without a value)")
    keys = iter(values)
    for key, value in zip(keys, keys, strict=True):
        yield hashed(key, allowance), value


def is_count(value: Any) -> bool:
    """Whether a value is a number of things that a file can have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 60


def _tensor(_: Allowance, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor | None:
    return _tensor_as(expected(storage, StoredValues).dtype or torch.uint8, storage, offset, size, stride)


def _tensor_v3(
    _: Allowance, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor | None:
    return _tensor_as(expected(dtype, torch.dtype), storage, offset, size, stride)


def _tensor_as(dtype: torch.dtype, storage: Any, offset: Any, size: Any, stride: Any) -> Tensor | None:
    data = expected(storage, StoredValues).data
    _check_shape(size, stride)
    if not is_count(offset):
        raise PickleDamagedError(f"a tensor begins at {shown(offset)}")
    if data is None:
        return None
    numel, held = math.prod(size), data.nbytes() // dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if numel else offset - 1
    if last >= held:
        raise PickleDamagedError(f"a tensor of {list(size)} reaches beyond its {held:,} stored values")
    if not numel:
        return _unstored(size, dtype=dtype)
    if numel > held - offset:
        raise PickleRefusedError(
            f"a tensor of {list(size)} repeats {held - offset:,} stored values (it is expanded) and would fill "
            f"{numel * dtype.itemsize:,} bytes once it is used"
        )
    return torch.empty(0, dtype=dtype).set_(data, offset, tuple(size), tuple(stride))


def _check_shape(size: Any, stride: Any) -> None:
    shape, steps = expected(size, (tuple, list)), expected(stride, (tuple, list))
    if len(shape) != len(steps) or len(shape) > _MAX_DIMENSIONS or not all(map(is_count, [*shape, *steps])):
        raise PickleDamagedError("a tensor has an impossible shape")
    if any(step > _MAX_ELEMENTS for step in steps):
        raise PickleDamagedError(f"a tensor of {list(shape)} has impossible strides: {list(steps)}")


def _unstored(size: Any, **options: Any) -> Tensor:
    """A tensor whose shape no storage bounds."""
    if math.prod(length or 1 for length in size) > _MAX_ELEMENTS:
        raise PickleDamagedError(f"a tensor of {list(size)} is larger than any, of at most {_MAX_ELEMENTS:,} values")
    return torch.empty(tuple(size), **options)


def _without_values(_: Allowance, dtype: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    _check_shape(size, stride)
    return _unstored(size, dtype=expected(dtype, torch.dtype), device="meta")


def _sparse(_: Allowance, layout: Any, parts: Any) -> Tensor:
    """A sparse tensor without its values, which nothing here uses: misfits call it sparse."""
    size = expected(expected(parts, tuple)[2], (tuple, list))
    _check_shape(size, size)
    return _unstored(size, layout=torch.sparse_coo, device="meta")


def _first(_: Allowance, value: Any, *rest: Any) -> Any:
    return value


def _subclass(allowance: Allowance, rebuild: Any, kind: Any, arguments: Any, *rest: Any) -> Any:
    """A tensor with attributes of its own, which are dropped."""
    if expected(rebuild, Global).module != "torch._utils":
        raise PickleRefusedError(f"it makes a tensor by {rebuild}, which is none of torch's ways to make one")
    return rebuilt(rebuild, expected(arguments, tuple), allowance)


def _dictionary(allowance: Allowance, *entries: Any) -> dict[Any, Any]:
    if not entries:
        return {}
    (content,) = entries
    if isinstance(content, dict):
        return dict(content)
    if not all(isinstance(entry, (tuple, list)) and len(entry) == 2 for entry in expected(content, list)):
        raise PickleDamagedError("its pickle is inconsistent (a dict of what are not pairs)")
    return dict(pairs([part for entry in content for part in entry], allowance))


def _set(allowance: Allowance, values: Any = ()) -> set[Any]:
    return {hashed(value, allowance) for value in expected(values, (list, tuple, set, frozenset))}


def _plain_tuple(_: Allowance, values: Any = ()) -> tuple[Any, ...]:
    return tuple(expected(values, (tuple, list)))


def _latin(_: Allowance, text: Any, encoding: Any) -> bytes:
    """Bytes, as Python writes them in the second protocol."""
    if encoding != "latin1":
        raise PickleRefusedError("it holds text in an unusual encoding")
    return bytes(expected(text, str).encode("latin1"))


REBUILDERS: dict[Global, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _first,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first,
    Global("torch._utils", "_rebuild_sparse_tensor"): _sparse,
    Global("torch._utils", "_rebuild_meta_tensor_no_storage"): _without_values,
    Global("torch._tensor", "_rebuild_from_type_v2"): _subclass,
    Global("torch.nn.parameter", "Parameter"): _first,
    Global("torch.nn", "Parameter"): _first,
    Global("torch", "Size"): _plain_tuple,
    Global("torch", "device"): _first,
    Global("torch.serialization", "_get_layout"): _first,
    Global("torch.jit._pickle", "build_intlist"): _first,
    Global("torch.jit._pickle", "build_doublelist"): _first,
    Global("torch.jit._pickle", "build_boollist"): _first,
    Global("torch.jit._pickle", "build_tensorlist"): _first,
    Global("torch.jit._pickle", "restore_type_tag"): _first,
    Global("collections", "OrderedDict"): _dictionary,
    Global("typing", "OrderedDict"): _dictionary,
    Global("collections", "Counter"): _dictionary,
    Global("_codecs", "encode"): _latin,
    Global("builtins", "set"): _set,
    Global("__builtin__", "set"): _set,
}
"""Of each name: what takes the allowance and the arguments of the call."""
