"""Scoring of videos on Ray Data: what is committed and not yet scored, fanned out to workers that commit their rows.

What is pending comes from storage alone; a worker commits its rows itself, create-only, as soon as it has them, so a
killed wave loses no more than the last few clips.
"""
