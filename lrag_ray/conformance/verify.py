"""Numerical conformance: runs our code on every golden vector under a folder.

Folders are recognised by what their files hold, never by their names; everything that a case needs is read from its
files. Example::

    results = verify_path("golden")
    sys.exit(1 if failed(results) else 0)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from lrag_ray.conformance import (
    checkpoints,
    encoder,
    lora,
    methods,
    rollout,
    scheduler,
    text_encoder,
    units,
    vae,
    vbench,
)
from lrag_ray.conformance.case import CaseResult, GoldenCase, Sheet, one_line
from lrag_ray.conformance.files import Folder
from lrag_ray.conformance.recording import CPU
from lrag_ray.errors import LragError, UsageError
from lrag_ray.retrieval.bank_types import BankType

KINDS: tuple[Callable[[Folder], list[GoldenCase]], ...] = (
    rollout.cases,
    units.cases,
    methods.cases,
    scheduler.cases,
    encoder.cases,
    checkpoints.cases,
    lora.cases,
    vae.cases,
    text_encoder.cases,
)
"""Every kind of golden vectors finds its own cases in a folder."""

SLOW_KINDS: tuple[Callable[[Folder], list[GoldenCase]], ...] = (vbench.cases,)
"""Kinds that run networks of full size; their cases run in the folder that is asked for, and are skipped under it."""


def verify_path(path: str | Path) -> list[CaseResult]:
    """All rows of `iter_results`, once everything has run."""
    return list(iter_results(path))


def failed(results: Iterable[CaseResult]) -> bool:
    """Whether any row failed, which makes the command's exit code 1."""
    return any(result.status == "fail" for result in results)


ROLLOUT_KINDS: tuple[Callable[[Folder, BankType | None, torch.device], list[GoldenCase]], ...] = (
    rollout.cases,
    methods.cases,
)
"""Kinds with rollouts, whose history can be stored otherwise, and which other devices can compute."""
ROUNDING = 4.5e-4
"""Added to every bound on a GPU: sums in another order, over tens of blocks."""


def iter_results(
    path: str | Path, bank: BankType | None = None, device: torch.device | None = None
) -> Iterator[CaseResult]:
    """Run all cases in a folder and the folders under it, row by row as they finish.

    With `bank`, run the rollouts that keep a history alone, store it so, and judge how far that leads away. With
    `device`, run the rollouts alone, there, in float32; a GPU may be further off, by `ROUNDING`.

    A file that cannot be read and a case that raises are rows that fail; folders of tensors in no known format, and
    slow cases below the given folder, are rows that are skipped. Raises UsageError if the path is not a folder, or
    nothing in it is recognised.
    """
    root = Path(path)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UsageError(
            f"{root} {what}; expected a folder of golden vectors. Fix: give the folder that holds the files"
        )
    recognised, alone = False, bank is not None or device is not None
    for folder in _folders(root):
        if alone:
            cases, slow = [case for each in ROLLOUT_KINDS for case in each(folder, bank, device or CPU)], []
        else:
            cases, slow = find_cases(folder), [case for find in SLOW_KINDS for case in find(folder)]
        if folder.path == root:
            cases, slow = [*cases, *slow], []
        recognised = recognised or bool(cases or slow or folder.broken)
        name = folder.path.relative_to(root).as_posix() if folder.path != root else root.resolve().name
        for broken in folder.broken:
            yield CaseResult(name, broken.path.name, "file", None, None, "fail", broken.reason)
        for case in cases:
            yield from run_case(name, case, device or CPU)
        for case in slow:
            reason = f"full-size networks, minutes of CPU: verify {folder.path} by itself"
            yield CaseResult(name, case.name, "*", None, None, "skip", reason)
        if (
            not alone
            and not (cases or slow)
            and (folder.vectors or folder.torch_files)
            and not methods.holds_inputs(folder)
        ):
            reason = "holds tensors, but no golden vectors of a format that is known here"
            yield CaseResult(name, "*", "*", None, None, "skip", reason)
    if not recognised and alone:
        raise UsageError(
            f"no golden rollouts are recognised in {root} or the folders under it: {_contents(root)}. Fix: give a "
            "folder with rollouts or methods for --bank and --device, such as golden/rollout"
        )
    if not recognised:
        raise UsageError(
            f"no golden vectors are recognised in {root} or the folders under it: {_contents(root)}. "
            "Fix: give a folder with JSON, safetensors or .pt files in the formats that `lrag-ray verify --help` lists"
        )


def find_cases(folder: Folder) -> list[GoldenCase]:
    """Cases of all kinds but the slow ones whose files are directly in a folder."""
    return [case for find in KINDS for case in find(folder)]


def run_case(folder: str, case: GoldenCase, device: torch.device = CPU) -> list[CaseResult]:
    """Rows of one case on `device`; an exception becomes the last one."""
    sheet = Sheet(folder, case.name, ROUNDING if device.type == "cuda" else 0.0)
    try:
        # cuDNN rounds float32 convolutions to 10 bits by default; the golden numbers were not.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device.type == "cuda" else nullcontext():
            case.check(sheet)
    except ModuleNotFoundError as error:
        sheet.add("*", "skip", f"needs the package {error.name}, which is not installed")
    except LragError as error:
        sheet.add("*", "fail", one_line(error))
    except Exception as error:  # noqa: BLE001 (strangers' files meet all of our code; one case must not hide the others)
        sheet.add("*", "fail", f"{type(error).__name__}: {one_line(error)}")
    if not sheet.rows:
        sheet.add("*", "fail", "the files hold nothing to compare")
    return sheet.rows


def _folders(root: Path) -> Iterator[Folder]:
    """The folder and those under it that hold data, in order of their names; linked ones too, each folder once."""
    seen: set[str] = set()
    for place, names, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith((".", "__")))
        folder = Folder(Path(place))
        if folder.holds_data:
            yield folder


def _contents(root: Path) -> str:
    names = sorted(entry.name for entry in root.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}" if names else "it is empty"
