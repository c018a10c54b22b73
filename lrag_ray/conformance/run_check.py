"""What any run can check of itself, on whatever weights: base and ∞-RoPE part when the window fills, not before.

Until the window is full, window-relative indices are the absolute ones, so both methods make the same latents, bit for
bit; from the first block that drops a frame on, the sink's temporal distance differs. A run that holds both methods
with equal window and sink shows by this that noise, prompts and context assembly are the same for all methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from lrag_ray.conformance.case import CaseResult, Status
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.parts import BrokenPartError, read_latents
from lrag_ray.store.records import HOW_TO_REPAIR, Commit, RolloutId
from lrag_ray.store.rollouts import Inventory, RolloutRun


def check_run(uri: str) -> list[CaseResult]:
    """Compare every base rollout with its ∞-RoPE twin over the latent frames that both have committed.

    Raises UsageError where the run holds no such pair, StorageError where there is no run.
    """
    run_dir = RolloutRun(uri)
    identity = run_dir.require()
    pairs = list(_comparable(identity))
    if not pairs:
        raise UsageError(
            f"{run_dir.uri} has no base and infinity_rope setting with equal window and sink to compare: "
            "add both under methods and run it again"
        )
    inventory = run_dir.inventory()
    rows = []
    for (base, relative), backbone in product(pairs, identity.backbones):
        stored = dict.fromkeys((r.prompt_id, r.sample) for r in identity.rollouts_at(inventory.commits))
        for prompt_id, sample in stored:
            twins = [
                _longest(inventory, RolloutId(backbone=backbone, method=method, prompt_id=prompt_id, sample=sample))
                for method in (base, relative)
            ]
            if twins[0] is not None and twins[1] is not None:
                window = _frames_until_full(identity, backbone, base)
                rows.append(_compare(run_dir, twins[0], twins[1], window))
    return rows


def _comparable(identity: RunIdentity) -> Iterator[tuple[str, str]]:
    """Names of base and infinity_rope settings with the same values."""
    for (a, base), (b, relative) in product(identity.methods.items(), identity.methods.items()):
        if (base.method, relative.method) == ("base", "infinity_rope") and base.settings == relative.settings:
            yield a, b


def _frames_until_full(identity: RunIdentity, backbone: str, method: str) -> int | None:
    """Latent frames of the blocks that fit into the window, or None where every frame does."""
    window, block = int(identity.methods[method].settings["window"]), identity.backbones[backbone].frames_per_block
    return None if window == -1 else window // block * block


def _longest(inventory: Inventory, rollout: RolloutId) -> Commit | None:
    commits = inventory.valid_commits(rollout)
    return commits[max(commits)] if commits else None


def _compare(run_dir: RolloutRun, base: Commit, relative: Commit, full: int | None) -> CaseResult:
    frames = min(base.latent_frames, relative.latent_frames)
    ours, theirs = (_latents(run_dir, commit)[:frames] for commit in (base, relative))
    equal = frames if full is None else min(frames, full)
    difference = (ours[:equal].double() - theirs[:equal].double()).abs().max().item()
    status: Status
    if difference > 0:
        status, reason = "fail", f"the first {equal} latent frames differ although the window is not full yet"
    elif frames > equal and torch.equal(ours[equal:], theirs[equal:]):
        status, reason = "fail", f"latent frames {equal} to {frames - 1} are equal although the window is full"
    elif frames == equal:
        status, reason = "pass", f"equal over all {frames} latent frames; none is behind a full window"
    else:
        status, reason = "pass", f"equal up to latent frame {equal - 1}, different after"
    case = f"{base.rollout.method} ~ {relative.rollout.method}, {base.rollout.prompt_id}-{base.rollout.sample}"
    return CaseResult(base.rollout.backbone, case, "latents", difference, 0.0, status, reason)


def _latents(run_dir: RolloutRun, commit: Commit) -> Tensor:
    """Latents [frames, C, H, W] of a commit. Raises StorageError where a file is not what the commit recorded."""
    try:
        return torch.cat([read_latents(run_dir.storage, part) for part in commit.latent_parts])
    except BrokenPartError as error:
        raise StorageError(f"{run_dir.uri}: {error}. {HOW_TO_REPAIR}") from None
