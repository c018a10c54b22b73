"""What is left to do of a run's rollouts: its identity minus what storage holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lrag_ray.stages.rollout.worker import RolloutTask, stored_pieces
from lrag_ray.stages.spec import Task
from lrag_ray.store.identity import RunIdentity, canonical_digest
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import CommitState, Inventory


@dataclass(frozen=True)
class PendingRollouts:
    """Rollouts that miss a commit."""

    tasks: list[Task[RolloutTask]]
    """Prompt-major: all backbones and methods of a prompt stand together."""
    invalid: list[CommitState]
    """Commits of these rollouts that do not count and stand in the way of new ones."""
    commits_total: int
    """Horizons of all rollouts of the configuration, done ones included."""
    blocks: int
    """Blocks to generate, about: stored parts are counted by their names and not yet checked."""

    @property
    def commits_open(self) -> int:
        """Horizons without a commit."""
        return sum(len(task.payload.horizons) for task in self.tasks)


def pending_rollouts(
    identity: RunIdentity, inventory: Inventory, history_bytes: Callable[[str, str, int], int]
) -> PendingRollouts:
    """Rollouts of `identity` with the horizons that have no valid commit of their own.

    `history_bytes(backbone, method, latent_frames)` is the host memory that histories of an actor need at their end.

    A cell is done as soon as a longer commit covers it; its own commit is made all the same, because it names the
    video of that length. From stored parts that costs a decode and no pass of the transformer.
    """
    tasks: list[Task[RolloutTask]] = []
    invalid: list[CommitState] = []
    total = blocks = 0
    samples = range(identity.samples)
    for order, (prompt_id, sample) in enumerate((prompt_id, k) for prompt_id in identity.prompts for k in samples):
        for name, backbone in identity.backbones.items():
            horizons = sorted({horizon.latent_frames for horizon in backbone.horizons})
            for method_name, method in identity.methods.items():
                rollout = RolloutId(backbone=name, method=method_name, prompt_id=prompt_id, sample=sample)
                total += len(horizons)
                states = inventory.commits.get(rollout.path, {})
                missing = tuple(h for h in horizons if h not in states or states[h].problem is not None)
                invalid += [states[h] for h in missing if h in states]
                stored = inventory.frames_stored(rollout)
                # A method that is not nested makes each duration as a rollout of its own.
                for group in [missing] if method.nested and missing else [(h,) for h in missing]:
                    blocks += max(0, group[-1] - (stored if method.nested else 0)) // backbone.frames_per_block
                    task = RolloutTask(
                        rollout=rollout,
                        rollout_key=identity.rollout_key(rollout, group[-1]),
                        prompt=identity.prompts[prompt_id].text,
                        text_digest=canonical_digest(backbone.latents["text_encoder"]),
                        weights_digest=canonical_digest(backbone.latents["weights"]),
                        horizons=group,
                    )
                    tasks.append(
                        Task(
                            key=f"{rollout.path}/{group[-1]}",
                            payload=task,
                            order=order,
                            group=name,
                            name=rollout.path,
                            memory=history_bytes(name, method_name, group[-1]),
                            progress=stored_pieces(inventory, rollout),
                            batch=f"{name}/{method_name}/{group[-1]}",
                        )
                    )
    return PendingRollouts(tasks, invalid, total, blocks)
