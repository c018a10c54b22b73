from __future__ import annotations

import time

import pytest

from lrag_ray.config.redaction import holds_credentials, is_ray_address, redact


@pytest.mark.parametrize(
    "text",
    [
        "ftp://me:hunter2@host/x",
        "s3://AKIA:begin/hunter2+end@bucket/run",
        "s3://AKIA:p@hunter2@bucket/run",
        "s3://hunter2@bucket/run",
        "s3://AKIA:123/hunter2@bucket/run",
        "s3a://AKIA:123/4/hunter2@bucket/run",
        "gs://me:hunter2@bucket/run",
        "S3://AKIA:123/hunter2@bucket/run",
        "http://me:hun/ter2hunter2@host/x",
        "simplecache::s3://AKIA:1/hunter2@bucket/run",
        "abfs://me:hunter2@host/x",
        "ray://me:hunter2@host/x",
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
        "DefaultEndpointsProtocol=https;AccountName=me;AccountKey=hunter2==;EndpointSuffix=core.windows.net",
        "pwd=hunter2",
        "PGPASSWORD=hunter2",
        "passphrase: hunter2",
        'password="two words hunter2"',
        "private_key='hunter2'",
        "https://host/x?whatever=hunter2",
        "https://host/x?raw=true&code=hunter2#there",
        "SharedAccessSignature=hunter2",
        "Cookie: hunter2",
        "curl said: Bearer hunter2hunter2",
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
        "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
        "abfs://container@account.dfs.core.windows.net/run",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/mine/run",
        "hdfs://namenode:8020/data/a@b.mp4, http://[::1]:9000/bucket",
        "the Ray cluster at '10.0.0.1:6379' cannot be reached",
        "memory pass: 3 of 4 rollouts; keys model.a, model.b; cwd=/data",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text
    assert not holds_credentials(text)


def test_user_info_without_a_scheme_is_removed() -> None:
    assert redact("--set engine.address=me:hunter2@10.0.0.1:6379: no") == "--set engine.address=***@10.0.0.1:6379: no"


def test_keys_and_tokens_of_known_forms_are_removed_wherever_they_stand() -> None:
    text = "tried AKIAIOSFODNN7EXAMPLE and hf_abcdefghijklmnopqrstuvwx, then ghp_0123456789abcdefghijABCDEF"
    assert redact(text) == "tried *** and ***, then ***"


@pytest.mark.parametrize(
    "address", ["auto", "local", "10.0.0.1:6379", "[::1]:6379", "head-svc.ns.svc.cluster.local:6379"]
)
def test_addresses_of_clusters(address: str) -> None:
    assert is_ray_address(address)


@pytest.mark.parametrize(
    "address",
    ["", "host", "me@host:1", "me:secret@host:1", "ray://host:1", "host:0", "host:65536", "host:1/x", "a b:1"],
)
def test_anything_else_is_no_address_of_a_cluster(address: str) -> None:
    assert not is_ray_address(address)


@pytest.mark.parametrize("part", ["x", "x-", "secret", "!!:", "a.", "sk-", "a://b", "\"secret='", "a:b@"])
def test_the_time_for_a_long_text_grows_with_its_length_alone(part: str) -> None:
    text = part * (100_000 // len(part)) + "é"
    began = time.process_time()
    redact(text)
    holds_credentials(text)
    # Where every character begins a search to the end, it takes minutes.
    assert time.process_time() - began < 3
