"""The text stage of a run, with a umT5 of its own on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.store.failures import read_failures
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.text import UMT5Sizes
from tests.cluster.test_run import make_config
from tests.stages.make import BACKBONE, make_prompts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

PROMPTS = make_prompts("a red fox in the snow", "a river at dawn")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "in", "the", "snow", "at", "dawn", "river"]


@pytest.fixture
def text_encoder(tmp_path: Path) -> dict[str, str]:
    """The text_encoder section of a tiny encoder with random weights, which knows 12 words."""
    sizes = UMT5Sizes(vocab_size=len(WORDS), dim=8, head_dim=16, num_heads=2, ffn_dim=16, num_layers=2)
    model = UMT5EncoderModel(sizes.transformers_config())
    fill_random(model, 0)
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tokenizer")
    return {"kind": "umt5", "path": str(tmp_path / "text_encoder"), "tokenizer": str(tmp_path / "tokenizer")}


def rewrite(file: Path, old: bytes, new: bytes) -> None:
    """Change bytes of a file as a failing disk does: its size and time stay, and so does its remembered digest."""
    before, content = file.stat(), file.read_bytes()
    assert len(old) == len(new) and content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_prompt_that_cannot_be_encoded_costs_its_own_rollouts_alone(
    text_encoder: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    backbones = {"tiny": {**BACKBONE, "text_encoder": text_encoder}}
    config = make_config(tmp_path / "run", backbones=backbones, durations_s=[1.5])
    build_identity(config, PROMPTS)  # Remembers the digests of the files as they should be.
    vocabulary = Path(text_encoder["tokenizer"]) / "tokenizer.json"
    # An id that the encoder does not have.
    rewrite(vocabulary, b'"river": 11', b'"river": 91')

    outcome = evaluate(config, PROMPTS)
    damaged = PROMPTS[1].prompt_id
    assert (outcome.exit_code, outcome.commits_made) == (1, 2)
    assert {(rollout.method, rollout.prompt_id) for rollout in outcome.failed} == {("base", damaged), ("rag", damaged)}
    title = f"prompt {damaged} of tiny"
    assert outcome.missing == {
        title: "IndexError: index out of range in self",
        **{rollout.path: "its prompt could not be encoded" for rollout in outcome.failed},
    }
    run = RolloutRun(config.run.uri)
    assert {commit.rollout.prompt_id for commit in run.commits()} == {PROMPTS[0].prompt_id}
    records, _ = read_failures(run.storage)
    assert [(record.stage, record.task, record.counted_attempts) for record in records] == [
        ("text", title, attempt) for attempt in (1, 2, 3)
    ]
    assert run_status(run).failures == records[-1:] and records[-1].quarantined

    rewrite(vocabulary, b'"river": 91', b'"river": 11')
    outcome = evaluate(config, PROMPTS)
    assert (outcome.exit_code, outcome.commits_made, outcome.missing) == (0, 2, {})
    assert read_failures(run.storage) == ([], []) and run_status(run).failures == []
