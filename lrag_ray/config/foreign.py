"""Inference configurations of Self-Forcing, Causal-Forcing, LongLive and LongLive-RAG as configurations of ours.

Their YAML files share one vocabulary, which grew from Self-Forcing's. What decides the videos is carried over; what has
no equivalent here is listed in comments. Values are those that the released inference code uses, its defaults included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lrag_ray.config.horizons import LATENT_FRAMES_PER_SECOND
from lrag_ray.errors import ConfigError
from lrag_ray.printable import printable

_SIGNS = ("denoising_step_list", "generator_ckpt", "model_kwargs", "num_frame_per_block", "warp_denoising_step")
_OURS = ("backbones", "methods", "durations_s")
_TRAINING = re.compile(
    r"(?:wandb|real_|fake_|text_encoder_fsdp|generator_fsdp|lr|beta|ema_|critic_|dfake_|dmd|train|max_iters|max_steps|"
    r"resume|discriminator|gan_|r[12]_|diversity|relativistic|concat_time|backward_|teacher_|streaming_|fsdp|log)"
)
_TRAINING_KEYS = {
    "batch_size",
    "denoising_loss_type",
    "distribution_loss",
    "eval_first_n",
    "gc_interval",
    "gradient_checkpointing",
    "guidance_scale",
    "last_step_only",
    "load_raw_video",
    "mixed_precision",
    "negative_prompt",
    "no_save",
    "no_visualize",
    "num_train_timestep",
    "num_training_frames",
    "same_step_across_blocks",
    "sharding_strategy",
    "text_encoder_name",
    "timestep_shift",
    "total_batch_size",
    "ts_schedule",
    "ts_schedule_max",
    "visualize_interval",
    "vis_interval",
    "weight_decay",
}
_FILES = {"output_folder", "save_with_index", "skip_existing", "latent_only", "max_video_saves", "wandb_save_dir"}
"""How they name and save videos; a run directory takes its place."""
_AS_HERE = (("causal", True), ("i2v", False), ("independent_first_frame", False), ("model_kwargs.is_causal", True))
"""Switches in the only position that there is here."""
_WAN_SIZES: dict[str, dict[str, int]] = {
    "Wan2.1-T2V-1.3B": {},
    "Wan2.1-T2V-14B": {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40},
}
_DEFAULT_MODEL = "Wan2.1-T2V-1.3B"
_GLOBAL_FRAMES = 21
"""Latent frames that their attention holds where no window is set."""
_DEFAULT_SHIFT = 8.0
_MOST = 1e9
"""No number here is larger."""


def is_foreign(data: Mapping[str, Any]) -> bool:
    """Whether the top level of a YAML file is that of such a configuration."""
    return any(key in data for key in _SIGNS) and not any(key in data for key in _OURS)


def import_config(name: str, data: Mapping[str, Any]) -> str:
    """Text of our YAML for the content of the file `name`.

    Raises ConfigError for a file that is not such a configuration, or whose model is not run here.
    """
    if not is_foreign(data):
        raise ConfigError(
            f"{name}: not an inference configuration of Self-Forcing, Causal-Forcing, LongLive or LongLive-RAG: none "
            f"of {', '.join(_SIGNS)} is in it. Fix: give such a file"
        )
    return _Import(name, data).text()


class _Import:
    """One file on its way: keys that are used are crossed off, the rest is listed."""

    def __init__(self, name: str, data: Mapping[str, Any]) -> None:
        self._name = name
        self._left: dict[str, Any] = dict(data)
        self._left_model: dict[str, Any] = dict(self._section("model_kwargs"))
        self._notes: list[str] = []
        self._is_training = any(key in data for key in ("distribution_loss", "trainer", "lr"))

    def text(self) -> str:
        """The file, comments first."""
        content = self._content()
        return "\n".join([*self._comments(), yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=118)])

    def _content(self) -> dict[str, Any]:
        sampler = self._sampler()
        frames = self._number("num_output_frames", _GLOBAL_FRAMES)
        if sampler["frames_per_block"] < 1 or frames % sampler["frames_per_block"]:
            raise ConfigError(
                f"{self._name}: num_output_frames {frames} is not a number of whole blocks of "
                f"{sampler['frames_per_block']}, which the released code refuses too. Fix: correct one of the two"
            )
        return {
            "job": "evaluate",
            "run": {"uri": f"runs/{_stem(self._name)}", "seed": self._number("seed", 0)},
            "prompts": self._prompts(),
            "durations_s": [frames / LATENT_FRAMES_PER_SECOND],
            "backbones": {"generator": self._backbone(sampler)},
            "methods": self._methods(frames),
            "engine": {"actors": "per_gpu", "gpus_per_actor": 1},
            "scoring": {"suite": "none"},
        }

    def _sampler(self) -> dict[str, Any]:
        steps = self._steps("denoising_step_list")
        first_key = "denoising_step_list_first_chunk"
        first = self._steps(first_key) if self._left.get(first_key) else []
        shift = self._left_model.pop("timestep_shift", None)
        if shift is None:
            shift = self._left.get("timestep_shift", _DEFAULT_SHIFT)
            self._notes.append(f"model_kwargs.timestep_shift is missing: sampler.shift is {shift} (their default: 8.0)")
        return {
            "denoising_steps": steps,
            "warp": bool(self._take("warp_denoising_step", False)),
            "shift": self._real("timestep_shift", shift),
            "context_timestep": self._real("context_noise", self._take("context_noise", 0.0)),
            "frames_per_block": self._number("num_frame_per_block", 1),
            **({"first_block_denoising_steps": first} if first else {}),
        }

    def _steps(self, key: str) -> list[int]:
        """A step list, without a last 0."""
        steps = self._take(key)
        if not isinstance(steps, list) or not steps or not all(type(step) is int for step in steps):
            raise ConfigError(
                f"{self._name}: {key} is {_shown(repr(steps))}, expected a list of whole numbers. Only few-step "
                "generators are run here; a file without this list is that of a many-step model. Fix: give the "
                "configuration of a distilled generator"
            )
        if steps[-1] == 0:
            steps = steps[:-1]
            self._notes.append(f"{key}: its last step 0 is dropped, as their inference does")
        return steps

    def _backbone(self, sampler: dict[str, Any]) -> dict[str, Any]:
        model = str(self._left_model.pop("model_name", None) or self._take("model_name") or _DEFAULT_MODEL)
        if model not in _WAN_SIZES:
            raise ConfigError(
                f"{self._name}: model_name {_shown(model)} is not run here; expected {' or '.join(_WAN_SIZES)}. "
                "Fix: give the configuration of such a generator"
            )
        shape = self._take("image_or_video_shape")
        latent = {"channels": 16, "height": 60, "width": 104}
        if isinstance(shape, list) and len(shape) == 5:
            latent = dict(zip(latent, shape[2:], strict=True))
        folder = f"wan_models/{model}"
        return {
            "label": _stem(self._name),
            **({"transformer": _WAN_SIZES[model]} if _WAN_SIZES[model] else {}),
            "sampler": sampler,
            "latent": latent,
            "weights": self._weights(),
            "dtype": "bfloat16",
            "text_encoder": {
                "kind": "umt5",
                "path": f"{folder}/models_t5_umt5-xxl-enc-bf16.pth",
                "tokenizer": f"{folder}/google/umt5-xxl",
            },
            "vae": {"kind": "wan", "path": f"{folder}/Wan2.1_VAE.pth"},
        }

    def _weights(self) -> dict[str, Any]:
        path = self._take("generator_ckpt")
        if not path:
            path = "CHECKPOINT.pt"
            self._notes.append("generator_ckpt is missing: set backbones.generator.weights.path to the checkpoint")
        elif self._is_training:
            self._notes.append(
                f"generator_ckpt ({path}): in a training file this is what training begins from, and inference takes "
                "--checkpoint_path: set backbones.generator.weights.path (and use_ema) to the trained generator"
            )
        weights = {"path": str(path), "use_ema": bool(self._take("use_ema", False))}
        lora, adapter = self._take("lora_ckpt"), self._section("adapter")
        self._take("adapter")
        if lora and adapter:
            strength = {key: adapter[key] for key in ("rank", "alpha") if adapter.get(key) is not None}
            return weights | {"lora": {"path": str(lora), **strength}}
        if lora:
            self._notes.append(f"lora_ckpt ({lora}) without adapter: their code does not load it, and it is left out")
        elif adapter:
            self._notes.append("adapter without lora_ckpt: a fresh LoRA changes nothing, and it is left out")
        return weights

    def _prompts(self) -> dict[str, Any]:
        path = self._take("data_path")
        if not path:
            path = "prompts.txt"
            self._notes.append("data_path is missing: set prompts.path")
        prompts: dict[str, Any] = {"path": str(path)}
        last = self._number("inference_iter", -1)
        if last >= 0:
            # Their loop ends after the prompt of this number.
            prompts["limit"] = last + 1
        if (samples := self._number("num_samples", 1)) != 1:
            prompts["samples"] = samples
        return prompts

    def _methods(self, frames: int) -> dict[str, Any]:
        model = self._left_model
        window, sink = model.pop("local_attn_size", -1), model.pop("sink_size", 0)
        if window == -1:
            window = -1 if frames <= _GLOBAL_FRAMES else _GLOBAL_FRAMES
            if window != -1:
                self._notes.append(
                    f"local_attn_size is not set: window is {_GLOBAL_FRAMES}, the frames that their attention holds"
                )
        settings = {"window": window, "sink": sink}
        top_k, exclude = model.pop("memory_size", 0), model.pop("recent_exclude", 0)
        descriptor, encoder = model.pop("compression_method", "avg_pool"), model.pop("ae_ckpt", None)
        if model.pop("use_latentmem", False) and top_k:
            rag = {**settings, "top_k": top_k, "recent_exclude": exclude, "descriptor": descriptor}
            if descriptor == "ae" and encoder:
                rag["encoder"] = str(encoder)
            return {"rag": rag}
        if model.pop("use_infinite_attention", False):
            self._notes.append(
                "use_infinite_attention: infinity_rope is the method nearest to it, not known to be equal"
            )
            return {"infinity_rope": settings}
        if self._take("global_sink", True) is False:
            self._notes.append("global_sink: false has no equivalent: here the first frames stay the sink")
        return {"base": settings}

    def _comments(self) -> list[str]:
        self._take("global_sink")
        left = {key: value for key, value in self._left.items() if key != "model_kwargs"}
        left |= {f"model_kwargs.{key}": value for key, value in self._left_model.items()}
        files = sorted(left.keys() & _FILES)
        training = sorted(
            key
            for key in left.keys() - _FILES
            if key in _TRAINING_KEYS or key.startswith("wandb") or (self._is_training and _TRAINING.match(key))
        )
        others = {
            key: value
            for key, value in left.items()
            if key not in files and key not in training and (key, value) not in _AS_HERE
        }
        lines = [
            f"Imported from {Path(self._name).name} by `lrag-ray import-config`.",
            "Noise is drawn by seed, prompt, block and pass here, so videos differ from those of the released code.",
            "`preset: as_released` at the top level switches on the numerics and the decoding of the released code.",
            *self._notes,
        ]
        if others:
            lines.append("Without equivalent, and perhaps of influence on the videos:")
            lines += [f"  {key}: {_shown(value)}" for key, value in others.items()]
        if files:
            lines.append(f"Without equivalent (run.uri is where results go): {', '.join(files)}")
        if training:
            lines.append(f"Without equivalent (training alone): {', '.join(training)}")
        # A key or a path with a line break would go on as configuration.
        return [f"# {printable(' '.join(line.splitlines()))}" for line in lines]

    def _take(self, key: str, default: Any = None) -> Any:
        value = self._left.pop(key, None)
        return default if value is None else value

    def _number(self, key: str, default: int) -> int:
        value = self._take(key, default)
        if type(value) is not int:
            raise ConfigError(f"{self._name}: {key} is {_shown(repr(value))}, expected a whole number. Fix: correct it")
        return value

    def _real(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < _MOST:
            raise ConfigError(f"{self._name}: {key} is {_shown(repr(value))}, expected a number. Fix: correct it")
        return float(value)

    def _section(self, key: str) -> Mapping[str, Any]:
        value = self._left.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self._name}: {key} is {_shown(repr(value))}, expected a section. Fix: correct it")
        return value


def _stem(name: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", Path(name).stem) or "imported"


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
