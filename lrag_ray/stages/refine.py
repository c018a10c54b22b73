"""The refine stage: prompts are rewritten by a language model, ahead of the text stage; answers are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lrag_ray.chat.client import ChatClient, LeftError
from lrag_ray.chat.messages import Question
from lrag_ray.chat.store import AnswerRecord, ChatStore
from lrag_ray.config.refine import RefineSection
from lrag_ray.config.schema import WorkersSection
from lrag_ray.errors import BudgetError, ChatError, ConfigError, WeightsError
from lrag_ray.printable import counted
from lrag_ray.stages.refinement import EncoderLimit, Refiner
from lrag_ray.stages.spec import Host, Refused, Resources, Result, Stage, Task, WorkerState, Yielded
from lrag_ray.store.address import Storage
from lrag_ray.store.run_dir import CHAT


@dataclass(frozen=True)
class RefineTask:
    """Prompts that are asked about side by side."""

    prompts: tuple[str, ...]


@dataclass(frozen=True)
class RefineStage(Stage[RefineTask]):
    """Refined prompts.

    Needs a CPU and the network; for a local model what a rollout worker needs. Set up: nothing; a local model is loaded
    with the first question. Does: asks about some prompts until each has an answer that can be used, or none.
    Returns: `Result`.
    """

    name = "refine"
    fatal = (BudgetError, ChatError, ConfigError, WeightsError)

    storage: Storage
    section: RefineSection
    template: str
    limits: tuple[EncoderLimit, ...]
    engine: WorkersSection

    @property
    def resources(self) -> Resources:
        """As the engine section says, for a local model; else one CPU."""
        if self.section.backend == "local":
            return Resources(self.engine.cpus_per_actor, self.engine.gpus_per_actor)
        return Resources(1, 0)

    def open(self, host: Host) -> RefineWorker:
        """Never fails."""
        return RefineWorker(self, host)

    def progress(self, task: Task[RefineTask]) -> int:
        """Stored answers of the run."""
        return len(self.storage.list_files(f"{CHAT}/answers"))


class RefineWorker:
    """Asks about prompts."""

    def __init__(self, stage: RefineStage, host: Host) -> None:
        self._stage = stage
        self._host = host
        self._store = ChatStore(stage.storage)
        device = "cuda" if stage.resources.gpus > 0 else "cpu"
        self._client = ChatClient(stage.section, self._store, device=device, keep_going=lambda: not host.must_leave())
        self._refiner = Refiner(stage.section, stage.template, stage.limits)

    def work(self, payload: RefineTask, attempt: str) -> Result | Yielded | Refused:
        """Ask until nothing is open."""
        found: dict[Question, AnswerRecord] = {}
        rejected: dict[str, str] = {}
        while questions := self._open(payload.prompts, found, rejected):
            self._host.report(WorkerState(counted(len(questions), "prompt"), 0, 0, "asking"))
            try:
                answers = self._client.ask(list(questions.values()))
            except LeftError:
                return Yielded("it was asked to stop; answers are stored")
            for (prompt, question), answer in zip(questions.items(), answers, strict=True):
                if isinstance(answer, AnswerRecord):
                    found[question] = answer
                else:
                    rejected[prompt] = str(answer)
        if rejected:
            prompt, reason = next(iter(rejected.items()))
            more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
            return Refused(f"no answer to '{prompt[:60]}'{more}: {reason}")
        return Result(made=len(payload.prompts))

    def _open(
        self, prompts: Sequence[str], found: dict[Question, AnswerRecord], rejected: dict[str, str]
    ) -> dict[str, Question]:
        settled = {prompt: self._refiner.settle(prompt, found.get) for prompt in prompts if prompt not in rejected}
        return {prompt: each for prompt, each in settled.items() if isinstance(each, Question)}
