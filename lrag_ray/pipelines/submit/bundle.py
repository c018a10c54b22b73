"""What travels with a job beside the code: the configuration as it was resolved here, and the small files it names.

The archive is the job's working directory. It is made file by file from what the configuration names, so nothing
depends on a .gitignore, and nothing else travels.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lrag_ray.config.addresses import addresses_of
from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.paths import RANDOM, weight_paths, with_absolute_paths
from lrag_ray.config.refine import PRESET
from lrag_ray.config.source import KeyPath, dotted
from lrag_ray.errors import UsageError
from lrag_ray.pipelines.submit.plugins import plugin_files, plugin_modules

CONFIG_NAME = "lrag-job.json"
"""The configuration in the job's working directory."""
MOST_BYTES = (100 << 20) - 1
"""Of an upload: Ray's dashboard takes less than 100 MiB at a time."""
_MOST_RAW_BYTES = 1 << 30
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LISTED = 5
_RUN: KeyPath = ("run", "uri")
_RECIPES = {"weights": RANDOM, "template": PRESET}
"""Values of keys for files that name no file."""


class OnNodes(NamedTuple):
    """A path that the job takes as it is: it must be there on every node."""

    key: str
    address: str


@dataclass(frozen=True)
class Bundle:
    """The working directory of a job, before it is written."""

    config: JobConfig
    """As the job reads it: paths absolute, or relative to the working directory."""
    files: dict[str, Path]
    """What travels, by its path in the working directory."""
    on_nodes: tuple[OnNodes, ...]
    notes: tuple[str, ...]

    @property
    def config_text(self) -> str:
        """Content of the configuration file."""
        return json.dumps(self.config.model_dump(mode="json"), indent=1)

    @property
    def digest(self) -> str:
        """Of the configuration, with the content of what travels."""
        digest = hashlib.sha256(self.config_text.encode())
        for name, path in sorted(self.files.items()):
            digest.update(f"\0{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def check_size(self) -> None:
        """UsageError where the archive is too large."""
        if sum(path.stat().st_size for path in self.files.values()) > MOST_BYTES:
            with tempfile.TemporaryDirectory(prefix="lrag-submit-") as folder:
                self.write(Path(folder))

    def write(self, folder: Path) -> Path:
        """The archive, in `folder`; the same content makes the same file. UsageError where it is too large."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        if sum(sizes.values()) > _MOST_RAW_BYTES:
            raise UsageError(_too_large(sum(sizes.values()), sizes))
        path = folder / "working_dir.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo(CONFIG_NAME, _EPOCH), self.config_text, zipfile.ZIP_DEFLATED)
            for name, source in sorted(self.files.items()):
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), source.read_bytes(), zipfile.ZIP_DEFLATED)
        if path.stat().st_size > MOST_BYTES:
            raise UsageError(_too_large(path.stat().st_size, sizes))
        return path


def make_bundle(config: JobConfig) -> Bundle:
    """What a job of `config` needs. UsageError for a file that is named and cannot be read."""
    absolute = with_absolute_paths(config)
    data = absolute.model_dump(mode="json")
    weights = weight_paths(absolute)
    files: dict[str, Path] = {}
    on_nodes: dict[str, str] = {}
    for path in dict.fromkeys([*(path for path, _ in addresses_of(absolute)), *weights]):
        section, key = _section_of(data, path), path[-1]
        address = section[key]
        if not isinstance(address, str) or not _is_local(address) or address == _RECIPES.get(str(key)):
            continue
        local = _absolute(address)
        if path not in weights and path != _RUN and Path(local).is_file():
            name = _name_inside(address, len(files))
            files[name] = _readable(path, local)
            section[key] = name
        else:
            section[key] = on_nodes[dotted(path)] = local
    for path, text in _plugin_settings(absolute):
        if path in weights:
            continue
        name = os.path.normpath(text)
        if Path(text).is_absolute() or name.startswith(".."):
            on_nodes[dotted(path)] = text
        else:
            # Under its own name: the setting may be part of the run's identity.
            files[PurePosixPath(name).as_posix()] = _readable(path, text)
    files |= plugin_files(plugin_modules(config))
    notes = []
    if config.engine.address is not None:
        data["engine"]["address"] = None
        notes.append(f"engine.address {config.engine.address} is not used: the job works on the cluster that runs it")
    resolved = type(config).model_validate(data)
    return Bundle(resolved, files, tuple(OnNodes(*each) for each in on_nodes.items()), tuple(notes))


def run_address(uri: str) -> str:
    """The address of a run as jobs are found by it: absolute, without a slash at its end."""
    if not _is_local(uri):
        return uri.rstrip("/")
    return _absolute(uri)


def _absolute(address: str) -> str:
    """Without following links: a shared folder may be one."""
    return os.path.normpath(Path(address.removeprefix("file://")).absolute())


def _is_local(address: str) -> bool:
    return "://" not in address or address.startswith("file://")


def _section_of(data: Any, path: KeyPath) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def _name_inside(address: str, number: int) -> str:
    """Path in the working directory: the same where that is possible, so that messages name what the user wrote."""
    name = os.path.normpath(address)
    if Path(address).is_absolute() or "://" in address or name.startswith(".."):
        return f"files/{number}/{Path(address).name}"
    return PurePosixPath(name).as_posix()


def _readable(path: KeyPath, address: str) -> Path:
    try:
        with Path(address).open("rb"):
            return Path(address)
    except OSError as error:
        raise UsageError(f"{dotted(path)} names {address!r}, which cannot be read: {error.strerror}") from None


def _plugin_settings(config: JobConfig) -> Iterator[tuple[KeyPath, str]]:
    """Settings of plug-ins that name an existing file: text with a slash or a suffix in it."""
    sections: list[tuple[KeyPath, Mapping[str, Any]]] = [
        (("methods", name), method.settings) for name, method in getattr(config, "methods", {}).items()
    ]
    if hasattr(config, "scoring"):
        sections.append((("scoring", "settings"), config.scoring.settings))
    for path, settings in sections:
        for key, value in settings.items():
            listed = [((*path, key, i), text) for i, text in enumerate(value)] if isinstance(value, list) else []
            for place, text in listed or [((*path, key), value)]:
                if isinstance(text, str) and ("/" in text or Path(text).suffix) and Path(text).is_file():
                    yield place, text


def _too_large(total: int, sizes: Mapping[str, int]) -> str:
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:_LISTED]
    listed = "\n".join(f"  {size:>15,}  {name}" for name, size in largest)
    return (
        f"the files that would travel with the job come to {total:,} bytes, and Ray's dashboard takes less than "
        f"{MOST_BYTES + 1:,} at a time. The largest:\n{listed}\nFix: put large files where every node reads them (a "
        "shared folder, a bucket) and name that place; keep data out of the packages of plug-ins"
    )
