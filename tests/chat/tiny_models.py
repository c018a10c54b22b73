"""Tiny chat models that are real ones: a Qwen2, or a Qwen2-VL, whose weights make it say one of given answers.

Attention and MLPs add nothing, so that the last token alone decides the next one through the output matrix: after the
mark of the assistant's turn comes one of the answers, each a token of its own, then the end. With temperature 0 that is
the first answer; sampled, each of them is equally likely.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ANSWERS = ["The light is steady. <score>4</score>", "Dark corners. <score>2</score>"]
"""What the served model says; the first one at temperature 0."""

# As Qwen writes them: servers find the answer by them.
ASSISTANT, END, PAD = "<|im_start|>assistant\n", "<|im_end|>", "<|endoftext|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_model(folder: Path, answers: Sequence[str]) -> Path:
    """A Qwen2 in `folder` that gives one of `answers`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = _tokenizer(answers)
    config = Qwen2Config(**_text_sizes(tokenizer))
    torch.manual_seed(0)
    return _saved(folder, Qwen2ForCausalLM(config), tokenizer, answers, tokenizer)


def vision_model(folder: Path, answers: Sequence[str]) -> Path:
    """A Qwen2-VL in `folder` that looks at pictures and gives one of `answers`."""
    import torch
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = _tokenizer(answers)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in VISION}
    sizes = _text_sizes(tokenizer)
    config = Qwen2VLConfig(
        text_config={
            **sizes,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        vision_config={
            "depth": 1,
            "embed_dim": 16,
            "hidden_size": sizes["hidden_size"],
            "num_heads": 2,
            "mlp_ratio": 1,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        vision_start_token_id=ids[VISION[0]],
        vision_end_token_id=ids[VISION[1]],
        vision_token_id=ids[VISION[2]],
        image_token_id=ids[VISION[3]],
        video_token_id=ids[VISION[4]],
    )
    torch.manual_seed(0)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=_TEMPLATE)
    return _saved(folder, Qwen2VLForConditionalGeneration(config), tokenizer, answers, processor)


def _tokenizer(answers: Sequence[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        eos_token=END,
        pad_token=PAD,
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(name, special=True) for name in (ASSISTANT, *VISION)], special_tokens=True)
    # Marked, so that no text that is sent holds one of them by chance.
    tokenizer.add_tokens([AddedToken(answer, special=False) for answer in answers])
    return tokenizer


def _text_sizes(tokenizer: Any) -> dict[str, Any]:
    vocabulary = len(tokenizer)
    hidden = -(-vocabulary // 32) * 32
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": 1,
        "max_position_embeddings": 65536,
        "head_dim": 16,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _saved(folder: Path, network: Any, tokenizer: Any, answers: Sequence[str], reader: Any) -> Path:
    import torch

    chosen = [tokenizer.convert_tokens_to_ids(answer) for answer in answers]
    end, mark = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ASSISTANT)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "visual" not in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        embedding = network.get_input_embeddings().weight
        embedding.zero_()
        embedding[range(len(embedding)), range(len(embedding))] = 1
        out = network.get_output_embeddings().weight
        out.zero_()
        out[end, :] = 1
        for place, answer in enumerate(chosen):
            out[answer, mark] = 2 - 1e-4 * place
    # As chat models have it; servers look it up.
    network.generation_config.do_sample = True
    network.generation_config.eos_token_id = end
    network.generation_config.pad_token_id = tokenizer.pad_token_id
    network.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder
