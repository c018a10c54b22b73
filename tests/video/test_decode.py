"""Streamed decoding: the pieces are the whole, however the latents are cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lrag_ray.video.decode import StreamingDecoder, to_uint8
from lrag_ray.wan.streams import side_stream
from lrag_ray.wan.vae import WanVae, load_wan_vae, tiny_vae
from tests.pretend_cuda import Stream, pretend_cuda


@pytest.fixture(scope="module")
def tensors(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "vae" / "tiny_vae.safetensors")


@pytest.fixture(scope="module")
def vae(golden: Path) -> WanVae:
    return load_wan_vae(golden / "vae" / "tiny_vae_Wan2.1_VAE.pth", config={"base_dim": 8})


@pytest.mark.parametrize("pieces", [[7], [3, 3, 1], [1] * 7, [2, 4, 1], [5, 2]])
def test_streamed_decode_is_bitwise_the_whole_decode(
    vae: WanVae, tensors: dict[str, Tensor], pieces: list[int]
) -> None:
    decoder = StreamingDecoder(vae)
    streamed = [decoder.push_pixels(piece) for piece in tensors["latent_btchw"][0].split(pieces)]
    assert [len(piece) for piece in streamed] == [4 * pieces[0] - 3] + [4 * n for n in pieces[1:]]
    assert torch.equal(torch.cat(streamed), vae.decode(tensors["latent_btchw"][0]))
    # Recorded on a CPU with other vector units, whose sums differ in the last bits.
    public = tensors["decode_raw"][0].clamp(-1, 1).transpose(0, 1)
    torch.testing.assert_close(torch.cat(streamed), public, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pieces", [[7], [2, 2, 3]])
def test_cold_chunks_reproduce_the_released_decode(vae: WanVae, tensors: dict[str, Tensor], pieces: list[int]) -> None:
    decoder = StreamingDecoder(vae, cold_chunk=3)
    streamed = torch.cat([decoder.push_pixels(piece) for piece in tensors["latent_btchw"][0].split(pieces)])
    assert len(streamed) == 9 + 9 + 1
    torch.testing.assert_close(streamed, tensors["decode_chunk3_btchw"][0], rtol=0, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 2**16))
def test_cut_does_not_matter(cut: list[int], seed: int) -> None:
    vae = tiny_vae()
    latents = torch.randn(sum(cut), 16, 2, 4, generator=torch.Generator().manual_seed(seed))
    decoder = StreamingDecoder(vae)
    streamed = np.concatenate([decoder.push(piece) for piece in latents.split(cut)])
    assert decoder.latent_frames == len(latents)
    assert np.array_equal(streamed, to_uint8(vae.decode(latents)))


def test_two_videos_share_a_vae_without_mixing() -> None:
    vae = tiny_vae()
    one, two = torch.randn(2, 4, 16, 2, 4, generator=torch.Generator().manual_seed(1))
    first, second = StreamingDecoder(vae), StreamingDecoder(vae)
    mixed = [(first.push(one[i : i + 2]), second.push(two[i : i + 2])) for i in (0, 2)]
    assert np.array_equal(np.concatenate([a for a, _ in mixed]), to_uint8(vae.decode(one)))
    assert np.array_equal(np.concatenate([b for _, b in mixed]), to_uint8(vae.decode(two)))


def test_cache_does_not_grow_with_the_video() -> None:
    decoder = StreamingDecoder(tiny_vae())

    def cached_values() -> int:
        return sum(value.numel() for value in decoder._cache.features if isinstance(value, Tensor))

    latents = torch.randn(8, 16, 2, 4)
    decoder.push(latents[:3])
    after_three = cached_values()
    decoder.push(latents[3:])
    assert cached_values() == after_three > 0


def test_pixels_round_to_the_nearest_level() -> None:
    pixels = torch.tensor([-1.0, 0.0, 1.0, 2 * 100.4 / 255 - 1]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(pixels)[0, :, :, 0].tolist() == [[0, 128], [255, 100]]


def test_wrong_use_is_refused() -> None:
    vae = tiny_vae()
    with pytest.raises(ValueError, match="cold_chunk 0"):
        StreamingDecoder(vae, cold_chunk=0)
    with pytest.raises(ValueError, match="no latent frames"):
        StreamingDecoder(vae).push(torch.zeros(0, 16, 2, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_decoding_on_a_gpu_runs_beside_the_next_block() -> None:
    """Bit-equal frames, launched and awaited on a stream of their own; the compute stream waits for none of it."""
    expected = StreamingDecoder(tiny_vae())
    cuda = torch.device("cuda", 0)
    with pretend_cuda() as device:
        vae = tiny_vae()
        vae.model.to(cuda)
        decoder, side = StreamingDecoder(vae), side_stream(cuda, "decode")
        for latents in torch.randn(2, 1, 16, 2, 2, generator=torch.Generator().manual_seed(5)):
            done, launched = dict(device.stream.done), len(device.calls)
            device.waited.clear()
            assert np.array_equal(decoder.push(latents), expected.push(latents))
            assert len(device.calls) > launched and device.stream.done == done
            assert set(device.waited) == {side}
            # In a worker another thread waits for the frames, and the one that generates does not know of them.
            Stream.host.pop(side)  # type: ignore[call-overload]
            torch.ones(3, device=cuda).sum()
        assert not device.stream.done[side]  # type: ignore[index]
        assert StreamingDecoder(vae)._stream is side, "the next video uses the same memory"
    assert device.races == []
