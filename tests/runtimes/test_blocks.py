"""Rounding by blocks: what is stored, how far it is off, and that the runtime reads the same."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.runtimes.blocks import round_rows, widen_rows


def make_rows(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(width).standard_normal((count, width)).astype(np.float32)


@pytest.mark.parametrize("width", [64, 100, 20, 256])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_every_number_is_at_most_half_a_step_off(bits: int, width: int) -> None:
    rows = make_rows(7, width)
    blocks = round_rows(rows, bits)
    size = 64 if width >= 64 else 32
    assert blocks.size == size
    assert blocks.numbers.shape == (7, -(-width // size), size * bits // 8)
    assert blocks.scales.dtype == np.float16
    off = np.abs(widen_rows(blocks, width) - rows)
    steps = np.abs(np.repeat(blocks.scales.astype(np.float32), size, axis=1)[:, :width])
    if bits == 8:
        assert (off <= steps * 0.501 + 1e-6).all()
    else:  # the outermost may be cut off, for less error in all
        assert (off <= steps * 0.501).mean() > 0.9
    assert np.isfinite(off).all()


def test_numbers_on_the_grid_come_back() -> None:
    """Whole multiples of one step, the largest at the lowest code: nothing is lost."""
    random = np.random.default_rng(0)
    for bits in (4, 2):
        lowest = -(2 ** (bits - 1))
        whole = random.integers(lowest, -lowest, (5, 128)).astype(np.float32)
        whole[:, ::64] = lowest
        for step in (0.25, -0.25):
            assert np.array_equal(widen_rows(round_rows(whole * step, bits), 128), whole * step)


def test_fewer_bits_are_worse_and_searching_helps() -> None:
    rows = make_rows(50, 256)
    error = {
        bits: float(((widen_rows(round_rows(rows, bits), 256) - rows) ** 2).mean())
        for bits in (8, 4, 2)
    }
    assert error[8] < error[4] / 50
    assert error[4] < error[2] / 5
    blocks = rows.reshape(50, 4, 64)
    places = np.abs(blocks).argmax(-1)[..., None]
    scale = np.take_along_axis(blocks, places, -1) / -8
    plain = np.clip(np.rint(blocks / scale), -8, 7) * scale
    assert error[4] < float(((plain - blocks) ** 2).mean())


def test_scales_that_half_precision_cannot_hold_stay_wide() -> None:
    rows = make_rows(2, 64)
    for factor in (1e-9, 1e9):
        blocks = round_rows(rows * np.float32(factor), 4)
        assert blocks.scales.dtype == np.float32
        assert np.allclose(widen_rows(blocks, 64), rows * factor, atol=0.6 * factor, rtol=0)
    assert not widen_rows(round_rows(np.zeros((2, 64), np.float32), 4), 64).any()
