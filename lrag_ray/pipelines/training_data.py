"""Which rollouts of a dataset an encoder training takes, and how they are split."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import numpy as np

from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.errors import IdentityError, UsageError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.training.windows import Rollouts, in_validation

_MOST_NAMED = 8


def training_rollouts(
    dataset: LatentDataset,
    config: TrainEncoderConfig,
    stored: Rollouts | None,
    note: Callable[[str], None],
    warn: Callable[[str], None],
) -> Rollouts:
    """`stored`, the rollouts that were fixed when the training began; for a new training those it would take.

    `note` and `warn` receive what a person should know. Raises IdentityError where the dataset lacks a stored rollout,
    and UsageError for short rollouts that are not to be left out and for an empty split.
    """
    if stored is None:
        return _new_rollouts(dataset, config, warn)
    frames = dict(zip(dataset.keys, dataset.frames.tolist(), strict=True))
    lost = [key for key, count in zip(stored.keys, stored.frames, strict=True) if frames.get(key, 0) < count]
    if lost:
        raise IdentityError(
            f"{Storage(config.run.uri, config.storage).uri} was begun with {counted(len(stored.keys), 'rollout')}, and "
            f"{len(lost)} of them are not in data.uris any more or have become shorter: "
            f"{', '.join(key[:12] for key in lost[:_MOST_NAMED])}. Two "
            "ways out: name all datasets that it began with, or set run.uri to a new address"
        )
    if newer := len(frames) - len(stored.keys):
        note(
            f"{counted(newer, 'rollout')} of the dataset came after this training began, or had been left out: it goes "
            "on without them. A new training (another run.uri) takes them"
        )
    return stored


def _new_rollouts(dataset: LatentDataset, config: TrainEncoderConfig, warn: Callable[[str], None]) -> Rollouts:
    """The rollouts that are long enough, in order of their keys, so that windows do not depend on a dataset's layout.

    `warn` receives what a person should know. Raises UsageError for short rollouts that are not to be left out, and
    for an empty split.
    """
    data, length = config.data, config.data.window_frames
    for each in dataset.left_out[:_MOST_NAMED]:
        warn(f"left out: {each}")
    if unnamed := len(dataset.left_out[_MOST_NAMED:]):
        warn(f"left out: {unnamed} more (`lrag-ray dataset verify {shlex.join(data.uris)}` lists them)")
    keys, first = np.unique(np.array(dataset.keys, dtype=object), return_index=True)
    frames = dataset.frames[first]
    if short := np.flatnonzero(frames < length).tolist():
        entries = [dataset.rollouts[int(first[at])] for at in short[:_MOST_NAMED]]
        named = ", ".join(f"{entry.run}/{entry.rollout} ({counted(entry.frames, 'frame')})" for entry in entries)
        more = f" and {len(short) - len(entries)} more" if len(short) > len(entries) else ""
        text = (
            f"{len(short)} of {counted(len(keys), 'rollout')} {'is' if len(short) == 1 else 'are'} shorter than "
            f"data.window_frames {length}: {named}{more}"
        )
        if data.short_rollouts == "refuse":
            raise UsageError(
                f"{text}. Fix: data.short_rollouts: skip leaves them out; a smaller data.window_frames takes them"
            )
        warn(f"left out: {text}")
    kept = frames >= length
    validation = np.array([in_validation(key, data.validation_fraction) for key in keys], dtype=bool)
    rollouts = Rollouts(keys[kept].tolist(), frames[kept].astype(np.int64), validation[kept])
    held_out = int(rollouts.validation.sum())
    training = len(rollouts.keys) - held_out
    if not training or (data.validation_fraction and not held_out):
        empty = "validation" if training else "training"
        raise UsageError(
            f"none of the {counted(len(rollouts.keys), 'rollout')} of {', '.join(data.uris)} falls into the "
            f"{empty} split at "
            f"data.validation_fraction {data.validation_fraction:g}: the split follows from each rollout's digest. "
            "Fix: more rollouts, another fraction, or 0 to train on all of them"
        )
    if training < config.training.batch_size:
        warn(
            f"the training split has {counted(training, 'rollout')}, fewer than training.batch_size "
            f"{config.training.batch_size}: each epoch is one step with a batch of {training}"
        )
    return rollouts
