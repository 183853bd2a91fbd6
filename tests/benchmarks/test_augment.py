"""Augmentations of images and labels, by hand and by what they must keep."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick

from benchmarks.augment import AUGMENTATIONS, augment

pytestmark = quick.everything

COUNT, SIZE = 400, 16
KEY = jax.random.key(0)


def images(*channels, seed=0):
    values = np.random.default_rng(seed).uniform(0.1, 1, (COUNT, SIZE, SIZE, *channels))
    return jnp.asarray(values, jnp.float32)


LABELS = jax.nn.one_hot(jnp.arange(COUNT) % 10, 10)


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_shapes_and_ranges_are_kept_and_keys_matter(name, channels):
    x = images(*channels)
    run = quick.jit(AUGMENTATIONS[name])
    got, labels = run(KEY, x, LABELS)
    chex.assert_shape(got, x.shape)
    assert got.dtype == x.dtype and jnp.min(got) >= 0 and jnp.max(got) <= 1
    np.testing.assert_allclose(jnp.sum(labels, 1), 1, rtol=1e-5)
    assert jnp.min(labels) >= 0
    other = run(jax.random.key(1), x, LABELS)
    same = jnp.array_equal(other[0], got) and jnp.array_equal(other[1], labels)
    assert same == (name == "smooth")


def test_half_are_mirrored_and_all_are_moved_alike_in_every_direction():
    x = images(3)
    got, labels = AUGMENTATIONS["flip_crop"](KEY, x, LABELS)
    np.testing.assert_array_equal(labels, LABELS)
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)])
    seen = []
    for image, source in zip(np.asarray(got), padded, strict=True):
        found = [
            (flip, i, j)
            for flip in (0, 1)
            for i in range(5)
            for j in range(5)
            if np.array_equal(
                image, (source[:, ::-1] if flip else source)[i : i + 16, j : j + 16]
            )
        ]
        assert len(found) == 1
        seen += found
    assert 150 < sum(flip for flip, _, _ in seen) < 250
    corners = np.array([corner for _, *corner in seen])
    for axis in (0, 1):
        assert np.all(np.bincount(corners[:, axis], minlength=5) > 50)


def test_cutout_blanks_one_square_of_half_the_side():
    x = images(3)
    got, labels = AUGMENTATIONS["cutout"](KEY, x, LABELS)
    np.testing.assert_array_equal(labels, LABELS)
    gone = np.asarray(got != x)
    mean = np.broadcast_to(np.mean(x, (0, 1, 2)), x.shape)
    np.testing.assert_allclose(got[gone], mean[gone], rtol=1e-5)
    areas = []
    for image in gone:
        rows, columns = image.any((1, 2)), image.any((0, 2))
        assert np.array_equal(
            image, (rows[:, None] & columns)[..., None] & np.ones(3, bool)
        )
        for line in (rows, columns):
            assert 4 <= line.sum() <= 8  # the centre is inside, the rest may not be
            assert np.abs(np.diff(line.astype(int))).sum() <= 2
        areas.append(image.mean())
    assert max(areas) == 0.25 and min(areas) < 0.2


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_labels_are_mixed_in_the_shares_of_the_images(name):
    """Every image of one value, its class: the mean pixel tells the shares."""
    x = jnp.tile((jnp.arange(COUNT) % 10 / 10)[:, None, None, None], (1, SIZE, SIZE, 3))
    got, labels = quick.jit(AUGMENTATIONS[name])(KEY, x, LABELS)
    share = labels @ (jnp.arange(10) / 10)
    np.testing.assert_allclose(jnp.mean(got, (1, 2, 3)), share, rtol=1e-4, atol=1e-5)
    own = jnp.sum(labels * LABELS, 1)
    other = own[(jnp.sum(labels > 0, 1) == 2)]
    assert len(other) > 300  # of 400, a tenth or so meet their own class
    assert 0.4 < float(jnp.mean(other)) < 0.7 and jnp.min(other) < 0.15


def test_smoothing_is_optaxs():
    _, labels = AUGMENTATIONS["smooth"](KEY, images(), LABELS)
    np.testing.assert_allclose(labels, optax.smooth_labels(LABELS, 0.1))
    np.testing.assert_allclose(jnp.max(labels, 1), 0.91, rtol=1e-6)


def test_several_are_applied_in_turn_with_keys_of_their_own():
    x = images(3)
    keys = jax.random.split(KEY, 2)
    want = AUGMENTATIONS["cutmix"](keys[0], x, LABELS)
    want = AUGMENTATIONS["smooth"](keys[1], *want)
    got = augment(("cutmix", "smooth"), KEY, x, LABELS)
    chex.assert_trees_all_equal(got, want)
    chex.assert_trees_all_equal(augment((), KEY, x, LABELS), (x, LABELS))
    with pytest.raises(ValueError, match=r"takes images .*, not examples of \(64,\)"):
        augment(("cutout",), KEY, jnp.ones((2, 64)), LABELS[:2])
