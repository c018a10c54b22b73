"""lrag-ray: batch generation and evaluation of long retrieval-augmented videos on Ray."""

__version__ = "0.1.0"

NUMERICS_VERSION = 1
"""Raised whenever a change of code changes latents; part of every rollout key."""
