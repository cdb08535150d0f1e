"""Picture sizes: the published nearest-bucket rule and the grid."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frame_memory.plan import BUCKETS, PlanError, check_size, nearest_bucket, nearest_valid

SETTINGS = settings(deadline=None, max_examples=200, derandomize=True)


def published(height, width):
    """The published search: a later bucket wins a tie."""
    best, chosen = float("inf"), None
    for tall, wide in BUCKETS:
        metric = abs(height * wide - width * tall)
        if metric <= best:
            best, chosen = metric, (tall, wide)
    return chosen


def test_buckets_are_seven_shapes_and_their_transposes():
    assert len(set(BUCKETS)) == 14
    assert {(w, h) for h, w in BUCKETS} == set(BUCKETS)
    assert all(side % 16 == 0 for bucket in BUCKETS for side in bucket)


@SETTINGS
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nearest_bucket_is_the_published_one(height, width):
    assert nearest_bucket(height, width) == published(height, width)


def test_a_square_takes_the_later_bucket():
    assert nearest_bucket(1000, 1000) == (640, 608)


@SETTINGS
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([64, 96, 128, 256, 384, 480, 512, 768, 960]))
def test_other_bases_scale_the_bucket_onto_the_grid(height, width, base):
    tall, wide = nearest_bucket(height, width, base)
    full = published(height, width)
    assert (tall, wide) == tuple(round(side * base / 640 / 16) * 16 for side in full)
    check_size(wide, tall)


@pytest.mark.parametrize("wrong", [(0, 10, 640), (10, -1, 640), (10, 10, 0)])
def test_empty_pictures_and_sizes_are_refused(wrong):
    with pytest.raises(PlanError, match="FramePack Image"):
        nearest_bucket(*wrong)


@SETTINGS
@given(st.integers(-50, 4000), st.integers(-50, 4000))
def test_fault_23_off_grid_sizes_show_the_nearest_valid_pair(width, height):
    wide, tall = nearest_valid(width, height)
    for side, near in ((width, wide), (height, tall)):
        assert near % 16 == 0
        assert near >= 16
        assert abs(near - side) <= 8 or near == 16
    check_size(wide, tall)
    if (wide, tall) != (width, height):
        with pytest.raises(PlanError) as caught:
            check_size(width, height)
        message = str(caught.value)
        assert f"{width}x{height}" in message
        assert f"Nearest valid: {wide}x{tall}" in message
        assert "FramePack Image" in message
