"""Patches: where they come from, what is forced, and that a seed decides everything."""

import random
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import ClassVar

import numpy as np
import pytest

from autofed.batches import augmentations, draw_patch, reading_patch, stream
from autofed.case import open_dataset
from autofed.plans import Training
from autofed.prepared import ANNOTATED, open_store, preprocess
from tests.plans_made import small_plan
from tests.synthetic import make_site


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    root = tmp_path_factory.mktemp("volumes")
    plan = small_plan(labels=1)
    preprocess(open_dataset(make_site(root / "alpha", cases=3)), plan.local, root / "work")
    return open_store(root / "work", "alpha", plan.local)


def training(**changes) -> Training:
    fields = {"patch_size": (16, 16, 16), "batch_size": 2, "steps_per_round": 1, "mirror_axes": (0, 1, 2)}
    return Training(**{**fields, **changes})


def test_a_seed_decides_every_patch(volumes):
    draws = [[["alpha_000", "alpha_001"]], [["alpha_002", "alpha_000"]], [["alpha_001", "alpha_001"]]]
    once = list(stream(volumes, iter(draws), training(), (1, 2)))
    again = list(stream(volumes, iter(draws), training(), (1, 2)))
    other = list(stream(volumes, iter(draws), training(), (1, 3)))
    for a, b in zip(once, again, strict=True):
        assert np.array_equal(a[0].image, b[0].image) and np.array_equal(a[0].label, b[0].label)
    assert not np.array_equal(once[0][0].image, other[0][0].image)


def test_groups_of_a_draw_stay_apart(volumes):
    (groups,) = stream(volumes, iter([[["alpha_000"], ["alpha_001", "alpha_001"]]]), training(), (1,))
    assert [g.image.shape for g in groups] == [(1, 1, 16, 16, 16), (2, 1, 16, 16, 16)]
    assert [g.label.shape for g in groups] == [(1, 1, 16, 16, 16), (2, 1, 16, 16, 16)]


def test_an_empty_draw_gives_no_patches(volumes):
    assert list(stream(volumes, iter([[]]), training(), (1,))) == [[]]


def test_errors_of_the_thread_surface(volumes):
    with pytest.raises(KeyError, match="nobody"):
        list(stream(volumes, iter([[["nobody"]]]), training(), (1,)))


def test_forced_patches_are_centred_on_foreground(volumes):
    """Small patches: with every patch forced, the middle voxel is foreground wherever the image's edge allows it."""
    chosen = training(patch_size=(8, 8, 8), foreground_share=1.0)
    generator = np.random.default_rng(0)
    found = [draw_patch(volumes, "alpha_000", chosen, (8, 8, 8), generator)[1] for _ in range(40)]
    assert all(label.max() == 1 for label in found)
    chosen = training(patch_size=(8, 8, 8), foreground_share=0.0)
    free = [draw_patch(volumes, "alpha_000", chosen, (8, 8, 8), generator)[1] for _ in range(40)]
    assert sum(label.max() == 0 for label in free) > 0


@dataclass(frozen=True)
class Shelf:
    """A store of one case in memory, whose voxels say where they are: 10 000 z + 100 y + x, counted from 1."""

    places: dict[int, np.ndarray]
    shape: tuple[int, int, int] = (30, 30, 30)
    patients: ClassVar = {"patient": ("case",)}

    def image(self, case):
        z, y, x = np.ogrid[tuple(slice(n) for n in self.shape)]
        return (10_000 * (z + 1) + 100 * (y + 1) + x + 1).astype(np.float32)[None]

    def label(self, case):
        found = np.zeros(self.shape, np.int16)
        for value, at in self.places.items():
            found[tuple(at.T)] = value
        return found

    def locations(self, case):
        return self.places


def test_a_forced_patch_has_its_voxel_in_the_middle_also_with_a_margin_around_it():
    shelf = Shelf({1: np.array([[14, 15, 16]])})
    chosen, reading = training(patch_size=(8, 8, 8), foreground_share=1.0), (8, 12, 14)
    image, label = draw_patch(shelf, "patient", chosen, reading, np.random.default_rng(0))
    assert np.argwhere(label == 1).tolist() == [[4, 6, 7]]
    assert np.array_equal(image[0], shelf.image("case")[0, 10:18, 9:21, 9:23])


def test_a_margin_beyond_the_edge_is_empty_and_the_patch_within_is_not():
    shelf = Shelf({1: np.array([[0, 29, 15]])})
    chosen, reading = training(patch_size=(8, 8, 8), foreground_share=1.0), (12, 12, 12)
    image, label = draw_patch(shelf, "patient", chosen, reading, np.random.default_rng(0))
    assert np.argwhere(label == 1).tolist() == [[2, 9, 6]]
    assert (image[0, 2:10, 2:10, 2:10] > 0).all() and (image[0, :2] == 0).all() and (image[0, :, 10:] == 0).all()


def test_a_free_patch_lies_anywhere_inside_the_image_with_its_margin_around_it():
    shelf = Shelf({1: np.array([[15, 15, 15]])})
    chosen = training(patch_size=(8, 8, 8), foreground_share=0.0)
    generator = np.random.default_rng(0)
    patches = [draw_patch(shelf, "patient", chosen, (12, 12, 12), generator)[0][0] for _ in range(200)]
    assert all((p[2:10, 2:10, 2:10] > 0).all() for p in patches)
    assert {int(p[2, 2, 2] // 10_000) for p in patches} == set(range(1, 24))


def test_every_class_gets_its_share_of_the_forced_patches():
    shelf = Shelf({1: np.array([[15, 15, 15]]), 2: np.array([[8, 8, 8], [8, 9, 8], [8, 8, 9]])})
    chosen = training(patch_size=(4, 4, 4), foreground_share=1.0)
    generator = np.random.default_rng(0)
    middles = [draw_patch(shelf, "patient", chosen, (4, 4, 4), generator)[1][2, 2, 2] for _ in range(200)]
    assert set(middles) == {1, 2} and 70 < middles.count(1) < 130


def test_where_voxels_are_ignored_all_patches_are_centred_on_annotated_ones():
    """A forced patch still on a class; and where the case has none, on whatever was annotated."""
    annotated = np.array([[20, 20, 20], [20, 20, 21]])
    generator = np.random.default_rng(0)
    for share, places, middles in (
        (0.0, {1: np.array([[8, 8, 8]]), ANNOTATED: annotated}, {(20, 20, 20), (20, 20, 21)}),
        (1.0, {1: np.array([[8, 8, 8]]), ANNOTATED: annotated}, {(8, 8, 8)}),
        (1.0, {ANNOTATED: annotated}, {(20, 20, 20), (20, 20, 21)}),
    ):
        chosen, shelf = training(patch_size=(4, 4, 4), foreground_share=share), Shelf(places)
        found = [draw_patch(shelf, "patient", chosen, (4, 4, 4), generator)[0][0, 2, 2, 2] for _ in range(40)]
        assert set(map(int, found)) == {10_000 * (z + 1) + 100 * (y + 1) + x + 1 for z, y, x in middles}


def test_an_image_smaller_than_the_patch_lies_in_its_middle(volumes):
    big = training(patch_size=(64, 64, 64), foreground_share=0.0)
    image, label = draw_patch(volumes, "alpha_000", big, (64, 64, 64), np.random.default_rng(0))
    stored = volumes.image("alpha_000")[:]
    start = [(64 - n) // 2 for n in stored.shape[1:]]
    inside = tuple(slice(s, s + n) for s, n in zip(start, stored.shape[1:], strict=True))
    assert np.array_equal(image[(0, *inside)], stored[0])
    assert np.count_nonzero(image) == np.count_nonzero(stored)
    assert label.shape == (64, 64, 64)


@pytest.mark.parametrize("in_plane", [False, True])
def test_augmented_volumes_keep_shape_and_labels(in_plane):
    chosen = training(patch_size=(8, 32, 32), rotate_in_plane_only=in_plane)
    reading = reading_patch(chosen)
    assert all(r >= p for r, p in zip(reading, chosen.patch_size, strict=True))
    assert reading[0] == 8 or not in_plane
    transform = augmentations(chosen)
    generator = np.random.default_rng(0)
    for seed in range(8):
        np.random.seed(seed)
        label = generator.integers(0, 3, (2, 1, *reading)).astype(np.float32)
        done = transform(data=generator.normal(size=(2, 1, *reading)).astype(np.float32), seg=label)
        assert done["data"].shape == done["seg"].shape == (2, 1, 8, 32, 32)
        assert set(np.unique(done["seg"])) <= {0.0, 1.0, 2.0}
        assert np.isfinite(done["data"]).all()


NAMES = [
    "SpatialTransform", "GaussianNoiseTransform", "GaussianBlurTransform", "BrightnessMultiplicativeTransform",
    "ContrastAugmentationTransform", "SimulateLowResolutionTransform", "GammaTransform", "GammaTransform",
]  # fmt: skip


def test_the_augmentations_are_nnunets():
    found = augmentations(training())
    assert [type(t).__name__ for t in found.transforms] == [*NAMES, "MirrorTransform"]
    chances = [t.p_per_sample for t in found.transforms[1:-1]]
    assert chances == [0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3]
    assert [type(t).__name__ for t in augmentations(training(mirror_axes=())).transforms] == NAMES


def augmented(chosen, count=60):
    """Pairs of (before, after) as (image, label), before cut to the patch; labels tell every voxel from the others."""
    transform, edges = augmentations(chosen), chosen.patch_size
    image = np.random.default_rng(0).normal(size=(1, 1, *edges)).astype(np.float32)
    label = np.arange(np.prod(edges), dtype=np.float32).reshape(1, 1, *edges)
    for seed in range(count):
        random.seed(seed)
        np.random.seed(seed)
        done = transform(data=image.copy(), seg=label.copy())
        yield (image, label), (done["data"], done["seg"])


def test_intensities_change_also_where_nothing_turns():
    unturned = [
        (before[0], after[0])
        for before, after in augmented(training(patch_size=(8, 8, 8), mirror_axes=()))
        if np.array_equal(before[1], after[1])
    ]
    changed = [not np.array_equal(before, after) for before, after in unturned]
    assert len(unturned) > 20 and 0.5 < np.mean(changed) < 1


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
def test_mirroring_happens_along_the_axes_of_the_plan_and_no_others(axes):
    seen = set()
    for (_, before), (_, after) in augmented(training(patch_size=(6, 6, 6), mirror_axes=axes), 100):
        for flipped in chain.from_iterable(combinations(range(3), n) for n in range(4)):
            if np.array_equal(np.flip(before, [a + 2 for a in flipped]), after):
                seen.add(flipped)
    assert seen == set(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))


def test_pictures_are_cut_from_a_slice(tmp_path):
    plan = small_plan((1, 32, 32), ("R", "G", "B"), labels=1)
    site = make_site(tmp_path / "alpha", cases=2, dimension=2, channels=("R", "G", "B"))
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    store = open_store(tmp_path / "work", "alpha", plan.local)
    draws = islice(iter([[["alpha_000", "alpha_001"]]]), 1)
    ((patches,),) = stream(store, draws, plan.local.training, (1,))
    assert patches.image.shape == (2, 3, 32, 32) and patches.label.shape == (2, 1, 32, 32)
