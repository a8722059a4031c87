"""Patches: where they come from, what is forced, and that a seed decides everything."""

from itertools import islice

import numpy as np
import pytest

from autofed.batches import augmentations, draw_patch, reading_patch, stream
from autofed.case import open_dataset
from autofed.plans import Training
from autofed.prepared import open_store, preprocess
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


def test_pictures_are_cut_from_a_slice(tmp_path):
    plan = small_plan((1, 32, 32), ("R", "G", "B"), labels=1)
    site = make_site(tmp_path / "alpha", cases=2, dimension=2, channels=("R", "G", "B"))
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    store = open_store(tmp_path / "work", "alpha", plan.local)
    draws = islice(iter([[["alpha_000", "alpha_001"]]]), 1)
    ((patches,),) = stream(store, draws, plan.local.training, (1,))
    assert patches.image.shape == (2, 3, 32, 32) and patches.label.shape == (2, 1, 32, 32)
