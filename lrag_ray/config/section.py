"""What the sections of every configuration have in common: strict models, and addresses without credentials."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from lrag_ray.config.redaction import holds_credentials

CREDENTIALS = (
    "credentials before an @. They would end up in logs and records: take them out and give them through the "
    "environment (s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
)


def _literal_address(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    if holds_credentials(value):
        raise ValueError(f"holds {CREDENTIALS}")
    if value.startswith("~") or re.search(r"\$[A-Za-z_{]", value):
        raise ValueError(
            f"'{value}' holds ~ or a variable, which configuration files do not expand: write the path out, or give it "
            "with --set outside quotes, so that the shell expands it"
        )
    return value


Address = Annotated[str, AfterValidator(_literal_address)]
"""A path or address without credentials, taken as it is written; a relative path means the working directory."""


class Section(BaseModel):
    """Base of every configuration section."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # Values may be addresses that hold secrets; our own messages redact them.
        hide_input_in_errors=True,
    )
