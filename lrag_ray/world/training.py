"""A training loop that can be killed: after a restart it goes on as if nothing had happened, bit for bit.

What a step learns from is drawn by (seed, step), never from a running generator, so the state is weights, their moving
average, momenta and the number of steps.
"""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lrag_ray.errors import UsageError
from lrag_ray.world.muon import Muon

_SAVE_EVERY = 50
"""Steps between two states."""


@dataclass(frozen=True)
class Recipe:
    """How a network is optimized."""

    seed: int
    steps: int
    muon: float
    """Peak learning rate of matrices that Muon optimizes."""
    adam: float
    """Peak learning rate of all other parameters."""
    warmup: int = 50
    restarts: tuple[tuple[int, float], ...] = ()
    """Steps at which warm-up and cosine begin again, each with its peak as a share of the first."""
    average: float = 0.998
    """Decay of the moving average of the weights, which is what is kept."""

    def rate(self, step: int) -> float:
        """Learning rate of a step as a share of its peak: linear warm-up, then a cosine down to 2 %."""
        rounds = [(0, 1.0), *self.restarts, (self.steps, 0.0)]
        (begin, peak), (end, _) = next(both for both in pairwise(rounds) if step < both[1][0])
        if step - begin < self.warmup:
            return peak * (step - begin + 1) / self.warmup
        done = (step - begin - self.warmup) / max(1, end - begin - self.warmup)
        return peak * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


class Lesson(ABC):
    """A network and what it is to learn."""

    name: str
    model: nn.Module

    @abstractmethod
    def matrices(self) -> list[nn.Parameter]:
        """Parameters for Muon."""

    @abstractmethod
    def loss(self, step: int) -> dict[str, Tensor]:
        """``loss``, whose gradient is followed, and other scalars for the log."""


class Trainer:
    """A lesson in progress, its state in `folder`/NAME.state."""

    def __init__(self, lesson: Lesson, recipe: Recipe, folder: Path, identity: str) -> None:
        """Begin, or go on where the last one was stopped.

        `identity` says what is trained and how. Raises UsageError where the state is that of another training.
        """
        self.lesson, self.recipe = lesson, recipe
        self._folder, self._identity = folder, identity
        self._parameters = dict(lesson.model.named_parameters())
        chosen = {id(matrix) for matrix in lesson.matrices()}
        others = [each for each in self._parameters.values() if id(each) not in chosen]
        self._muon = Muon(lesson.matrices())
        self._adam = torch.optim.AdamW(others, lr=recipe.adam, betas=(0.9, 0.95), weight_decay=0.0)
        self._average = {name: each.detach().clone() for name, each in self._parameters.items()}
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._restore()

    @property
    def _path(self) -> Path:
        return self._folder / f"{self.lesson.name}.state"

    def run(self, until: int | None = None) -> Iterator[dict[str, float]]:
        """Train up to a step, or to the end; yields what each step logged."""
        until = self.recipe.steps if until is None else until
        while self.step < until:
            began = time.process_time()
            logged = self._learn()
            self.step += 1
            logged["cpu_s"] = time.process_time() - began
            if self.step % _SAVE_EVERY == 0 or self.step == until:
                self._save()
            yield logged

    def averaged(self) -> dict[str, Tensor]:
        """The moving average of the weights, by name."""
        return dict(self._average)

    def about(self) -> dict[str, str]:
        """Metadata of the files of this training."""
        return {"step": str(self.step), "identity": self._identity}

    def _learn(self) -> dict[str, float]:
        parameters = list(self._parameters.values())
        for parameter in parameters:
            parameter.grad = None
        logged = self.lesson.loss(self.step)
        logged["loss"].backward()
        for parameter in parameters:
            if parameter.grad is None:
                # Not used by this step.
                parameter.grad = torch.zeros_like(parameter)
        logged["norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = self.recipe.rate(self.step)
        self._muon.step(self.recipe.muon * rate)
        for group in self._adam.param_groups:
            group["lr"] = self.recipe.adam * rate
        self._adam.step()
        # Early weights are forgotten sooner, so that the average means something from the start.
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._average[name].lerp_(parameter, 1 - decay)
        values = {name: float(value.detach()) for name, value in logged.items()}
        if not math.isfinite(values["loss"]):
            raise UsageError(f"{self.lesson.name}: the loss of step {self.step} is {values['loss']}; lower the rates")
        return values

    def _state(self) -> dict[str, Tensor]:
        state = {f"weights.{name}": each.detach() for name, each in self._parameters.items()}
        state |= {f"average.{name}": each for name, each in self._average.items()}
        state |= {f"muon.{i}": each for i, each in enumerate(self._muon.buffers)}
        for number, of_one in self._adam.state_dict()["state"].items():
            state |= {f"adam.{number}.{name}": each for name, each in of_one.items()}
        return {name: each.contiguous() for name, each in state.items()}

    def _save(self) -> None:
        beside = self._path.with_suffix(".part")
        save_file(self._state(), beside, self.about())
        beside.replace(self._path)

    @torch.no_grad()
    def _restore(self) -> None:
        with safe_open(self._path, "pt") as file:
            about = file.metadata() or {}
            if about.get("identity") != self._identity:
                raise UsageError(
                    f"{self._path} is the state of another training ({about.get('identity')}, and this is "
                    f"{self._identity}). Fix: give another folder, or remove it to begin anew"
                )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        for name, parameter in self._parameters.items():
            parameter.copy_(state[f"weights.{name}"])
            self._average[name].copy_(state[f"average.{name}"])
        for i, buffer in enumerate(self._muon.buffers):
            buffer.copy_(state[f"muon.{i}"])
        adam = self._adam.state_dict()
        for name, value in state.items():
            if name.startswith("adam."):
                _, number, part = name.split(".")
                adam["state"].setdefault(int(number), {})[part] = value
        self._adam.load_state_dict(adam)
        self.step = int(about["step"])


def identity_of(**parts: object) -> str:
    """Text that says what is trained and how."""
    return json.dumps(parts, sort_keys=True, default=str)
