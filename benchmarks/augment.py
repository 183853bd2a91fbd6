"""Augmentations of a batch inside of the compiled step, and of its labels.

Each maps a key, images ``(batch, height, width, ...)`` in [0, 1] and one-hot labels
``(batch, classes)`` to images and labels of the same shapes. To add one, add it to
`AUGMENTATIONS`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def flip_and_crop(key: jax.Array, x: jax.Array, y: jax.Array):
    """Mirrors half of the images, and moves each by up to an eighth, over zeros."""
    flip_key, crop_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=x.shape[:1])
    x = jnp.where(_per_image(flip, x), jnp.flip(x, 2), x)
    size = jnp.array(x.shape[1:3])
    pads = [(0, 0), *((n // 8, n // 8) for n in x.shape[1:3])]
    padded = jnp.pad(x, pads + [(0, 0)] * (x.ndim - 3))
    corners = jax.random.randint(crop_key, (len(x), 2), 0, 2 * (size // 8) + 1)

    def crop(image, corner):
        start = (*corner, *(0 for _ in x.shape[3:]))
        return lax.dynamic_slice(image, start, x.shape[1:])

    return jax.vmap(crop)(padded, corners), y


def cutout(key: jax.Array, x: jax.Array, y: jax.Array):
    """Fills a square of half the height, centred anywhere, with the batch's mean.

    `DeVries and Taylor, 2017 <https://arxiv.org/abs/1708.04552>`_, who fill with 0 what
    they have normalized before.
    """
    sides = jnp.full((len(x), 2), x.shape[1] // 2)
    mean = jnp.mean(x, (0, 1, 2))
    return jnp.where(_boxes(key, x, sides), mean, x), y


def mixup(key: jax.Array, x: jax.Array, y: jax.Array):
    """Mixes each image, and its label, with another of the batch.

    `Zhang et al., 2017 <https://arxiv.org/abs/1710.09412>`_, with the uniform shares
    that they take for CIFAR-10.
    """
    share_key, pair_key = jax.random.split(key)
    share = jax.random.uniform(share_key, x.shape[:1])
    other = jax.random.permutation(pair_key, len(x))
    mix = lambda a: _per_image(share, a) * a + (1 - _per_image(share, a)) * a[other]  # noqa: E731
    return mix(x), mix(y)


def cutmix(key: jax.Array, x: jax.Array, y: jax.Array):
    """Fills a box of each image from another, and mixes labels by the box's area.

    `Yun et al., 2019 <https://arxiv.org/abs/1905.04899>`_, in every batch, with areas
    that are uniform but for what the image's edge cuts off.
    """
    area_key, box_key, pair_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, x.shape[:1])
    sides = jnp.sqrt(area)[:, None] * jnp.array(x.shape[1:3])
    inside = _boxes(box_key, x, sides.astype(jnp.int32))
    other = jax.random.permutation(pair_key, len(x))
    share = jnp.mean(inside, axis=range(1, x.ndim))[:, None]
    return jnp.where(inside, x[other], x), (1 - share) * y + share * y[other]


def smooth(key: jax.Array, x: jax.Array, y: jax.Array):
    """Takes a tenth of each label and spreads it over all classes."""
    del key
    return x, optax.smooth_labels(y, 0.1)


AUGMENTATIONS: dict[str, Augmentation] = {
    "flip_crop": flip_and_crop,
    "cutout": cutout,
    "mixup": mixup,
    "cutmix": cutmix,
    "smooth": smooth,
}

MIXING = ("mixup", "cutmix", "smooth")  # after which labels are no longer whole


def augment(
    names: tuple[str, ...], key: jax.Array, x: jax.Array, y: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Several in turn.

    Raises:
      ValueError: Examples are no images.
    """
    if x.ndim < 3:
        raise ValueError(
            f"augment takes images (height, width, ...), not examples of {x.shape[1:]}."
        )
    keys = jax.random.split(key, max(len(names), 1))
    return functools.reduce(
        lambda xy, step: AUGMENTATIONS[step[0]](step[1], *xy),
        zip(names, keys, strict=False),
        (x, y),
    )


def _per_image(values: jax.Array, like: jax.Array) -> jax.Array:
    return values.reshape(-1, *(1 for _ in like.shape[1:]))


def _boxes(key: jax.Array, x: jax.Array, sides: jax.Array) -> jax.Array:
    """Where a box ``sides`` ``(batch, 2)`` is, whose centre is any pixel of an image.

    Returns:
      Booleans of shape ``(batch, height, width, 1, ...)``.
    """
    size = jnp.array(x.shape[1:3])
    start = jax.random.randint(key, (len(x), 2), 0, size) - sides // 2

    def within(axis):
        pixel = jnp.arange(x.shape[1 + axis])
        first, side = start[:, axis, None], sides[:, axis, None]
        return (pixel >= first) & (pixel < first + side)

    box = within(0)[:, :, None] & within(1)[:, None, :]
    return box.reshape(*box.shape, *(1 for _ in x.shape[3:]))
