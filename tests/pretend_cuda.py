"""A CUDA device without a GPU: tensors that say cuda:0 and compute on the CPU.

A kernel that gets tensors of both devices raises. Noted is what a real device would wait for or not forgive:

- `waits`: what stops the host until the device is done: blocking copies, copies from pageable memory, asked values;
- `races`: memory that one stream uses while another may still write it, or that is given back without `record_stream`.

It cannot tell whether a kernel exists, is quick, or computes what the CPU does: tests/rollout/test_gpu.py does.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrag_ray.wan import fp8, fused_rows, norm_silu, residual_norm
from lrag_ray.wan.rope import Angles, rotate
from lrag_ray.wan.transformer import Projected

_NEEDS_VALUES = ("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default")
_attention = F.scaled_dot_product_attention


class OnDevice(Tensor):
    """Says cuda:0; its values are `held` on the CPU."""

    held: Tensor
    device_of: Device

    @staticmethod
    def __new__(cls, held: Tensor, device_of: Device) -> OnDevice:
        shape: Any = (held.shape, held.stride(), held.storage_offset())
        make: Any = Tensor._make_wrapper_subclass
        made: OnDevice = make(cls, *shape, dtype=held.dtype, device="cuda:0")
        made.held, made.device_of = held, device_of
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        device = next(leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, OnDevice)).device_of
        return device.call(func, args, kwargs or {})


class Event:
    """A moment of a stream; for the host nothing is ever done but what it waited for."""

    def __init__(self, **_: Any) -> None:
        self.done: dict[Stream, int] = {}

    def record(self, stream: Stream) -> None:
        self.done = dict(stream.done)

    def synchronize(self) -> None:
        _learn(Stream.host, self.done)

    def query(self) -> bool:
        return False


class Stream:
    """Calls in order. `done` counts the calls, by stream, that have ended before its next one begins."""

    host: ClassVar[dict[Stream, int]] = defaultdict(int)

    def __init__(self, device: Any = None) -> None:
        self.done: dict[Stream, int] = defaultdict(int)

    def wait_event(self, event: Event) -> None:
        _learn(self.done, event.done)

    def wait_stream(self, other: Stream) -> None:
        _learn(self.done, other.done)

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event


def _learn(clock: dict[Stream, int], other: dict[Stream, int]) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock[stream], count)


class _Memory:
    """Who used a piece of device memory last."""

    def __init__(self, owner: Stream) -> None:
        self.owner = owner
        self.written: dict[Stream, int] = {}
        self.used: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()


class Device(TorchDispatchMode):
    """Sees every call of torch while `pretend_cuda` lasts."""

    locked: ClassVar[set[int]] = set()
    """Addresses of page-locked host memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream()
        self.waits: list[str] = []
        self.waited: list[Stream] = []
        """The stream of each of them."""
        self.races: list[str] = []
        self.calls: list[tuple[Any, ...]] = []
        """Every kernel: its name, and shapes, strides, types and alignments of what it gets."""
        self.attended: list[tuple[str, int, int]] = []
        """Every attention: its kernel, queries and keys."""
        self.crossed: list[tuple[Stream, int]] = []
        """Copies over the bus: their stream and bytes."""
        self._memory: dict[int, _Memory] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            return self.call(func, args, kwargs)
        locks = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        return self.lock(made) if locks else made

    def lock(self, host: Tensor) -> Tensor:
        """Let the device copy from and to this host memory by itself."""
        self.locked.add(host.untyped_storage().data_ptr())
        return host

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What a call with tensors of the device, or one that makes them, does."""
        name, arguments, aliases = _signature(func)
        if name == "aten._to_copy.default":
            return self._to_copy(args[0], **kwargs)
        if name == "aten.copy_.default":
            return self._copy(args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        if name.startswith("aten._scaled_dot_product_"):
            return self._attend(func, *args[:3])
        leaves = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        if any(leaf.dim() for leaf in leaves if not isinstance(leaf, OnDevice)):
            raise RuntimeError(f"{name}: tensors of the device and of the host")
        if name in _NEEDS_VALUES:
            self._wait(name)
        given = [*args, *(kwargs.get(argument) for argument, _ in arguments[len(args) :])]
        written = [a for a, (_, writes) in zip(given, arguments, strict=True) if writes and a is not None]
        is_view = not written and aliases
        if not is_view:
            self._launch(name, ours, written)
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        result = func(*_mapped(_held, args), **{key: _mapped(_held, value) for key, value in kwargs.items()})
        known = {id(tensor.held): tensor for tensor in ours}

        def own(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return known[id(x)] if id(x) in known else self._own(x, not is_view)

        return _mapped(own, result)

    def _attend(self, func: Any, q: OnDevice, k: OnDevice, v: OnDevice) -> list[Any]:
        """One kernel here whatever the CPU makes of it; nobody reads what it returns beside its output."""
        self._launch("attention", [q, k, v], [])
        kernel = str(func).split("_attention")[0].removeprefix("aten._scaled_dot_product_")
        self.attended.append((kernel, q.shape[2], k.shape[2]))
        out = self._own(_attention(*map(_held, (q, k, v))), True)
        return [out if str(each.type) == "Tensor" else 0 for each in func._schema.returns]

    def write_rows(
        self, projected: Projected, angles: Angles, k_out: Tensor, v_out: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The kernel of `wan.fused_rows`, by the plain operations."""
        q, k, v, norm_q, norm_k, _ = projected
        self._launch("fused rows", [q, k, v, norm_q.weight, norm_k.weight, angles.turns, k_out, v_out], [k_out, v_out])
        shape, turns = k_out.shape, Angles(_held(angles.turns))
        q, k = (
            F.rms_norm(_held(x), x.shape[-1:], eps=norm.eps).mul_(_held(norm.weight)).view(shape)
            for x, norm in ((q, norm_q), (k, norm_k))
        )
        _held(k_out).copy_(rotate(k, turns))
        _held(v_out).copy_(_held(v).view(shape))
        return self._own(rotate(q, turns), True), self._own(k, True) if keep else None

    def residual_norm(
        self, x: Any, y: Any = None, gate: Any = None, norm: Any = None, shift: Any = None, scale: Any = None
    ) -> Any:
        """The kernel of `wan.residual_norm`, by the plain operations."""
        self._launch("residual norm", [each for each in (x, y, gate, shift, scale) if each is not None], [x])
        summed = residual_norm.plain(_held(x), None if y is None else _held(y).clone(), _held(gate))
        if norm is None:
            return x
        normed = F.layer_norm(summed, x.shape[-1:], _held(norm.weight), _held(norm.bias), norm.eps)
        if shift is not None:
            normed.unflatten(1, (shift.shape[1], -1)).mul_(_held(scale)).add_(_held(shift))
        return self._own(normed, True)

    def norm_silu(self, x: Any, gamma: Any, bias: Any) -> Any:
        """The kernel of `wan.norm_silu`, by the plain operations."""
        self._launch("norm and SiLU", [each for each in (x, gamma, bias) if each is not None], [])
        normed = F.normalize(_held(x).float(), dim=1) * x.shape[1] ** 0.5 * _held(gamma).float()
        made = F.silu(normed if bias is None else normed + _held(bias).float()).to(x.dtype)
        return self._own(made.contiguous(memory_format=torch.channels_last_3d), True)

    def rounded(self, x: Any) -> fp8.Rounded:
        """The kernel of `wan.fp8`, by the plain operations."""
        self._launch("round to fp8", [x], [])
        return fp8.Rounded(*(self._own(each, True) for each in fp8.plainly_rounded(_held(x))))

    def record(self, tensor: OnDevice, stream: Stream) -> None:
        """`Tensor.record_stream`."""
        self._of(tensor.held).recorded.add(stream)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """`torch.cuda.stream`."""
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def _to_copy(
        self, x: Tensor, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
    ) -> Tensor:
        to_cuda = torch.device(device or x.device).type == "cuda"
        if isinstance(x, OnDevice) and to_cuda:
            self._launch("cast", [x], [])
            return self._own(x.held.to(dtype, copy=True), True)
        room = torch.empty_like(_held(x), dtype=dtype)
        return self._copy(self._own(room, True) if to_cuda else room, x.to(room.dtype), non_blocking)

    def _copy(self, to: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        for host in (x for x in (to, source) if not isinstance(x, OnDevice)):
            if not non_blocking or host.untyped_storage().data_ptr() not in self.locked:
                self._wait(f"copy of {host.numel()} values")
        if not (isinstance(to, OnDevice) and isinstance(source, OnDevice)):
            self.crossed.append((self.stream, to.numel() * to.element_size()))
        self._launch("copy", [x for x in (to, source) if isinstance(x, OnDevice)], [to])
        _held(to).copy_(_held(source))
        return to

    def _wait(self, why: str) -> None:
        self.waits.append(why)
        self.waited.append(self.stream)
        _learn(Stream.host, self.stream.done)

    def _launch(self, name: str, tensors: list[Any], written: list[Any]) -> None:
        seen = [(x.shape, x.stride(), x.dtype, x.storage_offset() * x.element_size() % 64) for x in tensors]
        self.calls.append((name, *seen))
        _learn(self.stream.done, Stream.host)
        self.stream.done[self.stream] += 1
        for tensor in tensors:
            self._use(name, tensor.held, any(tensor is other for other in written))

    def _use(self, name: str, held: Tensor, write: bool) -> None:
        memory, now = self._of(held), self.stream
        if any(now.done[stream] < count for stream, count in (memory.used if write else memory.written).items()):
            self.races.append(name)
        memory.used[now] = now.done[now]
        if write:
            memory.written = {now: now.done[now]}

    def _own(self, held: Tensor, new: bool) -> OnDevice:
        if new:
            self._use("new", held, True)
        return OnDevice(held, self)

    def _of(self, held: Tensor) -> _Memory:
        storage = held.untyped_storage()
        key = storage._cdata
        if key not in self._memory:
            self._memory[key] = _Memory(self.stream)
            weakref.finalize(storage, self._free, key).atexit = False
        return self._memory[key]

    def _free(self, key: int) -> None:
        memory = self._memory.pop(key)
        for stream, count in memory.used.items():
            if stream is not memory.owner and stream not in memory.recorded and memory.owner.done[stream] < count:
                self.races.append("given back too early")

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        """Of `torch.cuda.cudart`."""
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        """Of `torch.cuda.cudart`."""
        self.locked.remove(address)
        return 0


def _held(x: Any) -> Any:
    return x.held if isinstance(x, OnDevice) else x


@cache
def _signature(func: Any) -> tuple[str, list[tuple[str, bool]], bool]:
    """Name of an operation, its arguments and whether it writes each, and whether it may return a view."""
    schema = func._schema
    arguments = [(of.name, bool(of.alias_info and of.alias_info.is_write)) for of in schema.arguments]
    return str(func), arguments, any(of.alias_info for of in schema.returns)


def _leaves(x: Any) -> Iterator[Any]:
    """What is in nested lists, tuples and dictionaries; torch's own pytrees take as long as the operations here."""
    if isinstance(x, (list, tuple, dict)):
        for each in x.values() if isinstance(x, dict) else x:
            yield from _leaves(each)
    else:
        yield x


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """`function` of each leaf, in lists and tuples as they were."""
    if isinstance(x, (list, tuple)):
        made = [_mapped(function, each) for each in x]
        return made if isinstance(x, list) else tuple(made)
    return function(x)


@contextmanager
def pretend_cuda() -> Iterator[Device]:
    """The device, for as long as the block lasts, in this thread."""
    device = Device()
    # As torch's own FakeTensorMode does where there is no driver.
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", device.on)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", lambda of=None: device.stream)
        patch.setattr(torch.cuda, "synchronize", lambda of=None: _learn(Stream.host, device.stream.done))
        patch.setattr(torch.cuda, "cudart", lambda: device)
        patch.setattr(Tensor, "pin_memory", lambda x: device.lock(x.clone()))
        patch.setattr(Tensor, "record_stream", lambda x, stream: device.record(x, stream))
        patch.setattr(fused_rows, "refusal", lambda of: None)
        patch.setattr(fused_rows, "write_rows", device.write_rows)
        patch.setattr(residual_norm, "refusal", lambda of: None)
        patch.setattr(residual_norm, "fused", device.residual_norm)
        patch.setattr(norm_silu, "refusal", lambda of: None)
        patch.setattr(norm_silu, "fused", device.norm_silu)
        patch.setattr(fp8, "kernel_refusal", lambda of: None)
        patch.setattr(fp8, "_rounded_at_once", device.rounded)
        patch.setattr(torch.cuda, "get_device_capability", lambda of=None: (9, 0))
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        patch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        with device:
            yield device
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch._C._set_only_lift_cpu_tensors(False)
