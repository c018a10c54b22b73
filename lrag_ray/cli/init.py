"""``lrag-ray init``: a first configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from lrag_ray.cli.output import tells_errors, write
from lrag_ray.errors import UsageError

_Answer = TypeVar("_Answer")


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("init")(init)


@tells_errors
def init(
    to: Annotated[str, typer.Argument(metavar="CONFIG", help="File to write, which must not exist yet.")] = "run.yaml",
    uri: Annotated[str | None, typer.Option("--uri", help="Run directory [default: runs/NAME of the file].")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="FILE", help="Prompt file.")] = None,
    backbones: Annotated[str | None, typer.Option("--backbones", metavar="A,B", help="Presets.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", metavar="A,B", help="Context methods.")] = None,
    durations: Annotated[str | None, typer.Option("--durations", metavar="A,B", help="Seconds.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=0, help="GPUs [default: those of this machine].")] = None,
) -> None:
    """Write a commented configuration. On a terminal it asks for what no option gives.

    \b
    Examples:
      lrag-ray init
      lrag-ray init mine.yaml --backbones longlive --methods base,rag --durations 30,60 --prompts prompts.txt
    """
    from lrag_ray.config.load import complete
    from lrag_ray.config.source import parse_document
    from lrag_ray.config.starter import read_methods, read_presets, starter

    target = Path(to)
    if target.exists():
        raise UsageError(f"{to} exists. Fix: give another name, or remove it")
    found = gpus if gpus is not None else _gpus_here()
    text = starter(
        uri=_answer(uri, "Run directory (folder or s3://…)", f"runs/{target.stem}", str),
        prompts=_answer(prompts, "Prompt file", "prompts.txt", str),
        backbones=_answer(backbones, "Backbones (commas between)", "self_forcing" if found else "tiny", read_presets),
        methods=_answer(methods, "Methods (commas between)", "base,infinity_rope,deep_forcing,rag", read_methods),
        durations_s=_answer(durations, "Durations in seconds", "30", _seconds),
        gpus=found,
    )
    complete(parse_document(to, text))
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{to} cannot be written: {error.strerror}. Fix: give another name") from error
    write(f"{to} is written. Next: lrag-ray plan {to}; lrag-ray doctor {to}; lrag-ray run {to}")


def _answer(given: str | None, question: str, default: str, read: Callable[[str], _Answer]) -> _Answer:
    """What an option gives or the person answers, who is asked until it can be read; else the default."""
    if given is not None or not _on_terminal():
        return read(default if given is None else given)

    def checked(text: str) -> _Answer:
        try:
            return read(text)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None

    answer: _Answer = typer.prompt(question, default=default, value_proc=checked)
    return answer


def _on_terminal() -> bool:
    return sys.stdin.isatty()


def _seconds(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"durations '{text}': give seconds with commas between, such as 30,60") from None


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count()
