"""From prompts to a trained, measured encoder in a rag run, tiny, on this machine: what ``make encoder`` does.

A corpus of an untrained generator; an encoder on two workers, one of which is killed in between; the same encoder
without the delta loss and without the smoothness term, for comparison; a rag run with the result. Prints a table and,
as its last line, one JSON object.

    python scripts/encoder_tiny.py [--root runs/encoder_tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import Any

import lrag_ray as lr
from lrag_ray.events import Event, WorkerLost
from lrag_ray.pipelines.embeddings import inspect_embeddings
from lrag_ray.pipelines.train_encoder import TrainingOutcome
from lrag_ray.report.embeddings import EmbeddingMeasures
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.training_run import BEST, TrainingRun

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "encoder_tiny"
ABLATIONS = {"full": "encoder", "ae_seq_delta": "ae_seq_delta", "ae_only": "ae_only"}
"""Folder of the training by preset."""
KILL_AFTER_STEPS = 6


def main(root: Path) -> dict[str, Any]:
    """All of it, with results below `root`; returns what the last line says."""
    corpus = run("latents.yaml", f"run.uri={root}/latents")
    lost: list[Event] = []
    with killing_a_worker(TrainingRun(f"{root}/encoder")) as killed:
        trained = train(root, "full", lost)
    for preset in ("ae_seq_delta", "ae_only"):
        train(root, preset, [])
    measures = measured(root)
    encoder = f"{root}/encoder/{BEST}"
    evaluated = run("evaluate.yaml", f"run.uri={root}/evaluate", f"methods.rag.encoder={encoder}")
    return {
        "rollouts": len(LatentDataset.open(f"{root}/latents")),
        "workers_killed": len(killed),
        "workers_lost": len(lost),
        "steps": trained.steps,
        "best": trained.best,
        "measures": measures,
        "commits": evaluated.commits_made,
        "exit_codes": [corpus.exit_code, trained.exit_code, evaluated.exit_code],
    }


def run(config: str, *overrides: str, listener: Any = None) -> Any:
    """Run a configuration of the folder to its end."""
    loaded = lr.load_config(CONFIGS / config, overrides)
    print(f"{loaded.job}: {loaded.run.uri}", flush=True)
    return lr.run(loaded, listener=listener or (lambda event: None))


def train(root: Path, preset: str, lost: list[Event]) -> TrainingOutcome:
    """Train with the losses of a preset; `lost` collects the workers that died."""

    def listen(event: Event) -> None:
        if isinstance(event, WorkerLost):
            print(f"  {event.worker} was lost: {event.reason}", flush=True)
            lost.append(event)

    outcome: TrainingOutcome = run(
        "encoder.yaml", f"preset={preset}", f"run.uri={root}/{ABLATIONS[preset]}", f"data.uris=[{root}/latents]",
        listener=listen,
    )  # fmt: skip
    return outcome


def measured(root: Path) -> Mapping[str, Mapping[str, float]]:
    """Similarity of neighbouring frames, and the bend of the trajectory, by preset: means over the rollouts."""
    checkpoints = {f"{root}/{folder}/{BEST}": preset for preset, folder in ABLATIONS.items()}
    found = inspect_embeddings(f"{root}/latents", [*checkpoints, "avg_pool"], most=24).measures
    by_name: dict[str, list[EmbeddingMeasures]] = {}
    for each in found:
        by_name.setdefault(checkpoints.get(each.descriptor, each.descriptor), []).append(each)
    table = {
        name: {
            "neighbours": mean(float(each.by_distance[1]) for each in kept),
            "bend": mean(each.bend for each in kept),
        }
        for name, kept in by_name.items()
    }
    print(f"{'descriptor':15}{'neighbours':>12}{'bend':>8}")
    for name, row in table.items():
        print(f"{name:15}{row['neighbours']:12.4f}{row['bend']:8.3f}")
    return table


@contextmanager
def killing_a_worker(training: TrainingRun) -> Iterator[Sequence[int]]:
    """Kill one training worker of this process once some steps are stored; yields the list of those killed."""
    killed: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05) and not killed:
            state = training.state()
            if state is None or state.step < KILL_AFTER_STEPS:
                continue
            for pid in training_workers()[-1:]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield killed
    ended.set()
    thread.join()


def training_workers() -> list[int]:
    """Ids of this process's Ray Train workers."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (folder / "cmdline").read_text().replace("\0", " ")

    def is_ours(pid: int) -> bool:
        while pid in parents:
            if pid == os.getpid():
                return True
            pid = parents[pid]
        return False

    return sorted(pid for pid, name in names.items() if "RayTrainWorker" in name and is_ours(pid))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--root", type=Path, default=Path("runs/encoder_tiny"), help="where results go")
    began = time.monotonic()
    result = main(parser.parse_args().root)
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}))
