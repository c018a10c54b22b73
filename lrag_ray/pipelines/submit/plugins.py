"""The source files of plug-ins that a configuration names, and of what they import from beside them."""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

from lrag_ray.config.jobs import JobConfig

_OURS = {"lrag_ray", "jobs"}


def plugin_modules(config: JobConfig) -> list[str]:
    """Modules that `config` names (``module:Class``) beside those of lrag-ray."""
    # Not every job has methods and scores.
    named = [method.method for method in getattr(config, "methods", {}).values()]
    if hasattr(config, "scoring"):
        named.append(config.scoring.suite)
    modules = dict.fromkeys(name.partition(":")[0] for name in named if ":" in name)
    return [module for module in modules if module.partition(".")[0] not in _OURS]


def plugin_files(modules: list[str]) -> dict[str, Path]:
    """Files to travel, by their path below a folder on the PYTHONPATH: whole packages, single modules.

    What a plug-in imports from the same folder travels too, and so on. Installed packages travel alone: what they
    need is installed, here and on the nodes. The modules must be importable here.
    """
    files: dict[str, Path] = {}
    pending, done = list(modules), set[str]()
    while pending:
        module = pending.pop()
        top = module.partition(".")[0]
        if top in done or top in _OURS:
            continue
        found = dict(_files_of(top, module))
        if any(path.suffix == ".py" for path in found.values()):
            done.add(top)
        root = _import_folder(found)
        fresh = {name: path for name, path in found.items() if name not in files}
        files |= fresh
        if root is None or _is_installed(root):
            continue
        for path in fresh.values():
            if path.suffix == ".py":
                pending += [name for name in _imports(path) if _lives_in(name, root)]
    return files


def _files_of(top: str, module: str) -> Iterator[tuple[str, Path]]:
    """Files of the top-level package or module; of a namespace package, only the part on the way to `module`."""
    spec = _spec(top)
    if spec is None:
        return
    if spec.origin and spec.origin.endswith(".py") and not spec.submodule_search_locations:
        yield Path(spec.origin).name, Path(spec.origin)
        return
    for place in spec.submodule_search_locations or ():
        folder, prefix = Path(place), Path(top)
        steps = module.split(".")[1:]
        while not (folder / "__init__.py").is_file() and steps and (folder / steps[0]).is_dir():
            folder, prefix = folder / steps[0], prefix / steps[0]
            steps = steps[1:]
        if not (folder / "__init__.py").is_file() and steps:
            single = folder / f"{steps[0]}.py"
            if single.is_file():
                yield (prefix / single.name).as_posix(), single
            continue
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in name.parts):
                yield (prefix / name).as_posix(), path


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None


def _import_folder(files: dict[str, Path]) -> Path | None:
    """The folder on sys.path that `files` are named from."""
    for name, path in files.items():
        return path.parents[len(Path(name).parts) - 1]
    return None


def _lives_in(module: str, root: Path) -> bool:
    """Whether `module` is found in the import folder `root`, and not elsewhere."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in _OURS:
        return False
    return (root / f"{top}.py").is_file() or (root / top).is_dir()


def _is_installed(root: Path) -> bool:
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    return root.resolve() in installed


def _imports(path: Path) -> Iterator[str]:
    """Absolute names that a file imports, anywhere in it."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
