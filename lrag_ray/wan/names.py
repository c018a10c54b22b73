"""Names of Wan's tensors and layers, as training frameworks, ComfyUI, PEFT and Diffusers spell them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lrag_ray.wan.state_dict import unwrapped

_LEADING = re.compile(r"(?:(?:generator|diffusion_model|transformer|base_model|model|pipe|dit)\.)+")
_DIFFUSERS_BLOCK = {
    **{
        f"{theirs}.{their_layer}": f"{ours}.{our_layer}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for their_layer, our_layer in (
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "o"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    # Diffusers numbers the norms in the order of their use; the one with weights stands before cross-attention.
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
_DIFFUSERS_OUTSIDE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_UNDERSCORED_BLOCK, _UNDERSCORED_OUTSIDE = (
    {layer.replace(".", "_"): ours for theirs, ours in names.items() for layer in (theirs, ours)}
    for names in (_DIFFUSERS_BLOCK, _DIFFUSERS_OUTSIDE)
)


def bare_name(name: str) -> str:
    """A tensor's name without what training, ComfyUI and PEFT put in front of it or around its modules."""
    name = unwrapped(name)
    leading = _LEADING.match(name)
    return name[leading.end() :] if leading else name


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether bare names are those of Diffusers' WanTransformer3DModel."""
    return any(name.startswith("condition_embedder.") or re.match(r"blocks\.\d+\.attn[12]\.", name) for name in names)


def wan_name(name: str) -> str:
    """Wan's name of a tensor or layer of Diffusers' WanTransformer3DModel; any other name is returned as it is."""
    block = re.match(r"blocks\.\d+\.", name)
    prefix, table = (block[0], _DIFFUSERS_BLOCK) if block else ("", _DIFFUSERS_OUTSIDE)
    rest = name.removeprefix(prefix)
    for theirs, ours in table.items():
        if rest == theirs or rest.startswith(f"{theirs}."):
            return f"{prefix}{ours}{rest.removeprefix(theirs)}"
    return name


def from_underscores(name: str) -> str | None:
    """Wan's name of a layer in kohya's spelling (``blocks_0_self_attn_q``); None for an unknown one."""
    name = re.sub(r"^(?:(?:diffusion_model|transformer|model)_)+", "", name)
    if block := re.fullmatch(r"blocks_(\d+)_(.+)", name):
        layer = _UNDERSCORED_BLOCK.get(block[2])
        return layer and f"blocks.{block[1]}.{layer}"
    return _UNDERSCORED_OUTSIDE.get(name)
