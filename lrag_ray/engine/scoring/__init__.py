"""Scoring of videos on Ray Data: what is committed and not yet scored, fanned out to workers that commit their rows.

What is pending comes from storage alone; a worker commits its rows itself, create-only, as soon as it has them, so a
killed wave loses no more than the last few clips.
"""

from lrag_ray.engine.scoring.stage import ScoringOutcome, Wave, check_scoring, open_scores, score_pending

__all__ = ["ScoringOutcome", "Wave", "check_scoring", "open_scores", "score_pending"]
