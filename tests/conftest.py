"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, here and in processes that tests start: on few cores threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Clusters of the tests answer to this session alone, and Ray writes no token into the home folder.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# By default whatever else runs on the machine takes precedence over Ray's workers, by far.
os.environ.setdefault("RAY_worker_niceness", "0")
# Ray kills workers where the whole machine's memory is nearly full, whoever has filled it.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
# A raylet ends itself unless its agents are there after half of this; on a busy machine Ray's 30 s are too few.
os.environ.setdefault("RAY_agent_register_timeout_ms", "300000")
# A hub of the tests that is slow to answer is only busy.
for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
    os.environ.setdefault(name, "300")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A session that a script put into the background ignores Ctrl-C, and so would the commands that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A time limit per example fails tests on a busy machine only.
settings.register_profile("lrag", deadline=None)
settings.load_profile("lrag")

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(os.environ.get("LRAG_GOLDEN") or REPOSITORY.parent / "shared" / "golden")
"""Folder of the larger set of golden vectors: $LRAG_GOLDEN, else ../shared/golden beside the checkout. The subset in
tests/golden is there in any case."""


LONGEST = (
    *("cluster/test_submit.py", "cluster/test_several_nodes.py", "cluster/test_run.py", "cluster/test_session.py"),
    *("cluster/test_decode.py", "cluster/test_latents.py", "cluster/test_third_party_suite.py"),
    *("rollout/test_cuda_calls.py", "scoring/vbench_long/test_networks.py", "test_bench_gpu.py"),
    *("report/test_build.py", "scoring/vbench_long/test_score.py", "conformance/test_golden.py"),
    *("wan/test_fused_rows.py", "scoring/vbench_long/test_device.py", "store/test_lease.py"),
)
"""Files that take longest. One that begins last keeps the other worker of `make test` waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; no other order changes."""
    ranks = {REPOSITORY / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the larger set of golden vectors; skips where it is absent."""
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden vectors: {GOLDEN} is not a folder (set LRAG_GOLDEN)")
    return GOLDEN


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    """A tiny vision model behind `transformers serve`: its folder, which is its name there, and the port."""
    from tests.chat.servers import transformers_serve
    from tests.chat.tiny_models import ANSWERS, vision_model

    folder = vision_model(tmp_path_factory.mktemp("models") / "vision", ANSWERS)
    with transformers_serve(folder) as port:
        yield folder, port


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """An empty bucket on a real S3 protocol server, for the whole session."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    import s3fs

    s3fs.S3FileSystem(use_listings_cache=False).mkdir("runs")
    yield "s3://runs"
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()
