"""Keyed noise depends on what it is for, and on nothing else."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import torch

from lrag_ray.rollout.noise import KeyedNoise, RecordedNoise
from lrag_ray.rollout.normal import quantile, standard_normal

SHAPE = (3, 16, 4, 6)


def test_draws_do_not_depend_on_order_or_global_state() -> None:
    first = KeyedNoise(7, ["a fox"], [0], SHAPE)
    late = first.renoise(5, 2)
    torch.manual_seed(123)
    again = KeyedNoise(7, ["a fox"], [0], SHAPE)
    again.initial(0)
    assert torch.equal(again.renoise(5, 2), late)


def test_every_part_of_the_key_matters() -> None:
    base = KeyedNoise(7, ["a fox"], [0], SHAPE)
    draws = [
        base.initial(0),
        base.initial(1),
        base.renoise(0, 0),
        base.renoise(0, 1),
        KeyedNoise(8, ["a fox"], [0], SHAPE).initial(0),
        KeyedNoise(7, ["a fox."], [0], SHAPE).initial(0),
        KeyedNoise(7, ["a fox"], [1], SHAPE).initial(0),
    ]
    for i, a in enumerate(draws):
        assert abs(float(a.mean())) < 0.2
        assert abs(float(a.std()) - 1) < 0.2
        for b in draws[i + 1 :]:
            assert not torch.equal(a, b)


def test_batch_elements_have_their_own_key() -> None:
    both = KeyedNoise(7, ["a fox", "a street"], [0, 2], SHAPE).initial(4)
    assert torch.equal(both[1], KeyedNoise(7, ["a street"], [2], SHAPE).initial(4)[0])


def test_the_draws_of_runs_begun_earlier_are_pinned() -> None:
    draw = KeyedNoise(0, ["a fox"], [0], (1, 1, 1, 4), version=1).initial(0).flatten()
    assert torch.allclose(draw, torch.tensor([1.2234231, -0.5660157, 0.4951395, 1.2263204]), atol=1e-6), draw.tolist()


def test_the_draws_are_pinned_to_the_bit() -> None:
    """Changing these changes every video: add a version."""
    draws = KeyedNoise(0, ["a fox"], [0], SHAPE).initial(0)
    assert draws.flatten()[:3].tolist() == [1.3443806171417236, -1.1684167385101318, 0.07005436718463898]
    assert hashlib.sha256(draws.numpy().tobytes()).hexdigest()[:16] == "a3144d409b6f0ef1"


def test_the_bits_do_not_depend_on_the_instructions_of_the_cpu() -> None:
    """The same draws in a process whose NumPy uses the baseline of its processor alone."""
    program = (
        "import hashlib; from lrag_ray.rollout.normal import standard_normal;"
        "print(hashlib.sha256(standard_normal(99_999, b'0123456789abcdef').tobytes()).hexdigest())"
    )
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    dispatched = " ".join(found)
    slow = {**os.environ, "NPY_DISABLE_CPU_FEATURES": dispatched}
    done = subprocess.run([sys.executable, "-c", program], env=slow, capture_output=True, text=True, check=True)
    ours = standard_normal(99_999, b"0123456789abcdef")
    assert done.stdout.strip() == hashlib.sha256(ours.tobytes()).hexdigest()


def test_the_transform_is_the_normal_quantile() -> None:
    """To 1e-7 (AS 241, PPND7), over all of the range: centre, both tails, both ends."""
    u = np.concatenate([(np.arange(0, 2**32, 99_991) + 0.5) / 2**32, [0.5 / 2**32, 1 - 0.5 / 2**32, 0.075, 0.925]])
    exact = torch.special.ndtri(torch.from_numpy(u))
    torch.testing.assert_close(torch.from_numpy(quantile(u)), exact, rtol=2e-7, atol=1e-9)


def test_draws_are_those_of_the_documented_generator() -> None:
    """Word by word from Philox: the low half of an output first."""
    words = np.random.Philox(key=int.from_bytes(bytes(range(16)), "big")).random_raw(2)
    halves = [half for word in words.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
    expected = torch.special.ndtri((torch.tensor(halves, dtype=torch.float64) + 0.5) / 2**32).float()
    torch.testing.assert_close(torch.from_numpy(standard_normal(3, bytes(range(16)))), expected[:3])


def test_recorded_noise_is_cut_by_block() -> None:
    noise, renoise = torch.randn(2, 6, 1, 2, 2), torch.randn(2, 1, 2, 3, 1, 2, 2)
    source = RecordedNoise(noise, renoise, 3)
    assert torch.equal(source.initial(1), noise[:, 3:6])
    assert torch.equal(source.renoise(1, 0), renoise[1, 0])
