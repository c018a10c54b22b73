"""The state of a start in words, for whatever shows it."""

from __future__ import annotations

from lrag_ray.cli.output import count, duration
from lrag_ray.cli.training import training_headline
from lrag_ray.events import (
    AttemptFailed,
    Event,
    Notice,
    RunPlanned,
    StageEnded,
    TaskYielded,
    WorkerLost,
)
from lrag_ray.printable import counted
from lrag_ray.stages.spec import StageName
from lrag_ray.watch.tally import Tally

STAGE_TITLES: dict[StageName, str] = {
    "connect": "connecting to Ray",
    "verify": "looking for damage",
    "refine": "refining prompts",
    "text": "encoding prompts",
    "rollouts": "rollouts",
    "decode": "decoding",
    "scoring": "scoring videos",
    "training": "training",
    "report": "writing the report",
    "dataset": "indexing the latents",
}


class RunView(Tally):
    """The state of a run, and how it is put into words."""

    def take(self, event: Event) -> str | None:
        """Take an event in; returns the line that a person should read at once, if any."""
        self.count(event)
        match event:
            case RunPlanned():
                return (
                    f"{event.uri}: {count(event.commits_done)} of {count(event.commits_total)} results are there, "
                    f"{counted(event.rollouts_to_do, 'rollout')} ({counted(event.blocks_to_do, 'block')}) to do"
                )
            case Notice():
                return f"{'warning: ' if event.warning else ''}{event.text}"
            case StageEnded():
                return f"{STAGE_TITLES[event.stage]}: done in {duration(event.seconds)}"
            case TaskYielded():
                return f"{event.worker} gave {event.task} back: {event.reason}; it continues elsewhere"
            case AttemptFailed(failure):
                then = "quarantined" if failure.quarantined else "will be retried"
                return f"warning: {failure.task}: {failure.reason} ({then}; {failure.path})"
            case WorkerLost():
                return f"warning: {event.worker} was lost and is replaced: {event.reason}"
        return None

    def headline(self) -> str:
        """One line: stage, how far, how fast, how long."""
        if self.stage is None:
            return ""
        if self.stage == "training" and self.training is not None:
            return training_headline(self.training)
        if self.stage != "rollouts":
            of = f" {count(self.stage_done)}/{count(self.stage_total)}" if self.stage_total > 1 else ""
            return f"{STAGE_TITLES[self.stage]}{of}"
        parts = [
            f"rollouts {count(self.rollouts_done)}/{count(self.rollouts_total)}",
            f"blocks {count(self.blocks_done)}/{count(self.blocks_total)}",
        ]
        if rate := self.blocks_per_s:
            parts.append(f"{rate:.3g} blocks/s")
        if (eta := self.eta_s) is not None:
            parts.append(f"about {duration(eta)} left")
        if self.videos_scored:
            parts.append(f"{counted(self.videos_scored, 'video')} scored")
        if self.failed_attempts:
            parts.append(f"{counted(self.failed_attempts, 'failed attempt')}")
        return ", ".join(parts)
