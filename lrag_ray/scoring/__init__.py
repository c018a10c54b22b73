"""Scores of finished videos: suites, one file per dimension, average ranks."""
