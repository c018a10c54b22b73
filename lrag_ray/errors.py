"""The exception tree.

::

    LragError                 exit code 1
    ├── VideoError            a video that cannot be read or re-encoded (lrag_ray.video.mp4)
    ├── BudgetError           a budget of calls or tokens that is used up
    ├── UsageError            exit code 2: the user asked for something that cannot be
    │   ├── ConfigError       a key or value of the run configuration
    │   ├── PromptError       a prompt file
    │   └── IdentityError     a run directory that belongs to other settings
    └── RunEnvironmentError   exit code 3: the world is not as it must be
        ├── WeightsError      a missing, corrupt or misfitting checkpoint
        ├── StorageError      an address that cannot be read or written
        ├── LeaseError        another driver works on the run
        └── ClusterError      Ray cannot be reached or has no room

A message names the bad value, the place it came from and the edit or command that fixes it. Programming
errors stay ordinary Python exceptions.
"""

from __future__ import annotations

from typing import ClassVar

INTERRUPTED = 130
"""Exit code after Ctrl-C and SIGTERM."""


class LragError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    exit_code: ClassVar[int] = 1


class BudgetError(LragError):
    """A budget of calls or tokens is used up."""


class UsageError(LragError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class ConfigError(UsageError):
    """A key or value of the run configuration is wrong."""


class PromptError(UsageError):
    """A prompt file is missing, empty or unreadable."""


class IdentityError(UsageError):
    """The run directory holds results of other settings."""


class RunEnvironmentError(LragError):
    """The machine, cluster, storage or weights are not as the run needs them."""

    exit_code = 3


class WeightsError(RunEnvironmentError):
    """A checkpoint is missing, corrupt or does not fit the model."""


class StorageError(RunEnvironmentError):
    """A storage address cannot be read or written."""


class LeaseError(RunEnvironmentError):
    """Another driver works on the run, or has taken it over."""


class ChatError(RunEnvironmentError):
    """A language model cannot be asked: no key, no server, no such model, or none that answers."""


class ClusterError(RunEnvironmentError):
    """Ray cannot be started or reached, or has no room for the run."""
