"""Sizes that pictures are brought to, and which batch shows which pictures."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.training.buckets import Plan, bucket_of, bucket_sizes


def test_sizes_of_512_are_kohyas() -> None:
    """As listed by the rule in its documentation: width 256 to 1024, area at most 512²."""
    wanted = {(512, 512)}
    for width in range(256, 1025, 64):
        height = min(1024, 512 * 512 // width // 64 * 64)
        if height >= 256:
            wanted |= {(width, height), (height, width)}
    assert set(bucket_sizes(512, 64)) == wanted


@given(st.integers(64, 1024), st.sampled_from([8, 32, 64]))
def test_sizes_fit_the_network_and_the_area(resolution: int, step: int) -> None:
    for width, height in bucket_sizes(resolution, step):
        assert width % step == 0
        assert height % step == 0
        assert width * height <= max(resolution, step) ** 2


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((100, 100), (512, 512)), ((3000, 1000), (832, 256)), ((400, 600), (384, 640))],
)
def test_a_picture_goes_where_its_proportions_are(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    found = bucket_of(size, bucket_sizes(512, 64))
    ratio = size[0] / size[1]
    assert abs(found[0] / found[1] - ratio) <= abs(wanted[0] / wanted[1] - ratio) + 1e-9


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=40),
    st.integers(1, 7),
    st.integers(0, 1000),
)
def test_an_epoch_shows_every_picture(kinds: list[str], size: int, seed: int) -> None:
    plan = Plan(kinds, size, seed)
    count = plan.batches_per_epoch
    for epoch in range(2):
        batches = [plan.batch(epoch * count + place) for place in range(count)]
        assert all(len(batch) == size for batch in batches)
        assert all(len({kinds[index] for index in batch}) == 1 for batch in batches)
        seen = Counter(index for batch in batches for index in batch)
        assert set(seen) == set(range(len(kinds)))


def test_batches_follow_from_the_seed_in_any_order() -> None:
    one, other = Plan([0] * 30, 4, 7), Plan([0] * 30, 4, 7)
    numbers = [25, 3, 0, 14, 3]
    forwards = {number: one.batch(number) for number in sorted(numbers)}
    assert [other.batch(number) for number in numbers] == [forwards[n] for n in numbers]
    assert Plan([0] * 30, 4, 8).batch(0) != one.batch(0)
    assert one.batch(0) != one.batch(one.batches_per_epoch), "another epoch, another order"


def test_repeats_show_a_picture_more_often() -> None:
    plan = Plan([0, 0], 1, 0, repeats=[3, 1])
    seen = Counter(plan.batch(number)[0] for number in range(plan.batches_per_epoch))
    assert seen == {0: 3, 1: 1}
