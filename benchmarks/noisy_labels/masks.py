"""Wrong segmentation masks, object by object: grown, shrunk, shifted, or labelled as another class.

An object is a connected part of one class. Each of at least MIN_AREA pixels is hit with probability `rate`, and suffers
one of the four kinds. What it uncovers takes the nearest other label; void (the label to ignore) is never touched.
"""

from __future__ import annotations

import numpy as np

from anl_kernels.cli.common import need

KINDS = ("dilate", "erode", "shift", "swap")
MIN_AREA = 12  # pixels; smaller specks are left alone
REACH = 0.25  # dilation, erosion and shift go up to this share of the object's width (square root of its area)
LONGEST = 8  # and never further than so many pixels


def wrong_masks(masks: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """masks (n, H, W) uint8, labels from num_classes on are void; each with its own noise, seeded."""
    return np.stack([
        wrong_mask(mask, rate, num_classes, np.random.default_rng((seed, index))) for index, mask in enumerate(masks)
    ])  # fmt: skip


def wrong_mask(mask: np.ndarray, rate: float, num_classes: int, random: np.random.Generator) -> np.ndarray:
    """One mask (H, W), its objects in random order."""
    ndimage = need("scipy.ndimage", "noisy")
    objects = []
    for label in np.unique(mask[mask < num_classes]):
        parts, count = ndimage.label(mask == label)
        objects += [(label, parts == index + 1) for index in range(count)]
    noisy = mask.copy()
    for index in random.permutation(len(objects)):
        label, where = objects[index]
        area = int(where.sum())
        if area >= MIN_AREA and random.random() < rate:
            reach = int(np.clip(REACH * area**0.5, 1, LONGEST))
            damage(noisy, where, label, KINDS[random.integers(len(KINDS))], reach, num_classes, random)
    noisy[mask >= num_classes] = mask[mask >= num_classes]
    return noisy


def damage(noisy, where, label, kind: str, reach: int, num_classes: int, random: np.random.Generator) -> None:
    """Changes `noisy` (H, W) in place at the object `where` (H, W) bool of class `label`."""
    ndimage = need("scipy.ndimage", "noisy")
    steps = int(random.integers(1, reach + 1))
    if kind == "swap":
        noisy[where] = (int(label) + int(random.integers(1, num_classes))) % num_classes
    elif kind == "dilate":
        noisy[ndimage.binary_dilation(where, iterations=steps)] = label
    elif kind == "erode":
        uncover(noisy, where, where & ~ndimage.binary_erosion(where, iterations=steps, border_value=1), num_classes)
    else:
        down, right = (steps * int(sign) for sign in random.choice([-1, 1], 2))
        moved = ndimage.shift(where, (down, right), order=0)
        uncover(noisy, where, where & ~moved, num_classes)
        noisy[moved] = label


def uncover(noisy: np.ndarray, where: np.ndarray, bare: np.ndarray, num_classes: int) -> None:
    """Gives the pixels `bare` the nearest label outside the object `where`; nothing, if there is none but void."""
    outside = ~where & (noisy < num_classes)
    if bare.any() and outside.any():
        distance = need("scipy.ndimage", "noisy").distance_transform_edt
        rows, columns = distance(~outside, return_distances=False, return_indices=True)
        noisy[bare] = noisy[rows[bare], columns[bare]]
