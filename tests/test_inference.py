"""Sliding windows, mirrored views and ensembles, with networks whose answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from autofed.data import Case, open_dataset
from autofed.data.images import Geometry
from autofed.data.labels import Labels
from autofed.errors import ValidationErrors
from autofed.inference.predictor import Member, Predictor, _structures, mirrored_probabilities
from autofed.preprocessing import open_store, preprocess, preprocess_case
from autofed.privacy.none import NoPrivacy
from autofed.training.fit import Schedule, fit
from autofed.training.network import build, weights_of
from tests.plans_made import small_plan
from tests.synthetic import make_site
from tests.test_fit import poly

PLAN = small_plan(labels=1, **{"training.mirror_axes": [0, 1, 2]})


class Threshold(torch.nn.Module):
    """Says that what is brighter than zero is foreground: an answer that knows no borders of windows."""

    def forward(self, image):
        return torch.cat([-image, image], dim=1)


class LeftHalf(torch.nn.Module):
    """Says that the left half of whatever it sees is foreground: mirrored views must contradict it."""

    def forward(self, image):
        logits = torch.zeros(image.shape[0], 2, *image.shape[2:])
        logits[:, 1, ..., : image.shape[-1] // 2] = 9
        return logits


def case(shape=(20, 24, 28), channels=1, spacing_mm=(1.0, 1.0, 1.0), seed=0):
    image = np.random.default_rng(seed).normal(size=(channels, *shape)).astype(np.float32)
    return Case("c", "c", image, None, spacing_mm, Geometry(3, spacing_mm, (0.0,) * 3, tuple(np.eye(3).ravel())))


def members(count=2, plan=PLAN):
    return [Member(f"m{i}", plan, lambda i=i: weights_of(build(plan.local.network, seed=i))) for i in range(count)]


def test_windows_and_mirrored_views_give_back_a_voxelwise_answer():
    image = case((20, 24, 28)).image
    found = list(mirrored_probabilities(Threshold(), image, PLAN, (0, 1, 2), "cpu"))
    assert len(found) == 8
    expected = torch.softmax(torch.from_numpy(np.concatenate([-image, image])), 0)
    assert all(torch.allclose(view, expected, atol=1e-4) for view in found)


class FirstVoxel(torch.nn.Module):
    """Says of all that it sees what stands in its first voxel: the answer tells which window it comes from."""

    def forward(self, image):
        logits = torch.zeros(image.shape[0], 2, *image.shape[2:])
        logits[:, 1] += image[:, 0, :1, :1, :1]
        return logits


def test_windows_count_by_a_bell_around_their_middle():
    """Two windows of 16 overlap by 8: a Gaussian of an eighth of the window, as in nnU-Net, says who counts."""
    image = np.zeros((1, 16, 16, 24), np.float32)
    image[..., 8:] = 1
    (found,) = mirrored_probabilities(FirstVoxel(), image, PLAN, (), "cpu")
    bell = np.exp(-0.5 * ((np.arange(16) - 7.5) / (16 / 8)) ** 2)
    first, second = bell[8:], bell[:8]
    share = torch.logit(found[1]).numpy()[8, 8]
    expected = np.concatenate([np.zeros(8), second / (first + second), np.ones(8)])
    assert np.allclose(share, expected, atol=0.01)
    assert share[8] < 0.01 and share[15] > 0.99


def test_an_image_smaller_than_the_patch():
    image = case((5, 9, 30)).image
    (found,) = mirrored_probabilities(Threshold(), image, PLAN, (), "cpu")
    assert found.shape == (2, 5, 9, 30)
    assert torch.equal(found.argmax(0), torch.from_numpy((image[0] > 0).astype(np.int64)))


def test_a_mirrored_view_is_turned_back():
    image = np.zeros((1, 16, 16, 16), np.float32)
    straight, mirrored = mirrored_probabilities(LeftHalf(), image, PLAN, (2,), "cpu")
    assert straight[1, ..., :8].min() > 0.9 and mirrored[1, ..., 8:].min() > 0.9
    assert straight[1, ..., 8:].max() < 0.6 and mirrored[1, ..., :8].max() < 0.6


@pytest.mark.parametrize("at_once", [3, 8])
def test_views_that_pass_together_are_those_that_pass_alone(at_once):
    network, image = build(PLAN.local.network, seed=2).eval(), np.random.default_rng(0).normal(size=(1, 20, 24, 28))
    alone, together = (
        list(mirrored_probabilities(network, image.astype(np.float32), PLAN, (0, 1, 2), "cpu", at_once=n))
        for n in (1, at_once)
    )
    assert len(together) == 8
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_pictures_are_predicted_slice_by_slice():
    plan = small_plan((1, 32, 32), ("R", "G", "B"), labels=1)
    image = np.random.default_rng(0).normal(size=(3, 1, 40, 50)).astype(np.float32)

    class First(torch.nn.Module):
        def forward(self, x):
            return torch.cat([-x[:, :1], x[:, :1]], 1)

    found = list(mirrored_probabilities(First(), image, plan, (0, 1), "cpu"))
    assert len(found) == 4 and found[0].shape == (2, 1, 40, 50)
    assert all(torch.equal(v.argmax(0), torch.from_numpy((image[0] > 0).astype(np.int64))) for v in found)


def test_members_are_weights_times_views():
    with_views = Predictor(members(3)).predict(case())
    without = Predictor(members(3), mirroring=False).predict(case())
    assert with_views.members == 24 and without.members == 3


def test_one_member_has_no_mutual_information_and_more_members_have_some():
    one = Predictor(members(1), mirroring=False).predict(case())
    three = Predictor(members(3), mirroring=False).predict(case())
    assert one.mutual_information.max() < 1e-6
    assert three.mutual_information.mean() > 1e-4
    assert (three.mutual_information <= three.entropy + 1e-6).all()


def test_what_comes_back_lies_on_the_scans_own_grid():
    scan = case((12, 30, 26), spacing_mm=(2.5, 0.8, 0.9))
    found = Predictor(members(2)).predict(scan, probabilities=True)
    for array in (found.labels, found.entropy, found.mutual_information):
        assert array.shape == (12, 30, 26)
    assert found.probabilities.shape == (2, 12, 30, 26)
    assert (found.probabilities.argmax(0) != found.labels).mean() < 0.01  # ties in float16
    structure = found.structures["structure_1"]
    assert structure.size == pytest.approx((found.labels == 1).sum() * 2.5 * 0.8 * 0.9 / 1000, abs=1e-5)
    assert structure.smallest <= structure.largest and structure.measure == "volume_ml"


@pytest.mark.parametrize(
    ("voxels", "together", "counts", "expected"),
    [
        (90, 10, (8, 10, 15), (72, 135)),  # by what became of the ensemble's own 10 voxels
        (0, 10, (8, 15), (64, 120)),  # lost on the way back: by the volumes of the voxels, 8 to 1
        (0, 0, (0, 3), (0, 24)),
        (5, 0, (1, 3), (8, 24)),
    ],
)
def test_the_range_of_sizes_stands_on_the_scale_of_the_size(voxels, together, counts, expected):
    ready = preprocess_case(case((8, 8, 8)), PLAN.local.geometry, PLAN.local.intensity)
    way = ready.inverse.model_copy(update={"grid": (4, 4, 4)})
    found = np.zeros((8, 8, 8), np.uint8)
    found.flat[:voxels] = 1
    sizes = [np.array([64 - c, c]) for c in counts]
    (structure,) = _structures(
        found, np.array([64 - together, together]), sizes, Labels.declared({"background": 0, "organ": 1}), way
    ).values()
    assert (structure.smallest * 1000, structure.largest * 1000) == pytest.approx(expected)
    assert structure.size * 1000 == pytest.approx(voxels)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three snapshots of one short training on bright blobs, and a scan that no site has seen."""
    root = tmp_path_factory.mktemp("trained")
    plan = small_plan(labels=1, **{"network.features": [8, 16, 16], "learning_rate": 0.05})
    preprocess(open_dataset(make_site(root / "alpha", cases=4)), plan.local, root / "work")
    store, mechanism = open_store(root / "work", "alpha", plan.local), NoPrivacy(2)
    weights, snapshots = weights_of(build(plan.local.network, seed=1)), []
    for steps, begun, share in ((32, 0, 0.8), (4, 0.8, 0.1), (4, 0.9, 0.1)):
        schedule = Schedule(steps, poly(begun, share), (1, len(snapshots)))
        weights = fit(weights, store, plan.local, mechanism, schedule).weights
        snapshots.append(weights)
    ensemble = [Member(f"snapshot {i}", plan, lambda w=w: w) for i, w in enumerate(snapshots)]
    return Predictor(ensemble, mirroring=False), open_dataset(make_site(root / "bravo", cases=1, seed=5)).read(
        "bravo_000"
    )


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.0, 0.7, 0.7), (0.6, 1.3, 1.3)])
def test_a_single_member_has_the_size_of_the_ensemble(trained, spacing_mm):
    """The sizes of the range are counted on the plan's grid, but stand on the scale of the scan."""
    predictor, scan = trained
    alone = Predictor(predictor.members[:1], mirroring=False)
    (structure,) = alone.predict(replace(scan, spacing_mm=spacing_mm)).structures.values()
    assert structure.voxels > 0
    assert structure.size == structure.smallest == structure.largest


def test_uncertainty_rises_on_a_spoilt_scan(trained):
    """A block in the middle has its contrast turned round. Noise in each voxel is no test: the network averages it."""
    predictor, scan = trained
    image = scan.image.copy()
    middle = (slice(None), *(slice(n // 4, n - n // 4) for n in image.shape[1:]))
    image[middle] = image.max() + image.min() - image[middle]
    clean, spoilt = predictor.predict(scan), predictor.predict(replace(scan, image=image))
    found, truth = clean.labels > 0, scan.label > 0
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8, "the network has not learned its task"
    assert spoilt.entropy.mean() > 1.5 * clean.entropy.mean()
    assert spoilt.mutual_information.mean() > 1.2 * clean.mutual_information.mean()


def test_uncertainty_is_higher_where_a_trained_like_answer_is_torn():
    """A voxel at the decision border is more uncertain than one far from it."""
    image = np.zeros((1, 16, 16, 16), np.float32)
    image[..., 8:] = 6
    (probabilities,) = mirrored_probabilities(Threshold(), image, PLAN, (), "cpu")
    entropies = torch.special.entr(probabilities).sum(0)
    assert entropies[..., :7].mean() > 100 * entropies[..., 9:].mean()


@pytest.mark.parametrize(
    ("scan", "says"),
    [
        (case(channels=2), "2 channels, the model takes 1"),
        (case((1, 24, 28)), "1 slices, the model is 3D"),
    ],
)
def test_scans_of_another_kind_are_refused(scan, says):
    with pytest.raises(ValidationErrors, match=says):
        Predictor(members(1)).predict(scan)


def test_a_scan_with_nan_is_refused():
    scan = case()
    scan.image[0, 0, 0, 0] = np.nan
    with pytest.raises(ValidationErrors, match="NaN"):
        Predictor(members(1)).predict(scan)


def test_members_that_do_not_belong_together_are_refused():
    other = small_plan(labels=2)
    with pytest.raises(ValidationErrors, match="differ in labels"):
        Predictor([*members(1), *members(1, other)])
    coarse = PLAN.change({"geometry.spacing_mm": [2, 2, 2]})
    with pytest.raises(ValidationErrors, match="different grids"):
        Predictor([*members(1), *members(1, coarse)])
    with pytest.raises(ValidationErrors, match="no weights"):
        Predictor([])


NESTED = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


class Steps(torch.nn.Module):
    """Says that brighter than 0 is the whole, and brighter than 1 its core."""

    def forward(self, image):
        return torch.cat([image, image - 1], dim=1) * 20


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (2.0, 0.7, 0.7)])
def test_regions_are_painted_in_their_order_and_measured_whole(monkeypatch, spacing_mm):
    scan = case((20, 24, 28), spacing_mm=spacing_mm)
    scan.image[:] = -1
    scan.image[..., 6:18, 6:18] = 0.5
    scan.image[..., 10:14, 10:14] = 5
    plan = small_plan(channels=("nonorm",), labels=NESTED, order=(1, 2))
    predictor = Predictor(members(1, plan), mirroring=False)
    monkeypatch.setattr("autofed.inference.predictor.load_weights", lambda *_: None)
    predictor._network = lambda plan: Steps()
    found = predictor.predict(scan, probabilities=True)
    whole, core = found.structures["whole"], found.structures["core"]
    assert set(np.unique(found.labels)) == {0, 1, 2}
    assert core.voxels == (found.labels == 2).sum() and whole.voxels == (found.labels > 0).sum()
    assert whole.smallest == whole.size == whole.largest > core.size == core.largest > 0
    if spacing_mm == (1.0, 1.0, 1.0):
        assert np.array_equal(found.labels, np.digitize(scan.image[0], [0, 1]))
    assert found.probabilities.shape == (2, 20, 24, 28) and found.probabilities[:, 0, 0, 0].max() < 0.01
    assert found.entropy.max() <= 1
