"""The code of this machine as a wheel, for a job's environment: exactly what is imported here, wherever it came from.

It is made from the installed files, so no build tool is needed and an editable checkout travels as it is. It declares
no dependencies: those are part of the cluster's image, and pip must not install a second torch beside them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lrag_ray
from lrag_ray.errors import RunEnvironmentError

PACKAGES = ("lrag_ray", "jobs")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_LEFT_OUT = {".pyc", ".pyo"}


class Wheel(NamedTuple):
    """A wheel on disk."""

    path: Path
    version: str
    """Of the package."""
    digest: str
    """Of its content; part of the file's name, by which a cluster knows it."""


def build_wheel(folder: Path) -> Wheel:
    """Write the wheel of the code that runs here into `folder`. The same code makes the same file."""
    version = lrag_ray.__version__
    info = f"lrag_ray-{version}.dist-info"
    files = {name: path.read_bytes() for name, path in _sources()}
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: lrag-ray\nVersion: {version}\nRequires-Python: >=3.11\n"
    ).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: lrag-ray\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    # As the build tag, which begins with a digit: Ray takes wheels of the same name for the same wheel.
    tag = f"0{digest.hexdigest()[:12]}"
    path = folder / f"lrag_ray-{version}-{tag}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), files[name], zipfile.ZIP_DEFLATED)
    return Wheel(path, version, tag)


def _sources() -> Iterator[tuple[str, Path]]:
    """Files of our packages, by their name in the wheel."""
    for package in PACKAGES:
        root = _root(package)
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root.parent)
            if path.is_file() and path.suffix not in _LEFT_OUT and "__pycache__" not in name.parts:
                yield name.as_posix(), path


def _root(package: str) -> Path:
    beside = Path(lrag_ray.__file__).parent.parent / package
    if (beside / "__init__.py").is_file():
        return beside
    # An editable installation may map each package to a place of its own.
    found = importlib.util.find_spec(package)
    root = Path(found.origin).parent if found is not None and found.origin else None
    if root is None or not (root / "evaluate.py").is_file():
        raise RunEnvironmentError(
            f"the package {package!r} of lrag-ray is not installed beside {Path(lrag_ray.__file__).parent}, so its "
            "code cannot be sent to the cluster. Fix: install lrag-ray again (pip install .), or use images that have "
            "it (--no-upload)"
        )
    return root


def _record(files: dict[str, bytes], own: str) -> bytes:
    """The list of files that pip checks."""
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in sorted(files.items())
    ]
    return "\n".join([*lines, f"{own},,", ""]).encode()
