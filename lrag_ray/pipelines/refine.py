"""Refined prompts of a configuration: what `lrag-ray refine` does, and `run` before anything else.

Answers are stored below the run; with all of them there, neither Ray nor the model is started.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lrag_ray.chat.client import check_backend, model_identity
from lrag_ray.chat.messages import Question
from lrag_ray.chat.store import AnswerRecord, ChatStore, Spent
from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.prompts import Prompt, load_prompts, make_prompt
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.session import ray_session
from lrag_ray.engine.sizing import PoolSize
from lrag_ray.errors import ConfigError, UsageError
from lrag_ray.events import Listener, silent
from lrag_ray.pipelines.costs import with_costs
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.job import Job
from lrag_ray.printable import counted
from lrag_ray.report.csv_text import csv_text
from lrag_ray.stages.refine import RefineStage, RefineTask
from lrag_ray.stages.refinement import Refined, Refiner, encoder_limits, read_template
from lrag_ray.stages.spec import Task
from lrag_ray.store.lease import RUN
from lrag_ray.store.rollouts import RolloutRun

_BATCHES_PER_TASK = 4


@dataclass(frozen=True)
class RefinedPrompts:
    """How refining ended."""

    exit_code: int
    """0 all prompts are there, 1 some are left out, 130 interrupted."""
    prompts: Sequence[Prompt]
    """Those of the run, in file order; `original` holds the text of the file."""
    missing: dict[str, str]
    """Prompts that are left out: the reason, by line."""
    kept_original: int
    """Prompts that stay as they were, because no answer could be used."""
    spent: Spent
    """On the model, by all starts of the run."""
    seconds: float


def refine_prompts(
    config: RunConfig, prompts: Sequence[Prompt] | None = None, *, repair: bool = False, listener: Listener = silent
) -> RefinedPrompts:
    """Refine the prompts of a configuration, or those that were loaded before.

    With `repair` a damaged ``run.json`` is accepted. Raises ConfigError without prompts.refine or its template;
    ChatError where the model cannot be asked; BudgetError; IdentityError for an address that holds another run;
    LeaseError; StorageError; ClusterError.
    """
    prompts = load_prompts(config.prompts) if prompts is None else prompts
    return RefineJob(config, prompts, listener, repair=repair).start()


class RefineJob(Job[RefinedPrompts]):
    """One start of refining."""

    command = "refine"

    def __init__(
        self, config: RunConfig, prompts: Sequence[Prompt], listener: Listener, *, repair: bool = False
    ) -> None:
        config = with_absolute_paths(config)
        section = config.prompts.refine
        if section is None:
            raise ConfigError("prompts.refine is not given: it names the model that refines, and its backend")
        run = RolloutRun(config.run.uri, config.storage)
        super().__init__(run.storage, config.engine, listener)
        if not (repair and run.is_damaged()) and run.read() is not None:
            # Another user's run must not receive our lease, nor our answers.
            run.continued(build_identity(config, []))
        self._section = section
        self._prompts = prompts
        self._template = read_template(section)
        self._limits = encoder_limits(config.backbones.values())
        self._refiner = Refiner(section, self._template, self._limits)
        self._store = ChatStore(self.storage)
        self._model = model_identity(section)
        self._settled: dict[str, Refined] = {}

    @property
    def kinds(self) -> Sequence[str]:
        """That of the rollouts: they need the prompts."""
        return [RUN]

    def do(self) -> None:
        """Ask about what is open, then read what became of every prompt."""
        texts = list(dict.fromkeys(prompt.text for prompt in self._prompts))
        open_texts = [text for text in texts if isinstance(self._settle(text), Question)]
        if open_texts:
            check_backend(self._section)
            self._ask(open_texts)
            self.note(self._cost())
        for text in texts:
            found = self._settle(text)
            if isinstance(found, Refined):
                self._settled[text] = found
        self._report_problems()

    def outcome(self, exit_code: int) -> RefinedPrompts:
        """The prompts in file order."""
        found = list(self._refined())
        return RefinedPrompts(
            exit_code=exit_code,
            prompts=found,
            missing=self.missing,
            kept_original=sum(self._settled[prompt.original].failed for prompt in found),
            spent=self._store.spent(self._section),
            seconds=self.seconds,
        )

    def _cost(self) -> str:
        return f"refining: {self._store.spent(self._section).described(self._section)} in this run so far"

    def _settle(self, text: str) -> Refined | Question:
        def stored(question: Question) -> AnswerRecord | None:
            return self._store.answer(question.digest(self._section, self._model))

        return self._refiner.settle(text, stored)

    def _ask(self, texts: Sequence[str]) -> None:
        section = self._section
        many = section.concurrency * (1 if section.backend == "local" else _BATCHES_PER_TASK)
        groups = [tuple(texts[i : i + many]) for i in range(0, len(texts), many)]
        lines = {prompt.text: prompt.line for prompt in reversed(self._prompts)}
        tasks = [
            Task(key=str(i), payload=RefineTask(group), order=i, name=f"prompts from line {lines[group[0]]}")
            for i, group in enumerate(groups)
        ]
        stage = RefineStage(self.storage, section, self._template, tuple(self._limits), self.engine)
        with ray_session(self.engine):
            # A server's limits are those of one worker.
            size = None if section.backend == "local" else PoolSize(1, 1)
            failed = self.run_stage(stage, tasks, size=size, listener=with_costs(self.report, self._cost))
        reasons = {text: self.missing.pop(task.title, "") for task in failed for text in task.payload.prompts}
        for prompt in self._prompts:
            if prompt.text in reasons and isinstance(self._settle(prompt.text), Question):
                self.missing[_title(prompt)] = f"it could not be refined: {reasons[prompt.text]}"

    def _report_problems(self) -> None:
        for prompt in self._prompts:
            found = self._settled.get(prompt.text)
            if found is None or not found.problems:
                continue
            reasons = "; then: ".join(found.problems)
            if not found.failed:
                self.note(
                    f"{_title(prompt)} was refined after {counted(len(found.problems), 'unusable answer')}: {reasons}"
                )
            elif self._section.on_failure == "original":
                self.warn(f"{_title(prompt)} stays as it was: {reasons}")
            else:
                self.missing[_title(prompt)] = (
                    f"no answer could be used: {reasons}. Change prompts.refine, or set on_failure: original"
                )

    def _refined(self) -> Iterator[Prompt]:
        for prompt in self._prompts:
            found = self._settled.get(prompt.text)
            if found is not None and not (found.failed and self._section.on_failure == "stop"):
                made = make_prompt(prompt.index, found.text, prompt.line, prompt.columns)
                yield replace(made, original=prompt.text)


def write_list(prompts: Sequence[Prompt], path: str) -> None:
    """Write refined prompts to a new file: .txt, one a line; .csv or .jsonl, with the original beside each.

    UsageError for another suffix, and for a file that is there with other content: it may have been reviewed.
    """
    target = Path(path)
    rows = [{"prompt": p.text, "original": p.original, **_other(p)} for p in prompts]
    if target.suffix == ".txt":
        by_index = {prompt.index: prompt.text for prompt in prompts}
        content = "".join(f"{by_index.get(i, '')}\n" for i in range(max(by_index, default=-1) + 1))
    elif target.suffix == ".csv":
        content = csv_text(list(dict.fromkeys(name for row in rows for name in row)), rows)
    elif target.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        raise UsageError(f"--to {path}: give a file that ends in .txt, .csv or .jsonl")
    if target.exists() and target.read_text(encoding="utf-8") != content:
        raise UsageError(f"{path} is there with other content, perhaps a reviewed list: name another file or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")


def _other(prompt: Prompt) -> dict[str, object]:
    return {name: value for name, value in prompt.columns.items() if name not in ("prompt", "original")}


def _title(prompt: Prompt) -> str:
    return f"prompt on line {prompt.line}"
