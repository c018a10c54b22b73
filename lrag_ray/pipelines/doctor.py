"""What a run will find on this machine: packages, Ray, GPUs, weights, storage, video codec, disk and memory.

Every check really does the small thing that the run would do at length (connect, write, encode, map a checkpoint), and
says how to fix what fails. Nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from lrag_ray.chat.client import check_backend
from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.prompts import load_prompts, plan_prompts
from lrag_ray.config.refine import described
from lrag_ray.config.schema import RunConfig, StorageSection, WorkersSection
from lrag_ray.engine.cluster_address import cluster_address
from lrag_ray.errors import LragError
from lrag_ray.pipelines.history_choice import HOST_SHARE
from lrag_ray.pipelines.plan import Plan, make_plan
from lrag_ray.printable import counted, quantity
from lrag_ray.scoring.registry import suite_of
from lrag_ray.stages.refinement import read_template
from lrag_ray.store.address import Storage
from lrag_ray.video.mp4 import Mp4Writer, read_video
from lrag_ray.weights.local import is_remote, sizes_at
from lrag_ray.weights.needs import Need, needs_of
from lrag_ray.weights.verify import verify

PACKAGES = ("torch", "ray", "diffusers", "transformers", "av", "pyarrow", "fsspec")
LEAST_FREE_BYTES = 10e9
"""Free disk below which a machine is suspicious where no plan says what is needed."""
CUDA_CONTEXT_BYTES = 1.5e9
"""What a process takes of a GPU beside its tensors: context, cuBLAS and cuDNN work spaces."""


State = Literal["ok", "warn", "fail"]


class Row(NamedTuple):
    """One finding."""

    check: str
    state: State
    found: str
    fix: str = ""
    """What to do; empty where nothing is to be done or `found` says it."""


def examine(config: JobConfig | None = None, file: str = "CONFIG") -> Iterator[Row]:
    """All findings for this machine, and for `config` where one is given, in the order in which they matter.

    `file` is the configuration's, for the commands of fixes. One cause makes one row, whatever it is the cause of.
    """
    yield from _packages()
    engine = config.engine if config is not None else None
    yield _ray(engine)
    yield from _gpus(engine)
    if config is not None and not isinstance(config, RunConfig):
        # Imports Ray, which takes seconds.
        from lrag_ray.pipelines.doctor_training import examine_training

        yield from examine_training(config)
        return
    yield _video()
    if config is None:
        yield disk_row(Path.cwd(), None)
        return
    yield from _examine_run(config, file)


def _examine_run(config: RunConfig, file: str) -> Iterator[Row]:
    """What a run of rollouts needs."""
    plan = None
    try:
        prompts = load_prompts(config.prompts)
        yield Row("prompts", "ok", f"{len(prompts)} in {config.prompts.path}")
    except LragError as error:
        if not _is_pulled(config):
            yield Row("prompts", "fail", str(error).replace("CONFIG", file))
    # Without a number of prompts nothing can be planned; the row above says how to fix it.
    with suppress(LragError):
        plan = make_plan(config, plan_prompts(config.prompts))
    yield from _weights(config, file)
    yield from _scoring_networks(config)
    yield from _language_model(config)
    yield storage_row(config.run.uri, config.storage)
    if not is_remote(config.run.uri):
        needed = plan.totals.latent_bytes + plan.totals.video_bytes if plan is not None else None
        yield disk_row(Path(Storage(config.run.uri).root), needed)
    yield threads_row(config.engine)
    if plan is not None:
        yield _host_memory(config, plan)
        yield from _gpu_memory(config, plan)


def healthy(rows: list[Row]) -> bool:
    """Whether nothing failed."""
    return all(row.state != "fail" for row in rows)


def _packages() -> Iterator[Row]:
    found, absent = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    if absent:
        yield Row(
            "packages", "fail", f"missing: {', '.join(absent)}", "pip install --constraint constraints.txt '.[run]'"
        )
    else:
        yield Row("packages", "ok", ", ".join(found))


def _ray(engine: WorkersSection | None) -> Row:
    try:
        address = cluster_address(engine)
        if address is None:
            # Imports Ray, which takes seconds.
            from lrag_ray.engine.local_cluster import folder_for_ray

            folder_for_ray()
            return Row("ray", "ok", f"ray {version('ray')}; no cluster address given, a run starts a cluster here")
    except LragError as error:
        return Row("ray", "fail", str(error))
    if address.host is None:
        return Row("ray", "ok", f"ray {version('ray')}; a run uses the cluster of this machine")
    try:
        with socket.create_connection((address.host, address.port), timeout=5):
            return Row("ray", "ok", f"ray {version('ray')}; {address.text} answers")
    except OSError as error:
        fix = "start the cluster (`ray start --head`), or correct engine.address or RAY_ADDRESS"
        return Row("ray", "fail", f"the Ray cluster at {address.text} does not answer: {error}", fix)


def _gpus(engine: WorkersSection | None) -> Iterator[Row]:
    wanted = engine.gpus_per_actor if engine is not None else 0
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Row(f"gpu {index}", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
        if not torch.cuda.is_bf16_supported():
            yield Row("gpu", "warn", "these GPUs have no bfloat16", "set dtype: float32 in the backbones")
        return
    driver = _driver()
    if driver is not None:
        fix = f"install a driver for CUDA {torch.version.cuda}, or a torch built for this driver"
        yield Row("gpu", "fail", f"driver {driver} is there, but torch {torch.__version__} cannot use it", fix)
    elif wanted > 0:
        fix = "set engine.gpus_per_actor: 0 to run on CPUs, or run where the GPUs are"
        remote = bool(engine and engine.address)
        yield Row("gpu", "warn" if remote else "fail", f"none here, but engine.gpus_per_actor is {wanted:g}", fix)
    else:
        yield Row("gpu", "ok", "none; work runs on the CPU")


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver, or None."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((word for word in text.split() if word[0].isdigit() and "." in word), "of unknown version")


def _video() -> Row:
    """Encode and read back a few frames: PyAV brings its own libraries, no ffmpeg program is used."""
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    try:
        with tempfile.TemporaryDirectory() as folder:
            with Mp4Writer(Path(folder) / "probe.mp4") as writer:
                writer.write(frames)
            read = read_video(Path(folder) / "probe.mp4")
    except (LragError, OSError, ImportError, ValueError, RuntimeError) as error:
        fix = "install PyAV's own wheel (pip install 'av>=18'), which holds libx264"
        return Row("video codec", "fail", f"H.264 cannot be written: {type(error).__name__}: {error}", fix)
    return Row("video codec", "ok", f"H.264 written and read back through PyAV ({counted(len(read), 'frame')})")


def _is_pulled(config: RunConfig) -> bool:
    """Whether the prompts are a published file that is not here, which `_weights` says of all such files at once."""
    return any(need.kind == "prompts" and not sizes_at(need.address) for need in needs_of(config))


def _weights(config: RunConfig, file: str) -> Iterator[Row]:
    """Published files that are missing in one row, since one command gets them; a row for every other file."""
    absent: list[Need] = []
    for need in needs_of(config):
        if need.published is not None and not sizes_at(need.address):
            absent.append(need)
        elif need.kind != "prompts":
            verdict = verify(need, digests=False)
            named = verdict.detail if need.address in verdict.detail else f"{need.address}: {verdict.detail}"
            own = "" if need.published else " (your own file: not published under this name)"
            state: State = "ok" if verdict.ok else "fail"
            yield Row(need.kind.replace("_", " "), state, named.replace("CONFIG", file) + own)
    if absent:
        sizes = [need.published.size_bytes for need in absent if need.published is not None]
        paths = ", ".join(dict.fromkeys(need.address for need in absent))
        fix = f"lrag-ray weights pull {file}, or put them there yourself (lrag-ray weights list {file} says from where)"
        yield Row(
            "weights",
            "fail",
            f"{counted(len(absent), 'published file')} missing{_to_fetch(sizes)}: {paths}",
            fix,
        )


def _to_fetch(sizes: Sequence[int | None]) -> str:
    known = sum(size or 0 for size in sizes)
    unknown = sum(size is None for size in sizes)
    parts = [quantity(known, "B")] if known else []
    parts += [f"{unknown} of unknown size"] if unknown else []
    return f" ({' and '.join(parts)})" if parts else ""


def _scoring_networks(config: RunConfig) -> Iterator[Row]:
    """Whether every network that the suite would load has its file."""
    suite = suite_of(config.scoring)
    if suite is None:
        return
    needed = [file for file in suite.weight_files() if file.needed]
    try:
        suite.check_weights()
    except LragError as error:
        absent = [file for file in needed if not file.path.exists()]
        if not absent:
            yield Row("scoring networks", "fail", str(error))
            return
        names = ", ".join(file.name for file in absent)
        found = f"{len(absent)} of {counted(len(needed), 'file')} of {suite.label} missing"
        fix = f"{suite.pull_command}, set scoring.weights to the folder that has them, or set scoring.suite: preview"
        yield Row("scoring networks", "fail", f"{found}{_to_fetch([file.size_bytes for file in absent])}: {names}", fix)
    else:
        names = ", ".join(file.name for file in needed)
        yield Row("scoring networks", "ok", f"all files: {names}" if needed else f"{suite.label} needs no files")


def _language_model(config: RunConfig) -> Iterator[Row]:
    """Whether the model that refines prompts can be asked; it is not."""
    section = config.prompts.refine
    if section is None:
        return
    try:
        read_template(section)
        check_backend(section)
    except LragError as error:
        yield Row("prompt refinement", "fail", str(error))
    else:
        yield Row("prompt refinement", "ok", f"{described(section)}; the server was not asked")


def storage_row(uri: str, options: StorageSection) -> Row:
    """Whether results can be written to `uri`."""
    try:
        storage = Storage(uri, options)
        made = [] if not storage.is_local else [p for p in _and_parents(Path(storage.root)) if not p.exists()]
        probe = storage.probe()
        for folder in made:
            folder.rmdir()
    except LragError as error:
        return Row("storage", "fail", str(error))
    if not probe.create_only:
        fix = "let one driver work at a time, or use a store that honours If-None-Match"
        return Row("storage", "warn", f"{storage.uri} can be written, but creates the same file twice", fix)
    return Row("storage", "ok", f"{storage.uri} can be written and honours create-only writes")


def _and_parents(folder: Path) -> list[Path]:
    return [folder, *folder.parents]


def disk_row(folder: Path, stored_bytes: int | None) -> Row:
    """Whether `folder`, which may not exist yet, has room for what a job stores; None where that is not known."""
    folder = next(path for path in _and_parents(folder) if path.exists())
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.1f} GB free at {folder}"
    if stored_bytes is not None:
        found += f", the whole run stores about {quantity(stored_bytes, 'B')}"
    if free < (LEAST_FREE_BYTES if stored_bytes is None else stored_bytes):
        state: State = "warn" if stored_bytes is None else "fail"
        return Row("disk", state, found, "make room, or set run.uri to another place")
    return Row("disk", "ok", found)


def threads_row(engine: WorkersSection) -> Row:
    """Whether the actors' threads fit on this machine's cores."""
    cores = len(os.sched_getaffinity(0))
    actors = engine.most_actors or engine.least_actors
    threads = engine.threads_per_actor
    found = f"{counted(actors, 'actor')} of {counted(threads, 'torch thread')}, {counted(cores, 'core')} here"
    if engine.gpus_per_actor == 0 and not engine.address and actors * engine.threads_per_actor > cores:
        return Row("threads", "warn", found, "fewer engine.actors, or fewer engine.threads_per_actor")
    return Row("threads", "ok", found)


def _host_memory(config: RunConfig, plan: Plan) -> Row:
    """The histories of an actor's rollouts, if all actors were on this machine."""
    rollouts = config.engine.prompts_per_pass
    history = rollouts * max(method.history_bytes for method in plan.methods)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    held = f"the history of {counted(rollouts, 'rollout')} grows to {quantity(history, 'B')} per actor"
    found = f"{total / 1e9:.0f} GB; {held}"
    if history > HOST_SHARE * total:
        return Row(
            "host memory",
            "warn" if config.engine.address else "fail",
            found,
            "`lrag-ray plan CONFIG --node-memory-gb GB` chooses a smaller history (methods.NAME.history); or shorter "
            "durations, or nodes with more memory",
        )
    actors = config.engine.most_actors or config.engine.least_actors
    if history * actors > HOST_SHARE * total:
        return Row("host memory", "warn", found, f"{actors} such actors do not fit on one such machine")
    return Row("host memory", "ok", found)


def _gpu_memory(config: RunConfig, plan: Plan) -> Iterator[Row]:
    share = config.engine.gpus_per_actor
    if not torch.cuda.is_available() or share <= 0:
        return
    total = min(torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count()))
    largest = max(plan.methods, key=lambda method: method.gpu_bytes)
    needed = (largest.gpu_bytes + CUDA_CONTEXT_BYTES) / min(share, 1)
    actor = f"{largest.backbone}/{largest.method} needs {quantity(largest.gpu_bytes, 'B')}"
    found = f"{actor} and a CUDA context, of {total / 1e9:.0f} GB"
    fix = "a smaller window, video.enabled: false, or a larger engine.gpus_per_actor"
    yield Row("gpu memory", "ok", found) if needed < total else Row("gpu memory", "fail", found, fix)
