"""Train what the tiny world needs, on one core, from a seed: ``python -m jobs.train_tiny_world LESSON FOLDER``.

Lessons: ``generator``, ``zero_shot`` (without retrieved frames) and ``vae``, 34 to 92 minutes each. None of them needs
another. FOLDER gets LESSON.state every 50 steps, from which the same command goes on, LESSON.jsonl with a line per
step, and at the end the moving average of the weights: LESSON.safetensors, of the VAE a Diffusers folder ``vae``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lrag_ray.interrupts import ends_with_130

LESSONS = ("generator", "zero_shot", "vae")


def main() -> None:
    """Train the lesson that is named on the command line."""
    with ends_with_130():
        _train()


def _train() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.train_tiny_world")
    parser.add_argument("lesson", choices=LESSONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="another start and other scenes; the package has 0")
    parser.add_argument("--until", type=int, metavar="STEP", help="stop there, with the state kept")
    given = parser.parse_args()

    import torch
    from safetensors.torch import save_file

    from jobs.entry import reporting_errors
    from lrag_ray.world.code import fit_code
    from lrag_ray.world.generator import ZERO_SHOT, GeneratorLesson, GeneratorRecipe
    from lrag_ray.world.training import Trainer, identity_of
    from lrag_ray.world.vae import VaeLesson, VaeRecipe

    def seeded(how: Any) -> Any:
        return replace(how, recipe=replace(how.recipe, seed=given.seed))

    # One thread: sums are in the same order on every machine with the same instructions.
    torch.set_num_threads(1)
    with reporting_errors():
        code = fit_code(0)
        lesson: GeneratorLesson | VaeLesson
        if given.lesson == "vae":
            lesson = VaeLesson(seeded(VaeRecipe()), code)
        else:
            how = GeneratorRecipe() if given.lesson == "generator" else ZERO_SHOT
            lesson = GeneratorLesson(given.lesson, seeded(how), code)
        trainer = Trainer(lesson, lesson.how.recipe, given.folder, identity_of(**lesson.identity))
        with (given.folder / f"{given.lesson}.jsonl").open("a", buffering=1) as log:
            for row in trainer.run(given.until):
                log.write(json.dumps({"step": trainer.step, **row}) + "\n")
                if trainer.step % 50 == 0:
                    print(f"{given.lesson}: step {trainer.step} of {trainer.recipe.steps}, loss {row['loss']:.4f}")
        if trainer.step == trainer.recipe.steps:
            file = given.folder / f"{given.lesson}.safetensors"
            if isinstance(lesson, VaeLesson):
                file = given.folder / "vae" / "diffusion_pytorch_model.safetensors"
                lesson.model.save_config(file.parent)
            save_file(trainer.averaged(), file, trainer.about())
            print(f"{given.lesson}: {file}")
    sys.exit(0)


if __name__ == "__main__":
    main()
