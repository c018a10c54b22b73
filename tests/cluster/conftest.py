"""One private Ray cluster for the tests of this folder, with more CPUs than the machine may have: actors sleep here."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator

import pytest
import ray

from tests.cluster.nodes import patiently

KEY_ENV = "LRAG_TEST_KEY"
"""Variable that holds a language model's key on the nodes of the cluster."""


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    os.environ.setdefault(KEY_ENV, secrets.token_hex(24))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's sockets are below its folder and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="lr", ignore_cleanup_errors=True) as folder:
        patiently(
            lambda: ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=folder,
                _node_ip_address="127.0.0.1",
            )
        )
        yield
        ray.shutdown()
