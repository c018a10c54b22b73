"""A report on the Hugging Face Hub: the content of an export as a dataset repository with a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lrag_ray.errors import UsageError
from lrag_ray.printable import counted, printable
from lrag_ray.report.build import PAGE
from lrag_ray.report.collect import ReportData
from lrag_ray.report.export import write_members
from lrag_ray.report.headline import headline
from lrag_ray.report.tables import warnings
from lrag_ray.store.hub import Hub, HubPlace
from lrag_ray.store.records import RolloutId
from lrag_ray.store.scratch import scratch_folder

CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """What was committed."""

    page: str
    """Of the repository."""
    videos: int
    size_bytes: int
    public: bool
    missing: Sequence[str]
    """Videos that are left out because they cannot be read or are damaged."""


def push_report(
    data: ReportData, place: HubPlace, wanted: Callable[[RolloutId], bool], strips: int | None, *, public: bool
) -> Pushed:
    """Write page, tables and the videos of the `wanted` rollouts to a dataset repository, private unless `public`.

    Raises:
        UsageError: no token, no video is wanted, a file or revision in the address, or a public repository.
        StorageError: a run cannot be read, or the repository cannot be written.
    """
    if place.file or place.revision != "main":
        raise UsageError("a run is pushed to a repository as a whole. Fix: hub://OWNER/NAME alone")
    if not any(map(wanted, data.rollouts)):
        raise UsageError("no video fits. `lrag-ray videos RUN` lists what there is")
    hub = Hub()
    hub.check_target(place, public=public)
    missing: list[str] = []
    with scratch_folder() as folder:
        videos = write_members(data, folder, wanted, strips, missing)
        (folder / CARD).write_text(_card(data, videos), encoding="utf-8")
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        page = hub.push(place, folder, public=public, message="Report by lrag-ray")
    return Pushed(page, videos, size, public, missing)


def _card(data: ReportData, videos: int) -> str:
    """The repository's front page. Names and labels are a stranger's: they stand in code, where nothing is a link."""
    found = headline(data)
    lines = [
        "---",
        "tags: [video-generation, lrag-ray]",
        "viewer: false",
        "---",
        "# Long-video comparison",
        "",
        f"Scores: {data.suite.title}. {counted(len(data.identity.prompts), 'prompt')}, "
        f"{counted(videos, 'video')}. Download the repository",
        f"and open `{PAGE}` to play them; `ranks.csv` and the files beside it hold the tables.",
        "",
        "Methods: " + ", ".join(_code(name) for name in data.identity.methods),
    ]
    lines += [f"\n> {_code(text)}" for text in [*data.labels, *warnings(data)]]
    if found:
        lines += ["", _code(found.text)]
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    return f"`{printable(text).replace('`', chr(39))}`"
