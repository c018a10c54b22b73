from __future__ import annotations

import pytest

from lrag_ray.config.redaction import holds_credentials, redact


@pytest.mark.parametrize(
    "text",
    [
        "ftp://me:hunter2@host/x",
        "s3://AKIA:begin/hunter2+end@bucket/run",
        "s3://AKIA:p@hunter2@bucket/run",
        "s3://hunter2@bucket/run",
    ],
)
def test_user_info_of_an_address_is_removed_whatever_it_holds(text: str) -> None:
    assert "hunter2" not in redact(text)
    assert redact(text).endswith(("@host/x", "@bucket/run"))
    assert holds_credentials(text)


@pytest.mark.parametrize(
    "text",
    [
        "secret=hunter2",
        "{'aws_secret_access_key': 'hunter2'}",
        "https://host/x?X-Amz-Signature=hunter2&y=1",
        "https://host/x?sv=2020&sig=hunter2%3D",
        "Authorization: Bearer hunter2",
        "HF_TOKEN=hunter2",
        'session-token: "hunter2"',
    ],
)
def test_values_of_secret_parameters_are_removed(text: str) -> None:
    assert "hunter2" not in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "/data/runs/demo: 3 tokens per frame, s3://bucket/run",
        "http://localhost:9000/bucket/clip@v1.mp4 and s3://bucket/clip@v1.mp4",
        "run.yaml:4: backbones.longlive.text_encoder.tokenizer: expected text, got 3",
        "tokens_per_frame: 1560",
        "The store does not know the credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        "--set design=x",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
    assert not holds_credentials(text)
