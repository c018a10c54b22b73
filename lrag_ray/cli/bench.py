"""``lrag-ray bench``: measured speed, one JSON object."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from lrag_ray.cli.output import console, print_json, print_lines, tells_errors
from lrag_ray.errors import UsageError
from lrag_ray.retrieval.bank_types import BANK_TYPES

if TYPE_CHECKING:
    from lrag_ray.scoring.vbench_long.weights import WeightSource

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measured speed: each command prints one JSON object on stdout.\n\n"
    "\b\nExamples:\n  lrag-ray bench scoring --weights random\n  lrag-ray bench runner\n  lrag-ray bench dataset"
    "\n  lrag-ray bench rollout --compare infinity_rope\n  lrag-ray bench decode",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(bench, name="bench")


@bench.command()
@tells_errors
def scoring(
    videos: Annotated[
        list[str] | None,
        typer.Option(
            "--video", metavar="FILE", help="Video to score; may be repeated [default: a made clip, 832x480]."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="DIR",
            help="Folder of the networks, or random for untrained ones [default: the caches of VBench and torch].",
        ),
    ] = None,
    dimensions: Annotated[
        str | None, typer.Option("--dimensions", metavar="A,B", help="Only these dimensions [default: all six].")
    ] = None,
    official: Annotated[
        bool, typer.Option("--official", help="Also do what the official code does, with the same networks and clips.")
    ] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda [default: the GPU, where there is one].")
    ] = None,
    frames: Annotated[
        int | None, typer.Option("--batch-frames", min=1, help="Frames per batch [default: what suits the device].")
    ] = None,
    pairs: Annotated[
        int | None, typer.Option("--batch-pairs", min=1, help="Frame pairs per batch [default: what suits the device].")
    ] = None,
    early_stop: Annotated[bool, typer.Option(help="End dynamic_degree of a clip once its decision is certain.")] = True,
) -> None:
    """Measure VBench-Long: clips per second and dimension, share of decoding; with --official the speed-up.

    \b
    Examples:
      lrag-ray bench scoring --weights random --official
      lrag-ray bench scoring --video out.mp4 --weights weights/vbench --dimensions dynamic_degree,imaging_quality
    """
    import torch

    from lrag_ray.bench.scoring import bench_scoring, make_clip
    from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES
    from lrag_ray.scoring.vbench_long.networks import BatchSizes, Networks

    wanted = [name for name in DIMENSION_NAMES if dimensions is None or name in dimensions.split(",")]
    if dimensions is not None and (unknown := set(dimensions.split(",")) - set(DIMENSION_NAMES)):
        raise UsageError(f"no dimension is called {', '.join(sorted(unknown))}. Fix: of {', '.join(DIMENSION_NAMES)}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    networks = Networks(_networks_from(weights), place, batch=BatchSizes.for_device(place, frames, pairs))
    with TemporaryDirectory() as folder:
        if not videos:
            make_clip(Path(folder) / "made.mp4")
        measured = bench_scoring(
            videos or [Path(folder) / "made.mp4"],
            networks,
            dimensions=wanted,
            official=official,
            early_stop=early_stop,
        )
    print_json(measured.as_dict())


@bench.command()
@tells_errors
def runner(
    items: Annotated[int, typer.Option("--items", min=1, help="Rollouts to pretend.")] = 1000,
    actors: Annotated[int, typer.Option("--actors", min=1, help="Actors to keep busy.")] = 8,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="How long each rollout takes.")] = 1.0,
    address: Annotated[
        str | None, typer.Option("--address", help="Ray address [default: RAY_ADDRESS, else a local cluster].")
    ] = None,
) -> None:
    """Measure how busy the runner keeps its actors: rollouts are sleeps, the pool and Ray are real.

    \b
    Example:
      lrag-ray bench runner --items 1000 --actors 8 --seconds 0.25
    """
    from lrag_ray.bench.runner import bench_runner

    print_json(bench_runner(items=items, actors=actors, seconds=seconds, address=address).as_dict())


@bench.command()
@tells_errors
def retrieval(
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", metavar="FILE", help="Checkpoint of an encoder [default: untrained, of full size]."),
    ] = None,
    history: Annotated[
        list[int] | None,
        typer.Option("--history", min=2, help="Frames searched; may be repeated [default: 120, 480]."),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Frames to retrieve.")] = 6,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Times each is measured; the median counts.")] = 20,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda [default: the GPU, where there is one].")
    ] = None,
) -> None:
    """Measure retrieval per block: encoding, search, and the transfer of what was found.

    \b
    Example:
      lrag-ray bench retrieval --encoder runs/encoder/checkpoints/best.pt --history 480
    """
    import torch

    from lrag_ray.bench.retrieval import bench_retrieval
    from lrag_ray.retrieval.encoder import load_encoder

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_encoder(encoder) if encoder is not None else None
    sizes = model.config if model is not None else None
    latent = (sizes.in_channels, sizes.spatial_h, sizes.spatial_w) if sizes is not None else (16, 60, 104)
    measured = bench_retrieval(
        place, encoder=model, latent=latent, history=history or (120, 480), top_k=top_k, repeats=repeats
    )
    print_json(measured.as_dict())


@bench.command()
@tells_errors
def dataset(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN…", help="Addresses of runs or imported datasets [default: one made for it]."),
    ] = None,
    rollouts: Annotated[int, typer.Option("--rollouts", min=1, help="Size of the made one, 18 MB each.")] = 40,
    window: Annotated[int, typer.Option("--window", min=1, help="Latent frames per window.")] = 8,
    readers: Annotated[int, typer.Option("--readers", min=1, help="Threads that read.")] = 4,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows per pass.")] = 400,
    passes: Annotated[int, typer.Option("--passes", min=1, help="Passes; the median counts.")] = 5,
) -> None:
    """Measure how fast windows of latents are read: per second, against raw reads of the same bytes, cold and warm.

    \b
    Examples:
      lrag-ray bench dataset runs/latents
      lrag-ray bench dataset --rollouts 100 --readers 8
    """
    from lrag_ray.bench.dataset import bench_dataset, make_dataset

    with TemporaryDirectory() as folder:
        uris = runs or [make_dataset(Path(folder), rollouts)]
        found = bench_dataset(uris, window=window, readers=readers, passes=passes, windows=windows)
    print_lines(console(stderr=True), "Left out", found.left_out)
    print_json(found.as_dict())


@bench.command()
@tells_errors
def rollout(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="Backbone, methods and weights of a configuration [default: random]."),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option("--backbone", help="Of CONFIG, else a preset [default: the first; tiny, on a GPU self_forcing]."),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="Method to measure, of CONFIG if one is given.")] = "rag",
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="METHOD", help="Another method, block by block in turn; may be repeated."),
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=1, help="Blocks that are timed.")] = 6,
    depth_s: Annotated[float, typer.Option("--depth-s", min=0, help="Seconds of video before them.")] = 12.0,
    prompts_per_pass: Annotated[
        int, typer.Option("--prompts-per-pass", min=1, max=16, help="Also measure this number of rollouts in one pass.")
    ] = 1,
    products: Annotated[
        str | None, typer.Option("--products", help="Also measure with these matrix products: fp8 or exact.")
    ] = None,
    bank: Annotated[
        list[str] | None,
        typer.Option(
            "--bank", metavar="TYPE", help="Storage type to roll out beside an exact history; may be repeated."
        ),
    ] = None,
    bank_blocks: Annotated[int, typer.Option("--bank-blocks", min=1, help="Blocks of these rollouts.")] = 40,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every block too.")] = True,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda [default: the GPU, where there is one].")
    ] = None,
) -> None:
    """Measure a rollout: ms per part, FPS, MFU, launches, bytes over the bus, peak memory; methods and storage types.

    \b
    Examples:
      lrag-ray bench rollout --compare infinity_rope
      lrag-ray bench rollout --prompts-per-pass 2
      lrag-ray bench rollout --products fp8
      lrag-ray bench rollout --bank int8 --bank int4 --bank-blocks 160
      lrag-ray bench rollout configs/table2.yaml --backbone longlive --method rag --depth-s 120
    """
    import torch

    from lrag_ray.bench.rollout import bench_rollout, random_backbone
    from lrag_ray.config.bank import BankSection
    from lrag_ray.config.histories import tiers_of
    from lrag_ray.config.horizons import LATENT_FRAMES_PER_SECOND
    from lrag_ray.config.load import load_config
    from lrag_ray.config.methods import resolve_method
    from lrag_ray.config.presets import PRESETS
    from lrag_ray.config.schema import MethodConfig
    from lrag_ray.context.registry import registered
    from lrag_ray.wan.kernels import Kernels, Products

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_config(config) if config is not None else None
    if loaded is not None:
        name = _one_of(backbone or next(iter(loaded.backbones)), loaded.backbones, "backbone")
        chosen, known = loaded.backbones[name], loaded.methods
        tiers, kernels = tiers_of(loaded.engine.bank), loaded.engine.kernels
    else:
        name = _one_of(backbone or ("self_forcing" if place.type == "cuda" else "tiny"), PRESETS, "backbone")
        chosen, known = random_backbone(name), {each: MethodConfig(method=each) for each in registered()}
        tiers, kernels = tiers_of(BankSection()), Kernels()
    wanted = [_one_of(each, BANK_TYPES, "storage type") for each in bank or []]
    other = chosen.products if products is None else _one_of(products, get_args(Products), "kind of products")
    names = dict.fromkeys([method, *(compare or [])])
    methods = {each: resolve_method(known[_one_of(each, known, "method")]) for each in names}
    measured = bench_rollout(
        chosen,
        methods,
        place,
        blocks=blocks,
        depth_frames=round(depth_s * LATENT_FRAMES_PER_SECOND),
        banks=[kind for kind in BANK_TYPES if kind in wanted],
        bank_blocks=bank_blocks,
        tiers=tiers,
        kernels=kernels,
        decode=decode,
        prompts_per_pass=prompts_per_pass,
        products=other,  # type: ignore[arg-type]
    )
    print_json(measured.as_dict())


@bench.command()
@tells_errors
def decode(
    config: Annotated[
        Path | None,
        typer.Argument(help="Configuration with the VAE [default: the tiny backbone's, of random weights]."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option("--backbone", metavar="NAME", help="Whose VAE [default: the first one].")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Decode stored latents of this run [default: noise].")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Rollouts of the run.")] = 2,
    seconds: Annotated[float, typer.Option("--seconds", min=0.25, max=600, help="Most of each video.")] = 6.0,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights", metavar="DIR", help="Networks of VBench to score with, or random [default: no scores]."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda [default: the GPU, where there is one].")
    ] = None,
) -> None:
    """Measure the decoder by precision and layout: FPS, and PSNR and VBench differences against float32.

    \b
    Examples:
      lrag-ray bench decode
      lrag-ray bench decode configs/table2.yaml --backbone longlive --run runs/table2 --weights weights/vbench
    """
    from itertools import islice

    import torch

    from lrag_ray.api import open_run
    from lrag_ray.bench.decode import bench_decode
    from lrag_ray.bench.rollout import random_backbone
    from lrag_ray.config.horizons import LATENT_FRAMES_PER_SECOND
    from lrag_ray.config.load import load_config
    from lrag_ray.scoring.vbench_long.networks import Networks
    from lrag_ray.wan.keyed import keyed_generator

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if config is not None:
        loaded = load_config(config)
        chosen = loaded.backbones[_one_of(backbone or next(iter(loaded.backbones)), loaded.backbones, "backbone")]
    else:
        chosen = random_backbone("tiny")
    frames = round(seconds * LATENT_FRAMES_PER_SECOND)
    if run is not None:
        videos = [latents[:frames] for _, latents in islice(open_run(run).latents(backbone=backbone), limit)]
        if not videos:
            raise UsageError(f"--run {run} has no finished latents{f' of {backbone}' if backbone else ''}")
    else:
        shape = (frames, chosen.latent.channels, chosen.latent.height, chosen.latent.width)
        videos = [torch.randn(shape, generator=keyed_generator("bench", "decode"))]
    networks = Networks(_networks_from(weights), place) if weights is not None else None
    print_json({"device": str(place), "variants": bench_decode(chosen, videos, place, networks=networks)})


def _networks_from(weights: str | None) -> WeightSource:
    """A folder, the caches of VBench and torch, or random."""
    from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
    from lrag_ray.scoring.vbench_long.weights import WeightFiles

    return RandomWeights() if weights == "random" else WeightFiles(Path(weights) if weights else None)


def _one_of(name: str, known: Iterable[str], what: str) -> str:
    if name not in known:
        raise UsageError(f"no {what} is called {name}. Fix: of {', '.join(known)}")
    return name
