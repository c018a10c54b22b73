"""`lr.Dataset`: the latents of runs for training. Apart from `lrag_ray.api`, because it imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lrag_ray.store.latent_windows import LatentWindows

if TYPE_CHECKING:
    import ray.data


class Dataset(LatentWindows):
    """Latents of one or more runs for training: a map-style torch dataset, and a source of Ray Data::

    data = lr.Dataset.from_run("runs/latents", "s3://bucket/more", window=8)
    data[0]              # [8, 16, 60, 104]: 8 consecutive latent frames, in the stored precision
    data.latents.digest  # of all latents
    data.to_ray()        # the same items as a ray.data.Dataset
    """

    def to_ray(self) -> ray.data.Dataset:
        """The items as a Ray Data dataset with the columns latents, key, rollout and start.

        Arrow has no bfloat16: such latents are the same bits as float16.
        """
        from lrag_ray.engine.latent_source import latent_source

        return latent_source(self)
