"""Measured speed, one JSON object each."""
