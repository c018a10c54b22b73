"""Backbone presets: the defaults of a `backbones` section, named by its `preset` key.

The real ones are Wan2.1-T2V-1.3B generators; their files are looked for under ``weights/`` in the working directory
unless the configuration names other paths. File names are those of the releases: the generators come from the Hub
repository qixinhu11/LongLive-RAG (``checkpoints/``), Causal-Forcing's other models from zhuhz22/Causal-Forcing (the
4-step frame-wise one is renamed, because two of its files are called causal_forcing.pt), text encoder, tokenizer and
VAE from Wan-AI/Wan2.1-T2V-1.3B.
"""

from __future__ import annotations

from typing import Any

_WAN_1_3B: dict[str, Any] = {
    "transformer": {
        "dim": 1536,
        "ffn_dim": 8960,
        "freq_dim": 256,
        "text_dim": 4096,
        "text_len": 512,
        "in_dim": 16,
        "out_dim": 16,
        "num_heads": 12,
        "num_layers": 30,
    },
    "sampler": {
        "denoising_steps": [1000, 750, 500, 250],
        "warp": True,
        "shift": 5.0,
        "context_timestep": 0.0,
        "frames_per_block": 3,
    },
    "latent": {"channels": 16, "height": 60, "width": 104},
    "dtype": "bfloat16",
    "text_encoder": {
        "kind": "umt5",
        "path": "weights/Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "weights/Wan2.1-T2V-1.3B/google/umt5-xxl",
    },
    "vae": {"kind": "wan", "path": "weights/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"},
}


def _framewise(label: str, file: str, steps: list[int]) -> dict[str, Any]:
    """A Causal-Forcing generator of single frames; all of them denoise the first frame in four steps."""
    four = _WAN_1_3B["sampler"]["denoising_steps"]
    own = {"denoising_steps": steps, "first_block_denoising_steps": four} if steps != four else {}
    return {
        **_WAN_1_3B,
        "label": f"Causal-Forcing ({label})",
        "sampler": {**_WAN_1_3B["sampler"], "frames_per_block": 1, **own},
        "weights": {"path": f"weights/{file}", "use_ema": True},
    }


def _tiny_world(builtin: str, label: str) -> dict[str, Any]:
    return {
        "label": label,
        "transformer": {
            "dim": 128,
            "ffn_dim": 256,
            "freq_dim": 64,
            "text_dim": 32,
            "text_len": 96,
            "in_dim": 16,
            "out_dim": 16,
            "num_heads": 4,
            "num_layers": 4,
        },
        "weights": {"builtin": builtin},
        # 128x128 pixels.
        "latent": {"channels": 16, "height": 8, "width": 8},
        "dtype": "float32",
        "text_encoder": {"kind": "tiny"},
        "vae": {"kind": "tiny_world", "channels_last": True},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "tiny_world": _tiny_world("tiny_world", "tiny world, trained with retrieved frames"),
    "tiny_world_zero_shot": _tiny_world("tiny_world_zero_shot", "tiny world, trained without retrieved frames"),
    "tiny": {
        "label": "tiny, untrained",
        "transformer": {
            "dim": 64,
            "ffn_dim": 128,
            "freq_dim": 32,
            "text_dim": 32,
            "text_len": 256,
            "in_dim": 16,
            "out_dim": 16,
            "num_heads": 2,
            "num_layers": 3,
        },
        "weights": {"random_seed": 0},
        # Videos of 128x128, the smallest that all networks of VBench-Long can look at.
        "latent": {"channels": 16, "height": 16, "width": 16},
        "dtype": "float32",
        "text_encoder": {"kind": "tiny"},
        "vae": {"kind": "tiny"},
    },
    "self_forcing": {
        **_WAN_1_3B,
        "label": "Self-Forcing",
        "weights": {"path": "weights/self_forcing.pt", "use_ema": True},
    },
    "causal_forcing": {
        **_WAN_1_3B,
        "label": "Causal-Forcing (5 s checkpoint, as in the paper)",
        "weights": {"path": "weights/causal_forcing.pt"},
    },
    "causal_forcing_long": {
        **_WAN_1_3B,
        "label": "Causal-Forcing (long-video checkpoint, trained for rolling_forcing; others sample it block by block)",
        "weights": {"path": "weights/longvideo.pt", "use_ema": True},
    },
    "causal_forcing_framewise": _framewise("frame by frame, 4 steps", "framewise-4step.pt", [1000, 750, 500, 250]),
    "causal_forcing_2step": _framewise("frame by frame, 2 steps", "framewise-2step.pt", [1000, 500]),
    "causal_forcing_1step": _framewise("frame by frame, 1 step", "framewise-1step.pt", [1000]),
    "longlive": {
        **_WAN_1_3B,
        "label": "LongLive",
        "weights": {
            "path": "weights/longlive_base.pt",
            "lora": {"path": "weights/longlive_lora.pt", "rank": 256, "alpha": 256.0},
        },
    },
}
"""Values by preset name."""

_FIVE_SECONDS = (
    "{} is a frame-wise Causal-Forcing checkpoint trained on 21 latent frames (5 s). Its authors do not claim longer "
    "videos for it and publish longvideo.pt for them: preset causal_forcing_long"
)

CHECKPOINT_NOTES: dict[str, str] = {
    **{name: _FIVE_SECONDS.format(name) for name in ("framewise-4step.pt", "framewise-2step.pt", "framewise-1step.pt")},
    "causal_forcing.pt": (
        "causal_forcing.pt is Causal-Forcing's checkpoint for videos of 5 s, as the LongLive-RAG paper used it. Its "
        "authors call that baseline extremely unfair for long video and publish longvideo.pt for it: preset "
        "causal_forcing_long"
    ),
}
"""What a plan says of a published checkpoint, by its file name."""

CHECKPOINT_LOOPS = {"longvideo.pt": "rolling"}
"""Rollout loop that a published checkpoint is trained for, by its file name, where it is not the block loop."""

LOOP_NOTES = {
    "rolling": (
        "{checkpoint} is trained for rolling windows (method rolling_forcing); {methods}: sampled block by block, "
        "which its authors have not tested"
    ),
    "blocks": (
        "{methods}: blocks of several noise levels are denoised together, for which {checkpoint} is not known to be "
        "trained (preset causal_forcing_long is)"
    ),
}
"""What a plan says where a checkpoint is trained for another loop than a method has."""


AS_RELEASED: dict[str, dict[str, Any]] = {
    "video": {"cold_chunk": 60},
    "vae": {"dtype": "bfloat16"},
}
"""What the run preset as_released puts under `video` and every backbone's `vae`; methods bring their own
(`ContextPolicy.as_released`)."""


_OTHER_SOURCES = ("random_seed", "builtin")
"""Sources of weights beside `path`."""


def overlay(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`preset` with the user's keys over it, section by section.

    A section whose user names another kind (`kind`), or another source of weights (`random_seed`, `builtin`), keeps
    nothing of the preset's: paths of the one kind mean nothing to the other. A `path` takes the place of a preset's
    other source.
    """
    merged = dict(preset)
    for key, value in given.items():
        old = merged.get(key)
        if not (isinstance(old, dict) and isinstance(value, dict)) or _replaces(old, value):
            merged[key] = value
        elif value.get("path") is not None:
            merged[key] = overlay({name: kept for name, kept in old.items() if name not in _OTHER_SOURCES}, value)
        else:
            merged[key] = overlay(old, value)
    return merged


def _replaces(old: dict[str, Any], value: dict[str, Any]) -> bool:
    other_kind = "kind" in value and value["kind"] != old.get("kind")
    return other_kind or any(value.get(source) is not None for source in _OTHER_SOURCES)
