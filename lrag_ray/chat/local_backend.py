"""A Hugging Face model folder in this process, through transformers: text, and pictures where the model takes them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrag_ray.chat.backend import Backend, RejectedError
from lrag_ray.chat.messages import Finish, Media, Message, Question, Reply, Usage
from lrag_ray.chat.model_folder import generation_settings, refuse_other_code
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import ChatError
from lrag_ray.wan.file_kinds import refuse_odd_files
from lrag_ray.wan.tokenizer_process import TokenizerError, TokenizerProcess
from lrag_ray.weights.digests import weights_digest


def folder_digest(model: str) -> str:
    """Digest of all files of a model folder. ChatError where it is not one."""
    if not (Path(model) / "config.json").is_file():
        raise ChatError(
            f"model '{model}' is not a Hugging Face model folder (no config.json). Fix: give backend local a folder "
            "that is on every node; nothing is downloaded"
        )
    try:
        refuse_odd_files(Path(model))
        refuse_other_code(Path(model))
    except (OSError, ValueError, RecursionError) as error:
        raise ChatError(f"model '{model}' is not read: {error}. Fix: give a folder as it was published") from error
    return weights_digest(model)


class LocalBackend(Backend):
    """Generates in batches. Sampled answers (temperature above 0) are made one by one, each from a seed of its own.

    The folder's chat template and its decoder run in a process with limits; what a conversation becomes is tokenized
    there before it is here.
    """

    batched = True

    def __init__(self, section: ChatSection, device: str) -> None:
        """Load the model onto `device`, cpu or cuda. ChatError for a folder that does not load."""
        import torch
        import transformers

        self._section = section
        self._device = device
        folder_digest(section.model)
        options = {"local_files_only": True, "trust_remote_code": False}
        try:
            # First there, because a vocabulary may take any amount of memory.
            self._texts = TokenizerProcess(Path(section.model))
            config = transformers.AutoConfig.from_pretrained(section.model, **options)
            sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
            reader = transformers.AutoProcessor if sees else transformers.AutoTokenizer
            self._processor: Any = reader.from_pretrained(section.model, **options)
            dtype = torch.float32 if device == "cpu" else "auto"
            self._network: Any
            self._network, found = kind.from_pretrained(
                section.model, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
            if missing := sorted(found["missing_keys"]):
                # The library would answer with random numbers in their place.
                raise ValueError(f"its files lack {len(missing)} tensors of the model, among them {missing[0]}")
            kept = generation_settings(self._network.generation_config)
            self._network.generation_config = transformers.GenerationConfig(**kept)
        except Exception as error:
            # The library raises anything over files that are damaged or contradict one another.
            raise ChatError(
                f"model '{section.model}' cannot be loaded: {type(error).__name__}: {error}. Fix: give a folder as it "
                "was published, of a model that transformers knows"
            ) from error
        self._network.to(device).eval()
        self._sees = sees
        self._tokenizer: Any = getattr(self._processor, "tokenizer", self._processor)
        own = getattr(self._processor, "chat_template", None)
        template = own.get("default") if isinstance(own, dict) else own
        if not isinstance(template, str):
            raise ChatError(f"model '{section.model}' has no chat template, so it is not a chat model")
        self._template = template
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Answers of one batch; equal questions in any batch get equal answers but for rounding."""
        if self._section.temperature > 0 and len(questions) > 1:
            return [reply for question in questions for reply in self.ask([question])]
        import torch

        section = self._section
        inputs = self._inputs([question.messages for question in questions]).to(self._device)
        sampled: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if section.temperature > 0:
            torch.manual_seed((section.seed or 0) + questions[0].vote)
            sampled = {"do_sample": True, "temperature": section.temperature, "top_p": None, "top_k": 0}
        try:
            with torch.inference_mode():
                made = self._network.generate(
                    **inputs, max_new_tokens=section.max_tokens, pad_token_id=self._tokenizer.pad_token_id, **sampled
                )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Sizes of a stranger's model that contradict its tokenizer.
            raise ChatError(f"model '{section.model}' cannot answer: {type(error).__name__}: {error}") from error
        width = inputs["input_ids"].shape[1]
        return [
            self._reply(row[width:], int(mask.sum())) for row, mask in zip(made, inputs["attention_mask"], strict=True)
        ]

    def close(self) -> None:
        """Give the device's memory back."""
        self._network = None

    def _inputs(self, conversations: Sequence[Sequence[Message]]) -> Any:
        """Tensors of the conversations, padded to one length."""
        model = self._section.model
        try:
            texts = [
                self._texts.rendered([self._message(message) for message in messages], self._template)
                for messages in conversations
            ]
        except TokenizerError as error:
            raise ChatError(
                f"model '{model}': its chat template does not take the messages ({error}). Where it takes no system "
                "message, use a template of yours that holds {prompt}"
            ) from None
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt"}
        # As `apply_chat_template` of the library has it.
        if not self._sees or (self._tokenizer.bos_token and texts[0].startswith(self._tokenizer.bos_token)):
            options["add_special_tokens"] = False
        pictures = [
            [_picture(part) for message in messages for part in message.parts if isinstance(part, Media)]
            for messages in conversations
        ]
        if any(pictures):
            options["images"] = pictures
        try:
            return self._processor(text=texts, **options)
        except Exception as error:
            # A prompt that holds the mark of a picture, for one.
            raise RejectedError(f"model '{model}' does not take the question: {error}") from error

    def _message(self, message: Message) -> dict[str, Any]:
        if not self._sees:
            if any(isinstance(part, Media) for part in message.parts):
                raise RejectedError(f"model '{self._section.model}' takes no pictures")
            return {"role": message.role, "content": "\n\n".join(map(str, message.parts))}
        return {"role": message.role, "content": [_part(part) for part in message.parts]}

    def _reply(self, row: Any, input_tokens: int) -> Reply:
        ends = set(_listed(self._network.generation_config.eos_token_id)) | {self._tokenizer.eos_token_id}
        tokens = row.tolist()
        stop = next((i for i, token in enumerate(tokens) if token in ends), None)
        kept = tokens if stop is None else tokens[:stop]
        try:
            answer = self._texts.decoded(kept)
        except TokenizerError as error:
            raise ChatError(f"model '{self._section.model}': its answer cannot be written as text ({error})") from None
        finish: Finish = "length" if stop is None and len(tokens) >= self._section.max_tokens else "stop"
        return Reply(answer, finish, Usage(input_tokens, len(kept)), {"tokens": kept})


def _part(part: str | Media) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


def _picture(part: Media) -> Any:
    if not part.mime.startswith("image/"):
        raise RejectedError("backend local takes pictures, not videos (media: frames)")
    from PIL import Image

    return Image.open(io.BytesIO(part.data)).convert("RGB")


def _listed(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
