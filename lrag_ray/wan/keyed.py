"""Random generators keyed by what they are for, so that draws depend neither on order nor on global state."""

from __future__ import annotations

import hashlib

import torch


def key_digest(*key: str | int) -> bytes:
    """SHA-256 of `key`. Parts are length-prefixed, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.sha256()
    for part in key:
        text = str(part).encode("utf-8")
        digest.update(f"{len(text)}:".encode())
        digest.update(text)
    return digest.digest()


def keyed_generator(*key: str | int) -> torch.Generator:
    """CPU generator seeded by `key`. Equal keys give equal integers on every machine, and equal normal draws on CPUs
    with the same instructions: torch.randn differs in the last bits between AVX2 and others."""
    # torch takes 64-bit seeds; the top bit is dropped to stay in the signed range.
    seed = int.from_bytes(key_digest(*key)[:8], "big") >> 1
    return torch.Generator(device="cpu").manual_seed(seed)
