"""Importing what a user names as ``package.module:Name``: a context method or a scoring suite."""

from __future__ import annotations

import importlib
import traceback
from typing import Any


def import_plugin(what: str, name: str, form: str) -> Any:
    """The object behind ``package.module:Name``; `what` it is to be (method, suite) and the last part of its `form`.

    Raises ValueError that names what is wrong: the form, a module that cannot be imported, with the exception and its
    line where the module itself raises one, or a name that the module does not have.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):
        raise ValueError(f"{what} '{name}' is not of the form package.module:{form}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{what} '{name}': cannot import '{module_name}' ({error}); is it on PYTHONPATH?") from error
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{what} '{name}': importing '{module_name}' raised {type(error).__name__}{_message(error)}"
            f"{_place(error)}. Fix that module"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ValueError(f"{what} '{name}': module '{module_name}' has no '{attribute}'") from error
    except Exception as error:
        raise ValueError(
            f"{what} '{name}': '{attribute}' of '{module_name}' raised {type(error).__name__}{_message(error)}"
            f"{_place(error)}. Fix that module"
        ) from error


def _message(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - its own text may be what fails
        return ""
    return f": {text[:300]}" if text else ""


def _place(error: BaseException) -> str:
    """File and line where it happened, or where a module cannot be parsed."""
    if isinstance(error, SyntaxError) and error.filename:
        return ""  # Its message says so.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    return f", at {frames[-1].filename}, line {frames[-1].lineno}" if len(frames) > 1 else ""
