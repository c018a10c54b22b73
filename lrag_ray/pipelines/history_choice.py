"""Where the histories of a run fit on a node of known size, and what to set where they do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lrag_ray.config.bank import BankSection
from lrag_ray.config.histories import history_frames, history_places, stored_frame_bytes
from lrag_ray.config.horizons import LATENT_FRAMES_PER_SECOND
from lrag_ray.config.methods import Method
from lrag_ray.config.schema import BackboneConfig, RunConfig
from lrag_ray.errors import ConfigError
from lrag_ray.retrieval.bank_types import BankType

HOST_SHARE = 0.85
"""Share of a node's memory that histories may take; the rest is for Ray, weights on their way, and page cache."""
GPU_SHARE = 0.9
"""Share of a GPU's memory that an actor may take; the rest is the CUDA context and fragmentation."""
OFFERED: tuple[BankType, ...] = ("exact", "int8", "int4")
"""Storage types that are proposed, most precise first."""


class Machine(NamedTuple):
    """A node."""

    host_bytes: int
    gpu_bytes: int
    """GPU memory of an actor: that of one GPU, or its share of one; 0 for a node without."""
    rollouts: int
    """Actors at a time, each with one rollout or those of a pass."""


class Choice(NamedTuple):
    """How a method's history fits on a node."""

    history: BankType
    bank: BankSection
    sentence: str


class HistoryNeed(NamedTuple):
    """A method's history on one backbone at the end of the longest rollout."""

    where: str
    """Name of the method and the backbone, for people."""
    key: str
    """Path of the setting."""
    backbone: BackboneConfig
    method: Method
    frames: int
    """Latent frames of the rollout."""
    actor_bytes: int
    """GPU memory of the actor without any history on the device."""
    per_actor: int = 1
    """Rollouts that an actor makes together (`engine.prompts_per_pass`)."""


def check_machine(needs: Sequence[HistoryNeed], config: RunConfig, machine: Machine) -> Iterator[str]:
    """One sentence per history: where it fits on `machine`.

    Raises ConfigError for histories that do not fit as configured, with settings that do.
    """
    wrong = []
    for need in needs:
        fits = _fits(need, need.method, config.engine.bank, machine, on_gpu=config.engine.gpus_per_actor > 0)
        if fits is not None:
            yield f"{need.where}: {fits}"
            continue
        chosen = choose(need, machine, config.engine.bank.disk)
        kept = _described(need, need.method, machine)
        wrong.append(f"{need.where}: {kept}: does not fit. Fix: {chosen.sentence if chosen else _nothing_fits(config)}")
    if wrong:
        raise ConfigError("\n".join(wrong))


def choose(need: HistoryNeed, machine: Machine, disk: str | None) -> Choice | None:
    """The most precise storage type that fits, in the fastest tiers; None where none does."""
    kinds = OFFERED if need.method.history == "exact" else (need.method.history,)
    for kind in kinds:
        method = need.method._replace(history=kind)
        for bank in _banks(need, method, machine):
            if (fits := _fits(need, method, bank, machine, on_gpu=machine.gpu_bytes > 0)) is not None:
                return Choice(kind, bank, f"{_settings(need, method, bank)} ({fits})")
    if disk is not None:
        method = need.method._replace(history=kinds[-1])
        host_bytes = HOST_SHARE * machine.host_bytes / (machine.rollouts * need.per_actor)
        bank = BankSection(host_gb=_whole_gb(host_bytes), disk=disk)
        if (fits := _fits(need, method, bank, machine, on_gpu=machine.gpu_bytes > 0)) is not None:
            return Choice(kinds[-1], bank, f"{_settings(need, method, bank)} ({fits})")
    return None


def _banks(need: HistoryNeed, method: Method, machine: Machine) -> Iterator[BankSection]:
    """Host memory alone, then as much of the device as is free, the rest in host memory."""
    yield BankSection()
    if machine.gpu_bytes:
        free = (GPU_SHARE * machine.gpu_bytes - need.actor_bytes) / need.per_actor
        history = stored_frame_bytes(need.backbone, method.history) * history_frames(need.backbone, method, need.frames)
        if free > 0:
            yield BankSection(device_gb=_whole_gb(min(free, history + 1e9)))


def _fits(need: HistoryNeed, method: Method, bank: BankSection, machine: Machine, *, on_gpu: bool) -> str | None:
    """Where the history is kept, in words; None where it does not fit."""
    places = history_places(need.backbone, method, need.frames, bank, on_gpu=on_gpu)
    rollouts = machine.rollouts * need.per_actor
    if places.homeless or places.host * rollouts > HOST_SHARE * machine.host_bytes:
        return None
    on_device = need.actor_bytes + need.per_actor * places.device
    if machine.gpu_bytes and on_device > GPU_SHARE * machine.gpu_bytes:
        return None
    host = "page-locked host memory" if on_gpu else "host memory"
    parts = [(places.device, "GPU memory"), (places.host, host), (places.disk, "a file on the local disk")]
    where = " and ".join(f"{nbytes / 1e9:.1f} GB in {name}" for nbytes, name in parts if nbytes)
    return f"{_described(need, method, machine)}: fits, {where}{' each' if rollouts > 1 else ''}"


def _described(need: HistoryNeed, method: Method, machine: Machine) -> str:
    seconds = need.frames / LATENT_FRAMES_PER_SECOND
    total = stored_frame_bytes(need.backbone, method.history) * history_frames(need.backbone, method, need.frames)
    rollouts = machine.rollouts * need.per_actor
    count = f"{rollouts} rollouts of {seconds:g} s" if rollouts > 1 else f"a rollout of {seconds:g} s"
    each = " each" if rollouts > 1 else ""
    gpus = f" and {machine.gpu_bytes / 1e9:.0f} GB of GPU memory per actor" if machine.gpu_bytes else ""
    return (
        f"{count} with {total / 1e9:.1f} GB of history{each} ({method.history}) on a node with "
        f"{machine.host_bytes / 1e9:.0f} GB{gpus}"
    )


def _settings(need: HistoryNeed, method: Method, bank: BankSection) -> str:
    settings = [f"{need.key}={method.history}"] if method.history != need.method.history else []
    given = bank.model_dump(exclude_defaults=True)
    settings += [f"engine.bank.{name}={value}" for name, value in given.items()]
    return f"--set {' --set '.join(settings)}" if settings else "leave engine.bank out"


def _nothing_fits(config: RunConfig) -> str:
    disk = "" if config.engine.bank.disk else ", a folder on a local disk in engine.bank.disk"
    return f"fewer actors on a node, shorter durations, nodes with more memory{disk}, or a method without a history"


def _whole_gb(nbytes: float) -> float:
    """Rounded down, as people write it."""
    return float(int(nbytes / 1e9)) if nbytes >= 1e9 else round(nbytes / 1e9, 3)
