"""What all pages have in common: one template environment that escapes everything, and one style sheet."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined


def page_environment() -> Environment:
    """Templates of this package; every value is escaped unless it is our own Markup."""
    return Environment(
        loader=PackageLoader("lrag_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """A text file of this package."""
    return files("lrag_ray.report").joinpath(name).read_text(encoding="utf-8")


def style_sheet() -> str:
    """CSS of all pages."""
    return asset("report.css")
