import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.errors import BadInput
from diptych.evaluation.image_metrics import psnr, retrieval, ssim


def picture(seed, shape=(20, 24, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(st.integers(1, 255))
def test_psnr_of_an_even_difference(step):
    zeros = np.zeros((8, 8, 3), dtype=np.uint8)
    expected = 20 * math.log10(255 / step)
    assert psnr(zeros, zeros + np.uint8(step)) == pytest.approx(expected, abs=1e-9)


def test_psnr_of_equal_pictures_has_no_end():
    assert psnr(picture(0), picture(0)) == math.inf


def test_kinds_of_pictures_mean_the_same():
    ours, theirs = picture(0), picture(1)
    expected = psnr(ours, theirs), ssim(ours, theirs)
    for kind in (
        Image.fromarray,
        lambda array: array / 255.0,
        lambda array: array.astype("f4") / 255,
    ):
        assert psnr(kind(ours), theirs) == pytest.approx(expected[0], rel=1e-5)
        assert ssim(kind(ours), theirs) == pytest.approx(expected[1], rel=1e-5)


def test_ssim_of_two_even_pictures_is_the_luminance_term():
    # No variance anywhere: (2ab + C1) / (a² + b² + C1).
    a, b, c1 = 51 / 255, 204 / 255, 0.01**2
    ours, theirs = np.full((16, 16), 51, np.uint8), np.full((16, 16), 204, np.uint8)
    assert ssim(ours, theirs) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


@settings(deadline=None, max_examples=5)
@given(st.integers(0, 1000))
def test_ssim_is_its_definition_window_by_window(seed):
    ours, theirs = picture(seed, (14, 16)), picture(seed + 1, (14, 16))
    theirs = (0.6 * ours + 0.4 * theirs).astype(np.uint8)
    assert ssim(ours, theirs) == pytest.approx(by_definition(ours / 255, theirs / 255), abs=1e-9)


def by_definition(ours, theirs):
    offsets = range(-5, 6)
    weights = np.array([[math.exp(-(y * y + x * x) / 4.5) for x in offsets] for y in offsets])
    weights /= weights.sum()
    scores = []
    for y in range(5, ours.shape[0] - 5):
        for x in range(5, ours.shape[1] - 5):
            a, b = (each[y - 5 : y + 6, x - 5 : x + 6] for each in (ours, theirs))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a = (weights * (a - mean_a) ** 2).sum()
            variance_b = (weights * (b - mean_b) ** 2).sum()
            both = (weights * (a - mean_a) * (b - mean_b)).sum()
            top = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
            scores.append(top / ((mean_a**2 + mean_b**2 + 1e-4) * (variance_a + variance_b + 9e-4)))
    return np.mean(scores)


def test_ssim_is_one_for_equals_only_and_falls_with_noise():
    ours = picture(3, (32, 32, 3))
    rng = np.random.default_rng(0)
    scores = [
        ssim(np.clip(ours + rng.normal(0, sigma, ours.shape), 0, 255).astype(np.uint8), ours)
        for sigma in (5, 20, 80)
    ]
    assert ssim(ours, ours) == pytest.approx(1.0)
    assert 1 > scores[0] > scores[1] > scores[2]


@pytest.mark.parametrize(
    ("ours", "theirs", "complaint"),
    [
        (picture(0), picture(0, (20, 20, 3)), "cannot be compared"),
        (picture(0, (20,)), picture(0, (20,)), "no picture"),
        (picture(0).astype(int), picture(0), "no known range"),
        (picture(0, (8, 30)), picture(0, (8, 30)), "too small for SSIM"),
    ],
)
def test_what_cannot_be_compared(ours, theirs, complaint):
    with pytest.raises(BadInput, match=complaint):
        ssim(ours, theirs)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 6))
def test_retrieval_is_the_mean_over_every_choice_of_wrong_prompts(seed, among):
    scores = np.random.default_rng(seed).normal(size=(5, 6))
    right = [0, 1, 2, 3, 5]
    wins = [
        scores[row, own] > max(scores[row, other] for other in chosen)
        for row, own in enumerate(right)
        for chosen in combinations(sorted({*range(6)} - {own}), among - 1)
    ]
    found = retrieval(scores, right, among)
    assert found.accuracy == pytest.approx(np.mean(wins))
    assert found.interval[0] <= found.accuracy <= found.interval[1]
    assert (found.among, found.pictures) == (among, 5)


def test_a_blind_scorer_retrieves_one_in_ten():
    scores = np.random.default_rng(0).normal(size=(4000, 30))
    right = np.random.default_rng(1).integers(30, size=4000).tolist()
    assert retrieval(scores, right).accuracy == pytest.approx(0.1, abs=0.02)


def test_fewer_prompts_than_ten_are_all_taken():
    found = retrieval(np.eye(5), range(5))
    assert (found.accuracy, found.among) == (1.0, 5)
    assert "chance 20%" in str(found)


def test_a_scorer_that_cannot_tell_retrieves_nothing():
    assert retrieval(np.zeros((3, 12)), [0, 1, 2]).accuracy == 0.0
