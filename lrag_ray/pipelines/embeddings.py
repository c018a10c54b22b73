"""Measures of an encoder on stored latents: everything that `lrag-ray inspect embeddings` does is `inspect_embeddings`.

Descriptors are named ``avg_pool``, ``random`` (the encoder with untrained weights) or by the checkpoint of an encoder;
``dino`` are DINO features of the decoded frames, which needs the run's videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrag_ray.context.rag import RagSettings
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.report.embeddings import EmbeddingMeasures, write_embeddings
from lrag_ray.retrieval.encoder import EncoderConfig, load_encoder
from lrag_ray.retrieval.measures import played_back, similarity_map
from lrag_ray.retrieval.similarity import Descriptor, average_pool
from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_files import first_not_finite
from lrag_ray.store.dataset_rows import LeftOut
from lrag_ray.store.datasets import LatentDataset, RolloutEntry
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.videos import committed_videos
from lrag_ray.training.loop import make_model
from lrag_ray.video.mp4 import frames_at
from lrag_ray.weights.local import local_copy

DINO = "dino"
FRAMES_PER_BLOCK = 3
_AT_ONCE = 32
"""Latent frames that are described at a time."""


@dataclass(frozen=True)
class InspectedEmbeddings:
    """What was measured and where it is."""

    folder: str
    files: Sequence[str]
    """The page first."""
    measures: Sequence[EmbeddingMeasures]
    left_out: Sequence[LeftOut]
    """Latents that could not be measured: something of their rollout is damaged, or they hold NaN or infinity."""


def inspect_embeddings(
    uri: str,
    descriptors: Sequence[str],
    *,
    prompts: Sequence[str] = (),
    most: int = 2,
    to: str | None = None,
    settings: RagSettings | None = None,
    frames_per_block: int = FRAMES_PER_BLOCK,
    networks: str | None = None,
) -> InspectedEmbeddings:
    """Measure the first `most` rollouts at `uri`, or those whose prompt contains one of `prompts`.

    Results go to `to`, else to ``summary/embeddings`` at `uri`. `networks` is the folder of VBench-Long's weights (for
    dino), or ``random``. Raises UsageError, StorageError and WeightsError.
    """
    dataset = LatentDataset.open(uri)
    settings = settings or RagSettings(encoder="-")
    describe = {name: _descriptor(name, dataset.shape) for name in dict.fromkeys(descriptors) if name != DINO}
    dino = _dino(networks) if DINO in descriptors else None
    chosen = _chosen(dataset, prompts)
    found: list[EmbeddingMeasures] = []
    left_out = list(dataset.left_out)

    def finite(entry: RolloutEntry, what: str, values: Tensor) -> bool:
        problem = first_not_finite(values)
        if problem:
            left_out.append(LeftOut(f"{entry.run}/{entry.rollout}", f"{what}: {problem}"))
        return not problem

    def add(entry: RolloutEntry, descriptor: str, embeddings: Tensor) -> None:
        if not finite(entry, f"descriptors of {descriptor}", embeddings):
            return
        retrieval = played_back(
            similarity_map(embeddings), frames_per_block=frames_per_block, sink=settings.sink, top_k=settings.top_k,
            recent_exclude=settings.recent_exclude, history=lambda start: settings.history(start, frames_per_block),
        )  # fmt: skip
        name = f"{entry.rollout} ({entry.prompt})" if entry.prompt else entry.rollout
        found.append(EmbeddingMeasures.of(name, descriptor, embeddings, retrieval))

    measured = 0
    for index in chosen:
        if measured == most:
            break
        before = len(found)
        entry = dataset.rollouts[index]
        latents = dataset.read(index).float()
        if not finite(entry, "latents", latents):
            continue
        for name, describe_frames in describe.items():
            with torch.no_grad():
                add(entry, name, torch.cat([describe_frames(part) for part in latents.split(_AT_ONCE)]))
        if dino is not None:
            with _video(uri, entry) as path:
                add(entry, DINO, dino(path, entry.frames))
        measured += len(found) > before
    if not found:
        raise UsageError(f"nothing to measure in {', '.join(dataset.uris)}{_named(left_out)}")
    folder = Storage(to) if to is not None else Storage(uri).below("summary/embeddings")
    files = write_embeddings(found, folder, ", ".join(dataset.uris))
    return InspectedEmbeddings(folder.uri, files, found, left_out)


def _chosen(dataset: LatentDataset, prompts: Sequence[str]) -> Sequence[int]:
    if not prompts:
        return range(len(dataset))
    wanted = [text.lower() for text in prompts]
    chosen = [i for i, entry in enumerate(dataset.rollouts) if any(text in entry.prompt.lower() for text in wanted)]
    if not chosen:
        raise UsageError(
            f"no prompt of {', '.join(dataset.uris)} contains {' or '.join(map(repr, prompts))}"
            f"{_named(dataset.left_out)}"
        )
    return chosen


def _named(left_out: Sequence[LeftOut]) -> str:
    return "".join(f"\nleft out: {each}" for each in left_out)


def _descriptor(name: str, shape: tuple[int, int, int]) -> Descriptor:
    """Latent frames [n, C, H, W] to un-normalised descriptors [n, D]."""
    if name == "avg_pool":
        return average_pool
    if name == "random":
        channels, height, width = shape
        model = make_model(EncoderConfig(channels, height, width), seed=0).eval()
    else:
        model = load_encoder(local_copy(name))
        sizes = model.config
        if (sizes.in_channels, sizes.spatial_h, sizes.spatial_w) != shape:
            raise UsageError(
                f"the encoder {name} is for latents {[sizes.in_channels, sizes.spatial_h, sizes.spatial_w]}, and these "
                f"are {list(shape)}. Fix: name an encoder that was trained on latents of this shape"
            )
    return lambda latents: model.encode(latents, normalize=False)


def _dino(folder: str | None) -> Callable[[Path, int], Tensor]:
    """From a video and its number T of latent frames to DINO features [T, D] of the last video frame of each."""
    from lrag_ray.scoring.vbench_long.networks import Networks
    from lrag_ray.scoring.vbench_long.preprocess import ClipFrames
    from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
    from lrag_ray.scoring.vbench_long.subject_consistency import features
    from lrag_ray.scoring.vbench_long.weights import WeightFiles

    networks = Networks(RandomWeights() if folder == "random" else WeightFiles(Path(folder) if folder else None))

    def describe(path: Path, latent_frames: int) -> Tensor:
        frames = list(frames_at(path, [4 * frame for frame in range(latent_frames)]))
        with torch.no_grad():
            return features(ClipFrames(frames, 16, torch.device("cpu")), networks)

    return describe


@contextmanager
def _video(uri: str, entry: RolloutEntry) -> Iterator[Path]:
    run = RolloutRun(uri)
    if run.read() is None:
        raise UsageError(
            f"{uri} was imported and has no videos, and {DINO} needs decoded frames. Fix: name the run that made them"
        )
    for video in committed_videos(run):
        if video.rollout.path == entry.rollout and video.latent_frames >= entry.frames:
            with scratch_folder() as folder:
                path = folder / "video.mp4"
                run.storage.get_file(video.video.path, path)
                yield path
            return
    for state in run.inventory().commits.get(entry.rollout, {}).values():
        if state.problem is not None:
            raise StorageError(
                f"{run.uri}/{state.path} does not count: {state.problem}. Fix: the command that made the run makes it "
                "again"
            )
    raise UsageError(f"{entry.rollout} has no video, and {DINO} needs decoded frames. Fix: lrag-ray decode {uri}")
