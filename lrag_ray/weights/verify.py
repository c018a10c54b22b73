"""Whether weights are there, unchanged, and fit the model: by size, by digest, and by shapes on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from lrag_ray.config.schema import RunConfig
from lrag_ray.context.weights import Loaded, tensors_of
from lrag_ray.errors import LragError, WeightsError
from lrag_ray.printable import counted
from lrag_ray.text_file import read_text
from lrag_ray.wan.checkpoint import mapped_transformer
from lrag_ray.wan.file_kinds import absence
from lrag_ray.wan.lora import fitting_lora, lora_strength, lora_tensors
from lrag_ray.wan.state_dict import refuse_non_finite
from lrag_ray.wan.text import load_tokenizer, mapped_text_encoder
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import mapped_vae
from lrag_ray.weights.local import file_digest, is_remote, known_sizes, local_copy, record_at, sizes_at
from lrag_ray.weights.loras import local_lora
from lrag_ray.weights.needs import Need, needs_of


class Verdict(NamedTuple):
    """Result for one need."""

    need: Need
    ok: bool
    detail: str
    """What was found, or the problem and its fix."""


def refuse_misfits(config: RunConfig, *kinds: str) -> None:
    """Raise WeightsError with everything that is wrong with the weights on this machine, before an actor meets it.

    With `kinds` only those of these kinds are looked at. Sizes and digests are left to `weights verify` (who gives a
    file of their own a published name may run it), and what is in a bucket to the nodes, which copy it.
    """
    wanted = [need for need in needs_of(config) if need.kind != "prompts" and (not kinds or need.kind in kinds)]
    needs = [need for need in wanted if not is_remote(need.address)]
    wrong = [verdict for verdict in (verify(need, digests=False, sizes=False) for need in needs) if not verdict.ok]
    if wrong:
        message = "\n".join(verdict.detail for verdict in wrong)
        raise WeightsError(f"{message}\nNothing was started; `lrag-ray weights verify CONFIG` checks them again")


def verify(need: Need, *, digests: bool = True, sizes: bool = True) -> Verdict:
    """Check one need: presence, sizes in bytes and shapes; `digests` reads every byte, so values too are looked at."""
    try:
        return Verdict(need, True, _checked(need, digests, sizes))
    except LragError as error:
        return Verdict(need, False, str(error))
    except OSError as error:
        message = f"{need.address} cannot be read: {error.strerror or error}. Fix: let this user read it"
        return Verdict(need, False, message)


def _checked(need: Need, digests: bool, sizes: bool) -> str:
    present = sizes_at(need.address)
    if not present:
        raise WeightsError(missing(need))
    for name, size in known_sizes(need.address, need.published).items() if sizes else ():
        if present.get(name) != size:
            raise WeightsError(
                f"{need.address}: {name} has {present.get(name, 0):,} bytes, expected {size:,}. "
                "Fix: `lrag-ray weights pull CONFIG --again`"
            )
    path = local_copy(need.address)
    digest = _digests(need, path) if digests else ""
    found = [f"{sum(present.values()) / 1e9:.2f} GB", digest, fits(need, path, values=digests)]
    return ", ".join(part for part in found if part)


def missing(need: Need) -> str:
    """What to say of a need that is not there: what to put where."""
    published = need.published
    origin = f"it is published as {published.source}" if published else "it is not published under that name"
    fix = (
        "`lrag-ray weights pull CONFIG`, or put it there yourself" if published else "put it there, or correct the key"
    )
    what = "not there" if is_remote(need.address) else absence(local_copy(need.address))
    there = f"nothing at {need.address}" if what == "not there" else f"{need.address} is {what}"
    return f"{need.keys[0]}: {there}; {origin}. Fix: {fix}"


def _digests(need: Need, path: Path) -> str:
    """Compare digests with those recorded at pull time, else with the published ones."""
    record, published = record_at(need.address), need.published
    if record is not None:
        expected = {name: file.sha256 for name, file in record.files.items()}
        origin = f"recorded at {record.pulled_at}"
    elif published is not None and all(file.sha256 for file in published.files):
        expected = {file.name: str(file.sha256) for file in published.files}
        origin = "published"
    else:
        return f"sha256 {file_digest(path)[:12]}… (none recorded)" if path.is_file() else "no digests recorded"
    for name, digest in expected.items():
        file = path / name if path.is_dir() else path
        if (actual := file_digest(file)) != digest:
            raise WeightsError(
                f"{need.address}: {name} has sha256 {actual}, {origin}: {digest}. It is damaged or another file. "
                "Fix: `lrag-ray weights pull CONFIG --again`"
            )
    return f"sha256 as {origin}"


def fits(need: Need, path: Path, *, values: bool = False) -> str:
    """Load on the meta device: names and shapes are compared, and no tensor is read unless `values` are to be finite.

    Raises WeightsError where they do not fit.
    """
    backbone = need.backbone
    if need.kind == "prompts":
        lines = read_text(path, "the prompt file", WeightsError).removesuffix("\n").count("\n") + 1
        return counted(lines, "line")
    if need.file is not None:
        return _tensors(need, need.file.read(path), values)
    assert backbone is not None, "everything else belongs to a backbone"
    if need.kind == "transformer":
        return _tensors(need, mapped_transformer(path, backbone.transformer, use_ema=backbone.weights.use_ema), values)
    if need.kind == "lora":
        lora = backbone.weights.lora
        assert lora is not None, "the need comes from this key"
        with torch.device("meta"):
            transformer = CausalWanTransformer(backbone.transformer)
        updates = fitting_lora(transformer, local_lora(lora))
        return f"{_tensors(need, lora_tensors(updates), values)} ({lora_strength(updates)})"
    if need.kind == "text_encoder":
        model = mapped_text_encoder(path)
        width = next(model.parameters()).shape[-1]
        if width != backbone.transformer.text_dim:
            raise WeightsError(
                f"text encoder {path} makes features of width {width}, the transformer takes "
                f"{backbone.transformer.text_dim}. Fix: set transformer.text_dim or give another encoder"
            )
        return _tensors(need, model, values)
    if need.kind == "tokenizer":
        tokenize, _ = load_tokenizer(path, backbone.transformer.text_len)
        return f"{counted(len(tokenize('a red fox')), 'token')} for 'a red fox'"
    return _tensors(need, mapped_vae(path), values)


def _tensors(need: Need, found: Loaded, values: bool) -> str:
    tensors = tensors_of(found)
    if values:
        refuse_non_finite(tensors, f"{need.kind.replace('_', ' ')} {need.address}")
    return counted(len(tensors), "tensor fits", "tensors fit")
