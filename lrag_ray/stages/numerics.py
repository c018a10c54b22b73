"""What makes torch compute the same in every worker on the same kind of device."""

from __future__ import annotations

import os

import torch


def make_reproducible(threads: int) -> None:
    """Fix what sums depend on, for the calling thread: call it at set-up and again in the thread that works."""
    # Sums change with the thread count, and cuBLAS with its workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that comes with the line above and writes every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
