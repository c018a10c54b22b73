"""Golden text encoder: features of fixed token ids."""

from __future__ import annotations

from functools import partial

import torch

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import Folder, Vectors
from lrag_ray.wan.text import TextEncoder, UMT5Sizes, pad_text, umt5_from_state_dict

FEATURES = Bound(absolute=1e-5)


def cases(folder: Folder) -> list[GoldenCase]:
    """A case per safetensors file with ids and an encoder's weights; its sizes are those of the weights."""
    return [
        GoldenCase(file.path.stem, partial(_check, file))
        for file in folder.vectors
        if file.has("ids", "mask", "weights.token_embedding.weight")
    ]


def _check(vectors: Vectors, sheet: Sheet) -> None:
    weights = vectors.group("weights.")
    model = umt5_from_state_dict(weights, UMT5Sizes.of(weights), vectors.path.name)

    def no_tokenizer(text: str) -> list[int]:
        raise NotImplementedError("golden ids need no tokenizer")

    encoder = TextEncoder(model, no_tokenizer, "golden")
    ids, mask = vectors["ids"], vectors["mask"].bool()
    rows = [encoder.encode_ids(tokens[valid].tolist()) for tokens, valid in zip(ids, mask, strict=True)]
    if "output_padding_zeroed" in vectors:
        ours = torch.stack([pad_text(features, ids.shape[1]) for features in rows])
        sheet.close("output_padding_zeroed", ours, vectors["output_padding_zeroed"], FEATURES)
    if "output_raw" in vectors:
        # The padding of the raw output never reaches the generator.
        sheet.close("output_raw, valid rows", torch.cat(rows), vectors["output_raw"][mask], FEATURES)
