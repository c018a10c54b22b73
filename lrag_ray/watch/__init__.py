"""Listeners beside the terminal and the log: loggers of experiments, and the hook at the end of a start."""
