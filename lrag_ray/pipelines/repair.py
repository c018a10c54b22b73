"""What ``lrag-ray run CONFIG --repair`` does before the run continues: what is damaged is made again, and nothing else.

The whole run is read back first (`lrag_ray.store.integrity`). Then, by kind:

- Latents, traces and videos of commits are made again in their place, where the same bytes come out; the commits stay.
- A damaged commit is set aside (renamed, see `lrag_ray.store.rollouts`) and made again from the parts of its rollout,
  and so is one whose files come out with other bytes but equal latents. Latents that come out as others are left alone
  and reported: the run then needs the kind of device that made them.
- Part records are written again from the commit that names their part; text features are encoded again; score files
  are set aside and their videos scored again; the report is written again.
- Answers of language models are set aside and asked for again, where they are still needed.
- Failure records are set aside: what failed is tried again anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lrag_ray.config.schema import RunConfig, VideoSection
from lrag_ray.config.vae import COMPUTES
from lrag_ray.errors import IdentityError
from lrag_ray.events import Event, TaskFinished
from lrag_ray.pipelines.job import Job
from lrag_ray.pipelines.scoring import RunScoring
from lrag_ray.pipelines.text_features import TextFeatures
from lrag_ray.stages.backbone import pixels_identity
from lrag_ray.stages.decode import DecodeStage, DecodeTask
from lrag_ray.stages.rollout.restore import Damaged, Restored
from lrag_ray.stages.rollout.worker import RolloutResult, RolloutStage, RolloutTask
from lrag_ray.stages.spec import Task
from lrag_ray.store.dataset_card import CARD_FILE
from lrag_ray.store.dataset_index import MANIFEST_FILE
from lrag_ray.store.decoded import DecodedVideos, decode_settings, own_settings, read_decoded, settings_folder
from lrag_ray.store.embeddings import embedding_path
from lrag_ray.store.identity import RunIdentity, canonical_digest
from lrag_ray.store.integrity import Coverage, Damage, find_damage
from lrag_ray.store.records import Commit, PartRecord, RolloutId
from lrag_ray.store.rollouts import Inventory, RolloutRun
from lrag_ray.store.run_dir import RUN_FILE
from lrag_ray.weights.verify import refuse_misfits


@dataclass
class RepairPlan:
    """What is to be done about the damage of a run."""

    restores: list[Task[RolloutTask]] = field(default_factory=list)
    """Files of commits to make again in their place."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Files that do not count any more: the reason, by path."""
    part_records: list[PartRecord] = field(default_factory=list)
    """To be written again."""
    remove: list[str] = field(default_factory=list)
    """Files that every start writes."""
    scores: list[str] = field(default_factory=list)
    texts: dict[tuple[str, str], str] = field(default_factory=dict)
    """(Text encoder, prompt) to encode again: a backbone with that encoder."""
    decoded: list[Damage] = field(default_factory=list)
    beyond: dict[str, str] = field(default_factory=dict)
    """What this configuration cannot make again: the reason, by path."""


class Repair:
    """The repair of one start."""

    def __init__(
        self,
        job: Job[Any],
        run: RolloutRun,
        config: RunConfig,
        identity: RunIdentity,
        scoring: RunScoring,
        texts: TextFeatures,
        history_bytes: Callable[[str, str, int], int],
    ) -> None:
        self._job = job
        self._run = run
        self._config = config
        self._identity = identity
        self._scoring = scoring
        self._texts = texts
        self._history_bytes = history_bytes
        self._former: dict[tuple[RolloutId, int], str] = {}
        """Digests of commits that were set aside with equal latents to be made again."""

    def make_again(self, connect: Callable[[], None]) -> None:
        """Find what is damaged and make it again, or clear its place; `connect` reaches Ray where that needs it.

        What cannot be made again is missing from the job.
        """
        with self._job.stage("verify"):
            damage = list(find_damage(self._run, Coverage())) if self._run.exists() else []
        for found in damage:
            self._job.warn(f"{found.path}: {found.what}")
        if not damage:
            self._job.note("every stored file is what was written")
            return
        refuse_misfits(self._config)
        if self._run.is_damaged():
            kept = self._run.set_aside(RUN_FILE)
            self._job.warn(
                f"{RUN_FILE} is kept as {kept} and made again from this configuration: prompts, methods and durations "
                "of other starts belong to the run again once they are run again"
            )
        identity = self._run.ensure(self._identity)
        inventory = self._run.inventory()
        self._run.refuse_foreign_commits(identity, inventory)
        commits = {
            folder: [state.commit for state in states.values() if state.commit is not None]
            for folder, states in inventory.commits.items()
        }
        # Only what the configuration has can be made again with it.
        plan = plan_repair(damage, self._identity, inventory, commits, self._history_bytes)
        for path in plan.set_aside:
            if path in inventory.files or not path.startswith("rollouts/"):
                self._set_aside(path, plan.set_aside[path])
        for record in plan.part_records:
            self._run.storage.write(f"{record.latents.path.removesuffix('.safetensors')}.json", record.sealed())
        self._run.storage.remove_many(plan.remove)
        self._scoring.set_aside_damaged(plan.scores, self._job.report)
        for path in plan.scores:
            if self._scoring.suite is None or not path.startswith(f"{self._scoring.suite.folder}/"):
                plan.beyond[path] = (
                    "scores or answers of another suite than the configuration's: run with that scoring section"
                )
        if plan.restores or plan.texts:
            connect()
            self._texts.encode(plan.texts)
            self._restore(plan.restores)
        for stage, tasks in decode_stages(self._run, self._config, self._identity, plan, self._set_aside):
            connect()
            self._job.run_stage(stage, tasks)
        for path, reason in plan.beyond.items():
            self._job.missing[path] = reason
            self._job.warn(f"{path} cannot be made again: {reason}")

    def _restore(self, tasks: Sequence[Task[RolloutTask]]) -> None:
        """Make damaged files again in their place; commits of which that gives other bytes are set aside."""
        results: dict[str, Restored] = {}

        def listen(event: Event) -> None:
            self._job.report(event)
            if isinstance(event, TaskFinished) and isinstance(event.result, RolloutResult) and event.result.restored:
                results.setdefault(event.task, event.result.restored)

        tasks = self._texts.encode_prompts(tasks)
        stage = RolloutStage.of(self._run, self._config)
        quarantined = {task.key for task in self._job.run_stage(stage, tasks, listener=listen)}
        for task in tasks:
            damaged, done = task.payload.damaged, results.get(task.title)
            if damaged is None or task.key in quarantined or done is None:
                continue
            kinds = ", ".join(sorted({commit.device_kind for commit in damaged.commits}))
            if done.other_latents:
                self._job.missing[task.title] = (
                    f"its damaged files were made on {kinds} and come out as other latents here, so nothing was "
                    "written. Repair it on that kind of device, or remove its folder to make it anew"
                )
                self._job.warn(f"{task.title}: {self._job.missing[task.title]}")
                continue
            for path in done.paths:
                self._job.note(f"{path} is whole again")
            left = damaged.paths - set(done.paths)
            for commit in damaged.commits:
                if wrong := sorted(left & {file.path for file in commit.files}):
                    path = f"{commit.rollout.path}/commit-{commit.latent_frames}.json"
                    self._former[commit.rollout, commit.latent_frames] = commit.latents_digest
                    self._set_aside(path, f"{wrong[0]} is damaged and comes out with other bytes here")

    def compare(self) -> None:
        """After the rollouts: whether commits that were made again have the latents of those before."""
        if not self._former:
            return
        inventory = self._run.inventory()
        for (rollout, frames), digest in self._former.items():
            commit = inventory.valid_commits(rollout).get(frames)
            if commit is not None and commit.latents_digest != digest:
                self._job.missing[rollout.path] = f"made again with other latents than before at {frames} latent frames"
                self._job.warn(f"{rollout.path}: {self._job.missing[rollout.path]}")

    def _set_aside(self, path: str, problem: str) -> None:
        set_aside(self._job, self._run, path, problem)


def set_aside(job: Job[Any], run: RolloutRun, path: str, problem: str, examined: bytes | None = None) -> None:
    """Rename a file that does not count, with a warning; see `RunDirectory.set_aside`."""
    kept = run.set_aside(path, examined)
    job.warn(f"{path} does not count ({problem}); it is kept as {kept} and made again")


def identity_of_commits(run: RolloutRun, wanted: RunIdentity) -> RunIdentity:
    """`wanted` with the noise that the run's commits were made with, where ``run.json`` cannot say it.

    IdentityError where the commits are those of another configuration.
    """
    inventory = run.inventory()
    first = wanted.model_copy(update={"noise": 1})
    try:
        run.refuse_foreign_commits(wanted, inventory)
    except IdentityError:
        run.refuse_foreign_commits(first, inventory)
        return first
    return wanted


def plan_repair(
    damage: Sequence[Damage],
    identity: RunIdentity,
    inventory: Inventory,
    commits: Mapping[str, Sequence[Commit]],
    history_bytes: Callable[[str, str, int], int],
) -> RepairPlan:
    """Sort the damage by what is done about it; `commits` are those that can be read, by rollout."""
    plan = RepairPlan()
    texts = {
        embedding_path(canonical_digest(backbone.latents["text_encoder"]), prompt.text): (name, prompt.text)
        for name, backbone in identity.backbones.items()
        for prompt in identity.prompts.values()
    }
    by_rollout: dict[str, set[str]] = {}
    for found in damage:
        match found.kind:
            case "commit" | "failure record":
                plan.set_aside[found.path] = found.what
            case "latents" | "trace" | "video":
                by_rollout.setdefault(found.rollout, set()).add(found.path)
            case "part record":
                plan_part_record(plan, found, commits.get(found.rollout, ()), inventory)
            case "text features":
                plan.set_aside[found.path] = found.what
                if found.path in texts:
                    backbone, prompt = texts[found.path]
                    digest = canonical_digest(identity.backbones[backbone].latents["text_encoder"])
                    plan.texts[digest, prompt] = backbone
            case "answers" if "/human/" in found.path:
                plan.beyond[found.path] = "people's answers: export a page again, or import the file that it saved"
            case "answers" if not found.path.startswith("scores/"):
                # The client asks again.
                plan.set_aside[found.path] = found.what
            case "scores" | "answers":
                plan.scores.append(found.path)
            case "decoded video" | "decoded record":
                plan.decoded.append(found)
            case "report":
                plan.remove.append(found.path)
            case "dataset" if found.path != CARD_FILE:
                # Without its list the index is made anew from the commits.
                plan.remove.append(MANIFEST_FILE)
            case "run" | "configuration" | "lease" | "dataset":
                pass  # Written again by every start.
    for folder, paths in sorted(by_rollout.items()):
        plan.restores += _restores(plan, identity, folder, paths, commits.get(folder, ()), history_bytes)
    for path in [path for path in plan.set_aside if path.startswith("rollouts/")]:
        rollout = RolloutId.at(path.rpartition("/")[0])
        if "/attempt-" not in path and (rollout is None or not identity.knows(rollout)):
            plan.beyond[path] = f"{plan.set_aside.pop(path)}; the configuration does not have its rollout"
    return plan


def plan_part_record(plan: RepairPlan, found: Damage, commits: Sequence[Commit], inventory: Inventory) -> None:
    """Write the record again from a commit that names its part; without one, nobody continues from that part."""
    latents_path = f"{found.path.removesuffix('.json')}.safetensors"
    for commit in commits:
        for latents, trace in zip(commit.latent_parts, commit.trace_parts, strict=True):
            if latents.path == latents_path:
                attempt = found.path.rpartition("/")[0].rpartition("/attempt-")[2]
                plan.part_records.append(
                    PartRecord(
                        rollout_key=commit.rollout_key,
                        attempt=attempt,
                        latents=latents,
                        trace=trace,
                        device_kind=commit.device_kind,
                    )
                )
                return
    if found.path in inventory.files:
        plan.set_aside[found.path] = found.what


def _restores(
    plan: RepairPlan,
    identity: RunIdentity,
    folder: str,
    paths: set[str],
    commits: Sequence[Commit],
    history_bytes: Callable[[str, str, int], int],
) -> Iterator[Task[RolloutTask]]:
    """One task per rollout key with damaged files; parts that no commit names lose their record."""
    left = set(paths)
    keys: dict[str, list[Commit]] = {}
    for commit in commits:
        if named := {file.path for file in commit.files} & paths:
            keys.setdefault(commit.rollout_key, []).append(commit)
            left -= named
    for path in left:
        record = f"{path.removesuffix('.safetensors').removesuffix('.trace.parquet')}.json"
        plan.set_aside[record] = f"it names {path}, which is damaged, and no commit needs it"
    rollout = RolloutId.at(folder)
    for key, group in keys.items():
        group.sort(key=lambda commit: commit.latent_frames)
        damaged = frozenset(paths & {file.path for commit in group for file in commit.files})
        longest = group[-1].latent_frames
        if rollout is None or not identity.knows(rollout) or identity.rollout_key(rollout, longest) != key:
            reason = "the configuration does not have its rollout"
            plan.beyond |= dict.fromkeys(sorted(damaged), reason)
            continue
        backbone = identity.backbones[rollout.backbone]
        task = RolloutTask(
            rollout=rollout,
            rollout_key=key,
            prompt=identity.prompts[rollout.prompt_id].text,
            text_digest=canonical_digest(backbone.latents["text_encoder"]),
            weights_digest=canonical_digest(backbone.latents["weights"]),
            horizons=(),
            damaged=Damaged(tuple(group), damaged),
        )
        yield Task(
            key=f"{folder}/{longest}/damaged",
            payload=task,
            group=rollout.backbone,
            name=folder,
            memory=history_bytes(rollout.backbone, rollout.method, longest),
        )


def decode_stages(
    run: RolloutRun, config: RunConfig, identity: RunIdentity, plan: RepairPlan, set_aside: Callable[[str, str], None]
) -> Iterator[tuple[DecodeStage, list[Task[DecodeTask]]]]:
    """Set the records of damaged decoded videos aside and yield what makes the videos again, per kind of settings.

    What `config` has no VAE for is beyond repair with it.
    """
    decoded = read_decoded(run)
    inventory = run.inventory()
    kinds = _known_settings(decoded, identity, config)
    groups: dict[str, list[Task[DecodeTask]]] = {}
    for found in plan.decoded:
        record = _record_of(found, decoded)
        place = "/".join(found.rollout.split("/")[:2])
        rollout = RolloutId.at(f"rollouts/{found.rollout.removeprefix(place)[1:]}")
        frames = int(record.rpartition("/video-")[2].removesuffix(".json"))
        settings = kinds.get(place)
        commit = inventory.valid_commits(rollout).get(frames) if rollout is not None else None
        backbone = config.backbones.get(rollout.backbone) if rollout is not None else None
        if settings is None or commit is None or backbone is None or _stage_config(config, commit, settings) is None:
            plan.beyond[found.path] = (
                f"{found.what}; `lrag-ray decode RUN --config CONFIG`, with the VAE and the video settings that it was "
                "made with, makes it again"
            )
            continue
        set_aside(record, found.what)
        task = Task(key=record, payload=DecodeTask((commit,), settings), group=commit.rollout.backbone)
        groups.setdefault(place, []).append(task)
    for tasks in groups.values():
        stage_config = _stage_config(config, tasks[0].payload.commits[0], tasks[0].payload.settings)
        assert stage_config is not None, "tasks without one are beyond repair"
        yield (
            DecodeStage(run.storage.address, config.storage, stage_config.backbones, stage_config.video, config.engine),
            tasks,
        )


def _record_of(found: Damage, decoded: DecodedVideos) -> str:
    """Path of the record of a damaged decoded video."""
    if found.kind == "decoded record":
        return found.path
    name = found.path.rpartition("/")[2].removesuffix(".mp4")
    return f"{found.rollout}/{name}.json"


def _known_settings(decoded: DecodedVideos, identity: RunIdentity, config: RunConfig) -> dict[str, Mapping[str, Any]]:
    """Settings by their folder, from intact records, the run and the configuration."""
    settings: list[Mapping[str, Any]] = [record.settings for record in decoded.records.values()]
    settings += [own_settings(identity, name) for name in identity.backbones]
    settings += [
        decode_settings(pixels_identity(backbone), config.video.model_dump()) for backbone in config.backbones.values()
    ]
    return {settings_folder(each): each for each in settings}


def _stage_config(config: RunConfig, commit: Commit, settings: Mapping[str, Any]) -> RunConfig | None:
    """`config` with the video settings and the VAE precision of `settings`; None where its VAE is another."""
    backbone = config.backbones[commit.rollout.backbone]
    vae, keys = settings.get("vae"), VideoSection.model_fields.keys() - {"enabled"}
    if not isinstance(vae, Mapping) or not keys <= settings.keys():
        return None
    computes = {key: vae.get(key, default) for key, default in COMPUTES.items()}
    backbone = backbone.model_copy(update={"vae": backbone.vae.model_copy(update=computes)})
    video = config.video.model_copy(update={key: settings[key] for key in keys})
    if decode_settings(pixels_identity(backbone), video.model_dump()) != settings:
        return None
    return config.model_copy(
        update={"video": video, "backbones": {**config.backbones, commit.rollout.backbone: backbone}}
    )
