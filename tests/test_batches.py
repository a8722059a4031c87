"""Patches: where they come from, what is forced, how they are looked at, who makes them; a seed decides everything."""

import gc
import multiprocessing
import os
import random
import signal
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import ClassVar

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from autofed.data import open_dataset
from autofed.errors import ValidationErrors
from autofed.plans import Training
from autofed.preprocessing import ANNOTATED, open_store, preprocess
from autofed.training.batches import (
    IDENTITY,
    PatchLoader,
    SpatialTransform,
    make_step_batches,
    memory_bytes,
    sample_patch,
    sample_transform,
    stream,
)
from autofed.training.batches.intensities import change_intensities, transforms
from autofed.training.batches.spatial_transforms import SPLINE_MARGIN, widest_box
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
    found = [sample_patch(volumes, "alpha_000", chosen, IDENTITY, generator)[1] for _ in range(40)]
    assert all(label.max() == 1 for label in found)
    chosen = training(patch_size=(8, 8, 8), foreground_share=0.0)
    free = [sample_patch(volumes, "alpha_000", chosen, IDENTITY, generator)[1] for _ in range(40)]
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


def test_a_forced_patch_has_its_voxel_in_the_middle():
    shelf = Shelf({1: np.array([[14, 15, 16]])})
    chosen = training(patch_size=(8, 8, 10), foreground_share=1.0)
    image, label = sample_patch(shelf, "patient", chosen, IDENTITY, np.random.default_rng(0))
    assert np.argwhere(label == 1).tolist() == [[4, 4, 5]]
    assert np.array_equal(image[0], shelf.image("case")[0, 10:18, 11:19, 11:21])


def test_a_free_patch_lies_anywhere_inside_the_image():
    shelf = Shelf({1: np.array([[15, 15, 15]])})
    chosen = training(patch_size=(8, 8, 8), foreground_share=0.0)
    generator = np.random.default_rng(0)
    patches = [sample_patch(shelf, "patient", chosen, IDENTITY, generator)[0][0] for _ in range(200)]
    assert all((p > 0).all() for p in patches)
    assert {int(p[0, 0, 0] // 10_000) for p in patches} == set(range(1, 24))


def test_each_patch_tosses_its_own_coin():
    """Forced or not is independent of patch to patch, with the share of the plan."""
    shelf = Shelf({1: np.array([[15, 15, 15]])})
    chosen = training(patch_size=(2, 2, 2), foreground_share=0.33)
    draws = [make_step_batches(shelf, [["patient"] * 2], chosen, (1, step))[0] for step in range(600)]
    forced = np.array([[(one == 1).any() for one in patches.label] for patches in draws])
    assert abs(forced.mean() - 0.33) < 0.05
    assert abs((forced[:, 0] & forced[:, 1]).mean() - 0.33**2) < 0.04


def test_every_class_gets_its_share_of_the_forced_patches():
    shelf = Shelf({1: np.array([[15, 15, 15]]), 2: np.array([[8, 8, 8], [8, 9, 8], [8, 8, 9]])})
    chosen = training(patch_size=(4, 4, 4), foreground_share=1.0)
    generator = np.random.default_rng(0)
    middles = [sample_patch(shelf, "patient", chosen, IDENTITY, generator)[1][2, 2, 2] for _ in range(200)]
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
        found = [sample_patch(shelf, "patient", chosen, IDENTITY, generator)[0][0, 2, 2, 2] for _ in range(40)]
        assert set(map(int, found)) == {10_000 * (z + 1) + 100 * (y + 1) + x + 1 for z, y, x in middles}


def test_an_image_smaller_than_the_patch_lies_in_its_middle(volumes):
    big = training(patch_size=(64, 64, 64), foreground_share=0.0)
    image, label = sample_patch(volumes, "alpha_000", big, IDENTITY, np.random.default_rng(0))
    stored = volumes.image("alpha_000")[:]
    start = [(64 - n) // 2 for n in stored.shape[1:]]
    inside = tuple(slice(s, s + n) for s, n in zip(start, stored.shape[1:], strict=True))
    assert np.array_equal(image[(0, *inside)], stored[0])
    assert np.count_nonzero(image) == np.count_nonzero(stored)
    assert label.shape == (64, 64, 64)


def test_labels_of_any_kind_survive_and_beyond_the_edge_is_background():
    values = (-7, 3, 32_767)
    shelf = Shelf({v: np.argwhere(np.indices((30, 30, 30))[0] // 10 == i) for i, v in enumerate(values)})
    chosen = training(patch_size=(36, 36, 36), mirror_axes=())
    for view in (IDENTITY, SpatialTransform(np.diag([1.2] * 3)), SpatialTransform(rotation(0.3))):
        image, label = sample_patch(shelf, "patient", chosen, view, np.random.default_rng(0))
        assert set(np.unique(label)) == {0, *values} and label.dtype == np.int16
        assert label[0, 0, 0] == 0 and abs(image[0, 0, 0, 0]) < 1  # of up to 300 000


# --- views -----------------------------------------------------------------------------------------------------------


def rotation(angle, axes=(1, 2)):
    matrix = np.eye(3)
    matrix[np.ix_(axes, axes)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


VIEWS = [
    SpatialTransform(rotation(0.4) @ rotation(-0.2, (0, 1))),
    SpatialTransform(rotation(2.5) * [[1], [1.3], [1.3]], (0, 2)),
    SpatialTransform(np.diag([0.8, 0.8, 0.8]), (1,)),
    SpatialTransform(np.diag([1.0, 1.4, 1.4])),
    SpatialTransform(np.eye(3), (0, 1)),
]


@pytest.mark.parametrize("view", VIEWS)
def test_a_voxel_lands_where_the_view_says(view):
    """Beside scipy on the whole image, in which nothing is cut off: labels are equal, splines nearly so."""
    generator, patch = np.random.default_rng(0), (7, 16, 12)
    image = ndimage.gaussian_filter(generator.normal(size=(2, 50, 50, 50)), (0, 1, 1, 1)).astype(np.float32)
    label = np.digitize(image[0], [-0.1, 0.1]).astype(np.int16) * 5
    low, edges = view.box(patch)
    inside = tuple(slice(20 + b, 20 + b + e) for b, e in zip(low, edges, strict=True))
    middle = (np.array(patch) - 1) / 2
    places = np.indices(patch).reshape(3, -1)
    for axis in view.mirrored:
        places[axis] = patch[axis] - 1 - places[axis]
    at = 20 + middle[:, None] + view.matrix @ (places - middle[:, None])

    seen = view.transform_image(image[(slice(None), *inside)], patch)
    expected = [ndimage.map_coordinates(channel.astype(float), at, order=3).reshape(patch) for channel in image]
    assert seen.dtype == np.float32 and np.abs(seen - expected).max() < 1e-3
    shares = [ndimage.map_coordinates((label == k).astype(float), at, order=1).reshape(patch) for k in (0, 5, 10)]
    assert np.array_equal(view.transform_label(label[inside], patch), 5 * np.argmax(shares, axis=0))


@pytest.mark.parametrize("view", VIEWS)
def test_no_more_is_read_than_the_view_needs(view):
    patch = (7, 16, 12)
    corners = view.matrix @ ((np.array(list(np.ndindex(2, 2, 2))) - 0.5) * (np.array(patch) - 1)).T
    low, edges = view.box(patch)
    for axis in range(3):
        most = corners[axis].max() + (patch[axis] - 1) / 2
        beyond = low[axis] + edges[axis] - 1 - most
        if (view.matrix[axis] == np.eye(3)[axis]).all():
            assert (low[axis], edges[axis]) == (0, patch[axis])
        else:
            assert SPLINE_MARGIN <= beyond < SPLINE_MARGIN + 1 and np.isclose(
                low[axis] + low[axis] + edges[axis], patch[axis]
            )


def test_what_is_read_is_the_box(monkeypatch):
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, key):
            read.append([s.stop - s.start for s in key[-3:]])
            return np.asarray(self)[key]

    shelf = Shelf({})
    monkeypatch.setattr(Shelf, "label", lambda self, case: np.zeros(self.shape, np.int16).view(Watched))
    for view, wanted in ((IDENTITY, [8, 8, 8]), (SpatialTransform(np.diag([1, 1.2, 1.2])), [8, 18, 18])):
        sample_patch(shelf, "patient", training(patch_size=(8, 8, 8)), view, middle_of(shelf))
        assert read.pop() == wanted


def middle_of(shelf):
    """A generator whose patches lie in the middle."""

    class Middle:
        def integers(self, most):
            return most // 2

        def random(self):
            return 1.0

    return Middle()


def drawn(count=4000, **changes):
    generator, chosen = np.random.default_rng(0), training(**changes)
    return [sample_transform(chosen, generator) for _ in range(count)]


def angles_and_scales(views, inner=3):
    """Of each view: the angle about all axes together (0: not rotated) and the scale."""
    matrices = np.stack([v.matrix[-inner:, -inner:] for v in views])
    scales = np.linalg.det(matrices) ** (1 / inner)
    cosines = (np.trace(matrices, axis1=1, axis2=2) / scales - (inner - 2)) / 2
    return np.arccos(np.clip(cosines, -1, 1)), scales


@pytest.mark.parametrize(
    ("changes", "widest"),
    [
        ({"patch_size": (64, 64), "mirror_axes": (0,)}, np.pi),
        ({"patch_size": (64, 32), "mirror_axes": (0,)}, np.pi / 12),
        ({"patch_size": (8, 32, 32), "rotate_in_plane_only": True}, np.pi),
    ],
)
def test_flat_views_have_nnunets_chances_and_ranges(changes, widest):
    views = drawn(**changes)
    assert all((v.matrix[0] == [1, 0, 0]).all() and (v.matrix[:, 0] == [1, 0, 0]).all() for v in views)
    angles, scales = angles_and_scales(views, 2)
    rotated, scaled = angles > 1e-6, np.abs(scales - 1) > 1e-6
    assert abs(rotated.mean() - 0.2) < 0.02 and abs(scaled.mean() - 0.2) < 0.02
    assert abs((rotated & scaled).mean() - 0.04) < 0.01
    assert 0.98 * widest < angles.max() <= widest + 1e-6
    assert 0.7 <= scales.min() < 0.71 and 1.39 < scales.max() <= 1.4
    assert abs((scales[scaled] < 1).mean() - 0.5) < 0.05


def test_volumes_tilt_by_up_to_thirty_degrees_about_each_axis():
    matrices = np.stack([v.matrix / np.linalg.det(v.matrix) ** (1 / 3) for v in drawn()])
    rotated = np.abs(matrices - np.eye(3)).max(axis=(1, 2)) > 1e-6
    assert abs(rotated.mean() - 0.2) < 0.02
    assert np.allclose(matrices @ matrices.transpose(0, 2, 1), np.eye(3))
    angles = np.abs(Rotation.from_matrix(matrices[rotated]).as_euler("ZYX", degrees=True))
    assert ((angles.max(axis=0) > 29) & (angles.max(axis=0) <= 30 + 1e-6)).all()


@pytest.mark.parametrize("axes", [(), (0,), (1, 2), (0, 1, 2)])
def test_mirroring_happens_along_the_axes_of_the_plan_and_no_others(axes):
    seen = [v.mirrored for v in drawn(400, mirror_axes=axes)]
    assert set(seen) == set(chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1)))
    assert all(0.4 < np.mean([axis in one for one in seen]) < 0.6 for axis in axes)


def test_mirrored_is_the_straight_patch_backwards():
    shelf = Shelf({1: np.array([[14, 15, 16]])})
    flat = training(patch_size=(8, 10), foreground_share=1.0, mirror_axes=(0, 1))
    straight, mirrored = (
        sample_patch(shelf, "patient", flat, view, np.random.default_rng(0))
        for view in (IDENTITY, SpatialTransform(np.eye(3), (2,)))
    )
    for one, other in zip(straight, mirrored, strict=True):
        assert np.array_equal(one[..., ::-1], other)


@pytest.mark.parametrize("changes", [{}, {"rotate_in_plane_only": True}, {"patch_size": (24, 40), "mirror_axes": ()}])
def test_no_box_is_wider_than_the_memory_that_is_stated(changes):
    chosen = training(**{"patch_size": (12, 20, 16), **changes})
    patch = (1, *chosen.patch_size)[-3:]
    boxes = np.array([v.box(patch)[1] for v in drawn(1000, **{"patch_size": (12, 20, 16), **changes})])
    assert (boxes.max(axis=0) <= widest_box(chosen)).all()
    assert memory_bytes(chosen, 2, 4) > memory_bytes(chosen, 2, "thread") > memory_bytes(chosen, 2, 0) > boxes.max()


# --- intensities -----------------------------------------------------------------------------------------------------


def test_the_intensities_are_nnunets():
    names = [
        "GaussianNoiseTransform", "GaussianBlurTransform", "BrightnessMultiplicativeTransform",
        "ContrastAugmentationTransform", "SimulateLowResolutionTransform", "GammaTransform", "GammaTransform",
    ]  # fmt: skip
    for in_plane in (False, True):
        assert [type(t).__name__ for t in transforms(in_plane)] == names
        assert [t.p_per_sample for t in transforms(in_plane)] == [0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3]
    assert (transforms(False)[4].ignore_axes, transforms(True)[4].ignore_axes) == (None, (0,))


def test_intensities_change_with_their_chance_and_the_seed():
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    done = [change_intensities(image.copy(), training(), seed) for seed in range(300)]
    assert all(np.isfinite(d).all() and d.dtype == np.float32 for d in done)
    # blur and low resolution meet a channel with half a chance
    unchanged = 0.9 * (1 - 0.2 * 0.5) * 0.85 * 0.85 * (1 - 0.25 * 0.5) * 0.9 * 0.7
    assert abs(np.mean([np.array_equal(d, image) for d in done]) - unchanged) < 0.08
    assert np.array_equal(done[5], change_intensities(image.copy(), training(), 5))


# --- who makes them --------------------------------------------------------------------------------------------------

DRAWS = [[["patient", "patient"]], [["patient"], ["patient"]], [], [["patient"]], [["patient"]]]


def taken(workers, draws=DRAWS, seed=(1, 2), shelf=None):
    shelf = shelf or Shelf({1: np.array([[14, 15, 16]]), 2: np.array([[3, 15, 26]])})
    chosen = training(patch_size=(8, 10, 12))
    if isinstance(workers, PatchLoader):
        return list(workers.stream(shelf, iter(draws), chosen, seed))
    return list(stream(shelf, iter(draws), chosen, seed, workers))


def same_patches(once, again):
    return all(
        len(a) == len(b)
        and all(
            np.array_equal(x.image, y.image) and np.array_equal(x.label, y.label) for x, y in zip(a, b, strict=True)
        )
        for a, b in zip(once, again, strict=True)
    )


@pytest.fixture(scope="module")
def pair():
    with PatchLoader(2) as loader:
        yield loader


def test_whoever_makes_them_patches_are_the_same_to_the_bit(pair):
    expected = taken(0)
    assert same_patches(expected, taken("thread")) and same_patches(expected, taken(1))
    assert same_patches(expected, taken(pair)) and same_patches(expected, taken(pair))  # a loader is used again
    assert not same_patches(expected, taken(0, seed=(1, 3)))


def test_processes_read_prepared_data(volumes, pair):
    draws = [[["alpha_000", "alpha_002"]], [["alpha_001"]]]
    assert same_patches(
        pair.stream(volumes, iter(draws), training(), (3,)), stream(volumes, iter(draws), training(), (3,), workers=0)
    )


def test_a_patients_patches_do_not_depend_on_the_others():
    shelf = Shelf({1: np.array([[14, 15, 16]])})
    shelf.patients["other"] = ("case",)
    alone = taken(0, [[["patient"]]], shelf=shelf)[0][0]
    beside = taken(0, [[["other", "patient", "other"]]], shelf=shelf)[0][0]
    assert np.array_equal(alone.image[0], beside.image[1])
    assert not np.array_equal(beside.image[0], beside.image[2])


@pytest.mark.parametrize("workers", [0, "thread"])
def test_the_global_generators_are_left_as_they_were(workers):
    random.seed(1)
    np.random.seed(1)
    taken(workers)
    found = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert found == (random.random(), np.random.random())


@dataclass(frozen=True)
class Broken(Shelf):
    """A store that fails in a way of its own."""

    def label(self, case):
        raise FileNotFoundError(2, "no such label", "label.b2nd")


@dataclass(frozen=True)
class Deadly(Shelf):
    """A store whose process is killed when it reads."""

    def label(self, case):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, "thread", "pair"])
def test_errors_surface_as_they_are(workers, pair):
    workers = pair if workers == "pair" else workers
    with pytest.raises(KeyError, match="nobody"):
        taken(workers, [[["patient"]], [["nobody"]]])
    with pytest.raises(FileNotFoundError, match="no such label") as caught:
        taken(workers, shelf=Broken({}))
    if workers is pair:
        assert "in label" in caught.value.__notes__[0]
    assert same_patches(taken(workers), taken(0))  # and the next training is fed


def test_an_error_that_cannot_cross_is_told_in_words(pair):
    with pytest.raises(RuntimeError, match="Odd: a lock"):
        taken(pair, shelf=Odd({}))


class OddError(Exception):
    """It holds what cannot be pickled."""

    def __init__(self):
        super().__init__("a lock")
        self.held = lambda: None


OddError.__name__ = "Odd"


@dataclass(frozen=True)
class Odd(Shelf):
    def label(self, case):
        raise OddError


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows kills in another way")
def test_a_killed_process_ends_the_stream_with_problems():
    with pytest.raises(ValidationErrors, match=r"killed from outside.*fewer workers"):
        taken(1, shelf=Deadly({}))


def test_processes_end_with_the_iterator():
    before = {p.pid for p in multiprocessing.active_children()}
    endless = iter(lambda: [["patient"]], None)
    feed = stream(Shelf({1: np.array([[14, 15, 16]])}), endless, training(patch_size=(8, 8, 8)), (1,), workers=1)
    next(feed)
    (started,) = [p for p in multiprocessing.active_children() if p.pid not in before]
    del feed
    gc.collect()
    assert not started.is_alive()


def test_no_more_is_drawn_ahead_than_stated():
    asked = []
    draws = (asked.append(1) or [["patient"]] for _ in range(100))
    feed = stream(Shelf({1: np.array([[14, 15, 16]])}), draws, training(patch_size=(8, 8, 8)), (1,))
    for _ in range(4):
        next(feed)
    assert len(asked) == 4 + 2
    feed.close()


@pytest.mark.parametrize("workers", [-1, True, "processes", 1.5])
def test_other_workers_are_refused(workers):
    with pytest.raises(ValidationErrors, match="write 0, 'thread' or a number of processes"):
        PatchLoader(workers)


def test_pictures_are_cut_from_a_slice(tmp_path):
    plan = small_plan((1, 32, 32), ("R", "G", "B"), labels=1)
    site = make_site(tmp_path / "alpha", cases=2, dimension=2, channels=("R", "G", "B"))
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    store = open_store(tmp_path / "work", "alpha", plan.local)
    draws = islice(iter([[["alpha_000", "alpha_001"]]]), 1)
    ((patches,),) = stream(store, draws, plan.local.training, (1,))
    assert patches.image.shape == (2, 3, 32, 32) and patches.label.shape == (2, 1, 32, 32)
