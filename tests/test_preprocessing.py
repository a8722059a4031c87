"""Onto the grid and exactly back; a store that is whole, complete and never stale."""

import shutil
import subprocess
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from autofed import preprocessing
from autofed.data import Case, open_dataset
from autofed.data.images import Geometry as FileGeometry
from autofed.errors import ValidationErrors
from autofed.files import read_json
from autofed.fingerprints import measure, merge
from autofed.planner import make
from autofed.plans import Budget, Channel, Intensity, TargetGrid
from autofed.preprocessing import (
    InverseTransform,
    normalise,
    open_store,
    pool_stores,
    preprocess,
    preprocess_case,
    preprocessed_sites,
    resample,
    resample_labels,
    resampling,
    restore,
    restore_labels,
    restore_regions,
    store,
)
from autofed.training.batches import IDENTITY, sample_patch
from tests.plans_made import SPEED, small_plan
from tests.synthetic import blobs, make_site

RAW = Intensity(channels=(Channel(scheme="nonorm"),))


def grid(spacing_mm=(1.0, 1.0, 1.0), transpose=(0, 1, 2), configuration="3d_fullres"):
    return TargetGrid(configuration=configuration, transpose=transpose, spacing_mm=spacing_mm, median_shape=(8, 8, 8))


def case(image, label=None, spacing_mm=(1.0, 1.0, 1.0)):
    return Case("c", "c", image, label, spacing_mm, FileGeometry(3, spacing_mm, (0.0,) * 3))


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(3, 12)] * 3),
    st.permutations(range(3)),
    st.tuples(*[st.integers(0, 2)] * 3),
    st.integers(0, 1000),
)
def test_without_resampling_the_way_back_is_exact(shape, order, margin, seed):
    generator = np.random.default_rng(seed)
    image = np.zeros((1, *shape), np.float32)
    inner = tuple(slice(min(m, n // 3), n) for m, n in zip(margin, shape, strict=True))
    image[(0, *inner)] = generator.uniform(1, 2, image[(0, *inner)].shape)
    label = np.where(image[0] > 0, generator.integers(0, 3, shape), 0).astype(np.int32)
    ready = preprocess_case(case(image, label), grid(transpose=tuple(order)), RAW)
    assert np.array_equal(restore(ready.image[0], ready.inverse), image[0])
    one_hot = np.stack([ready.label == k for k in range(3)]).astype(np.float32)
    assert np.array_equal(restore_labels(one_hot, ready.inverse), label)


def test_resampled_labels_come_back_almost_whole():
    generator = np.random.default_rng(0)
    label = blobs((24, 40, 40), 3, generator)
    image = (label + generator.normal(1, 0.1, label.shape)).astype(np.float32)[None]
    ready = preprocess_case(case(image, label, (2.0, 1.0, 1.0)), grid((1.5, 1.3, 0.8)), RAW)
    assert ready.image.shape[1:] == (32, 31, 50)
    back = restore_labels(np.stack([ready.label == k for k in range(3)]).astype(np.float32), ready.inverse)
    assert back.shape == label.shape
    for value in (1, 2):
        overlap = 2 * ((back == value) & (label == value)).sum() / ((back == value).sum() + (label == value).sum())
        assert overlap > 0.93


def test_what_was_cropped_comes_back_as_background():
    image = np.zeros((1, 9, 9, 9), np.float32)
    image[0, 3:6, 3:6, 3:6] = 5
    ready = preprocess_case(case(image), grid(), RAW)
    assert ready.image.shape == (1, 3, 3, 3)
    certain = np.stack([np.zeros((3, 3, 3)), np.ones((3, 3, 3))]).astype(np.float32)
    found = restore_labels(certain, ready.inverse)
    assert found.sum() == 27 and found[4, 4, 4] == 1


def test_resampling_knows_no_overshoot_and_keeps_a_ramp():
    step = np.zeros((4, 4, 16), np.float32)
    step[..., 8:] = 1
    finer = resample(step, (4, 4, 40), order=3, coarse_axis=None)
    assert finer.min() >= 0 and finer.max() <= 1
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32), (4, 4, 16))
    middle = resample(ramp, (4, 4, 32), order=1, coarse_axis=None)[0, 0, 4:-4]
    assert np.allclose(np.diff(middle), 0.5, atol=1e-5)


def by_scipy(values, shape, order, coarse_axis):
    """The same map by scipy, slice by slice if there is a coarse axis, as nnU-Net does it."""
    zoom = partial(ndimage.zoom, order=order, mode="nearest", grid_mode=True)
    factor = [n / m for n, m in zip(shape, values.shape, strict=True)]
    parts = [values] if coarse_axis is None else list(np.moveaxis(values, coarse_axis, 0))
    within = [f for axis, f in enumerate(factor) if axis != coarse_axis]
    done = [np.clip(zoom(part.astype(float), within), part.min(), part.max()) for part in parts]
    if coarse_axis is None:
        return done[0]
    across = [f if axis == coarse_axis else 1 for axis, f in enumerate(factor)]
    return ndimage.zoom(np.stack(done, coarse_axis), across, order=0, mode="nearest", grid_mode=True)


SHAPES = st.tuples(*[st.integers(1, 24)] * 3)


@settings(max_examples=60, deadline=None)
@given(SHAPES, SHAPES, st.sampled_from([1, 3]), st.sampled_from([None, 0, 1, 2]), st.integers(0, 1000))
def test_resampling_is_scipys_spline(shape, target, order, coarse_axis, seed):
    values = np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)
    found = resample(values, target, order=order, coarse_axis=coarse_axis)
    assert found.dtype == np.float32
    assert np.allclose(found, by_scipy(values, target, order, coarse_axis), atol=1e-5)


def test_a_volume_of_many_slabs_is_resampled_like_one(monkeypatch):
    values = np.random.default_rng(0).normal(0, 1, (9, 14, 11)).astype(np.float32)
    whole = resample(values, (13, 10, 17), order=3, coarse_axis=None)
    monkeypatch.setattr(resampling, "_SLAB", 200)
    assert np.array_equal(resample(values, (13, 10, 17), order=3, coarse_axis=None), whole)


@settings(max_examples=60, deadline=None)
@given(SHAPES, SHAPES, st.sampled_from([None, 0, 1, 2]), st.integers(0, 1000))
def test_the_label_with_the_largest_share_wins(shape, target, coarse_axis, seed):
    generator = np.random.default_rng(seed)
    label = np.where(generator.random(shape) < 0.3, generator.integers(0, 5, shape), 0).astype(np.int16)
    found = resample_labels(label, target, coarse_axis=coarse_axis)
    shares = np.stack([by_scipy((label == value).astype(float), target, 1, coarse_axis) for value in range(5)])
    of_found = np.take_along_axis(shares, found[None].astype(int), axis=0)[0]
    assert found.dtype == np.int16 and np.allclose(of_found, shares.max(axis=0), atol=1e-5)


def test_of_two_labels_with_the_same_share_the_last_wins():
    label = np.array([0, 2, 1, 0, 2, 1], np.int16).reshape(1, 1, 6)
    assert resample_labels(label, (1, 1, 3), coarse_axis=None).tolist() == [[[2, 1, 2]]]


def test_preparing_takes_few_copies_of_a_volume(monkeypatch):
    monkeypatch.setattr(resampling, "_SLAB", 1 << 13)  # as small beside this volume as slabs are beside a large one
    image = np.random.default_rng(0).uniform(1, 2, (1, 24, 64, 64)).astype(np.float32)
    scan = case(image, (image[0] > 1.9).astype(np.int32), (2.0, 1.0, 1.0))
    tracemalloc.start()
    preprocess_case(scan, grid((1.6, 1.1, 1.1)), Intensity(channels=(Channel(scheme="zscore"),)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 7 * image.nbytes


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_coarse_slices_are_not_mixed(axis):
    volume = np.zeros((2, 6, 6), np.float32)
    volume[1] = 1
    shape = [12, 12, 12]
    shape[axis] = 4
    finer = np.moveaxis(resample(np.moveaxis(volume, 0, axis), shape, order=3, coarse_axis=axis), axis, 0)
    assert finer.shape == (4, 12, 12) and set(np.unique(finer)) == {0.0, 1.0}
    label = resample_labels(np.moveaxis(volume, 0, axis).astype(np.int16), shape, coarse_axis=axis)
    assert label.dtype == np.int16
    label = np.moveaxis(label, axis, 0)
    assert label[:2].max() == 0 and label[2:].min() == 1


@pytest.mark.parametrize(
    ("case_mm", "plan_mm", "axis"),
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),
        ((3.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),  # three times is not yet coarse
        ((5.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0),
        ((1.0, 5.0, 1.0), (1.0, 1.0, 1.0), 1),
        ((1.0, 1.0, 5.0), (5.0, 1.0, 1.0), 2),  # the case's own spacing comes before the plan's
        ((1.0, 1.0, 1.0), (5.0, 1.0, 1.0), 0),
        ((2.0, 1.0, 1.0), (1.0, 1.0, 4.0), 2),
        ((0.24, 1.25, 1.25), (5.0, 1.0, 1.0), None),  # two coarse axes are no slices, whatever the plan says
    ],
)
def test_the_axis_of_the_slices_is_that_of_the_case_else_of_the_plan(case_mm, plan_mm, axis):
    """A value may lie between those of the file only if a spline mixed them along that axis."""
    for along in range(3):
        steps = np.arange(1, 7, dtype=np.float32).reshape([6 if a == along else 1 for a in range(3)])
        image = np.broadcast_to(steps, (6, 6, 6))
        ready = preprocess_case(case(image[None], spacing_mm=case_mm), grid(plan_mm), RAW)
        assert ready.inverse.coarse_axis == axis
        mixed = not set(np.unique(ready.image.round(4))) <= set(range(1, 7))
        if axis == along:
            assert not mixed
        elif case_mm[along] != plan_mm[along] and axis is not None:
            assert mixed


def test_the_axis_of_the_slices_is_found_after_the_axes_are_turned():
    image = np.random.default_rng(0).uniform(1, 2, (1, 8, 8, 4)).astype(np.float32)
    ready = preprocess_case(case(image, spacing_mm=(1.0, 1.0, 5.0)), grid((2.5, 1.0, 1.0), (2, 0, 1)), RAW)
    assert ready.inverse.coarse_axis == 0 and ready.image.shape == (1, 8, 8, 8)
    assert np.array_equal(ready.image[:, ::2], ready.image[:, 1::2])


def test_the_way_back_takes_the_nearest_slice_too():
    ready = preprocess_case(
        case(np.ones((1, 8, 6, 6), np.float32), spacing_mm=(5.0, 1.0, 1.0)), grid((10.0, 0.5, 1.0)), RAW
    )
    assert ready.image.shape == (1, 4, 12, 6)
    values = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None], (4, 12, 6))
    assert restore(values, ready.inverse)[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("mm", [(5.0, 2.0, 2.0), (1.0, 2.0, 2.0), (0.5, 4.0, 1.0)])
def test_slices_of_a_flat_plan_stay_where_they_are(mm):
    volume = np.random.default_rng(0).uniform(1, 2, (1, 3, 8, 8)).astype(np.float32)
    volume[..., 0, 0], volume[..., 7, 7] = 1, 2  # slices of one range, since what overshoots is clipped to it
    flat = grid((2.0, 1.0, 1.0), configuration="2d")
    ready = preprocess_case(case(volume, spacing_mm=mm), flat, RAW)
    assert ready.image.shape[:2] == (1, 3) and ready.image.shape[2] > 8
    alone = [preprocess_case(case(volume[:, z : z + 1], spacing_mm=mm), flat, RAW).image for z in range(3)]
    assert np.allclose(ready.image, np.concatenate(alone, axis=1), atol=1e-5)
    assert len(np.unique(ready.image[0, 0, :, 3].round(4))) > 8  # a spline in the plane, whatever its spacing
    assert restore(ready.image[0], ready.inverse).shape == (3, 8, 8)


def test_a_flat_volume_whose_slice_is_thin_goes_all_the_way(tmp_path):
    """A NIfTI file of one slice, 1 mm thick, with pixels of 1.5 and 2 mm at one site and finer ones at the other."""
    sites = [
        open_dataset(make_site(tmp_path / name, cases=2, shape=(1, 40, 48), spacing_mm=mm))
        for name, mm in (("alpha", (1.0, 2.0, 1.5)), ("bravo", (1.0, 1.5, 1.0)))
    ]
    plan = make(merge([measure(site) for site in sites]), Budget(hours=0.01, speed=SPEED))
    assert plan.local.geometry.configuration == "2d" and len(plan.local.training.patch_size) == 2
    for site in sites:
        preprocess(site, plan.local, tmp_path / "work")
        store = open_store(tmp_path / "work", site.name, plan.local)
        image, label = sample_patch(
            store, next(iter(store.patients)), plan.local.training, IDENTITY, np.random.default_rng(0)
        )
        assert image.shape == (1, *plan.local.training.patch_size) and label.max() > 0
        scan = site.read(f"{site.name}_000")
        ready = preprocess_case(scan, plan.local.geometry, plan.local.intensity)
        assert ready.image.shape[:2] == (1, 1)
        certain = np.stack([ready.label == k for k in range(2)]).astype(np.float32)
        back = restore_labels(certain, ready.inverse)
        assert back.shape == scan.label.shape
        assert 2 * ((back == 1) & (scan.label == 1)).sum() / ((back == 1).sum() + (scan.label == 1).sum()) > 0.9


@pytest.mark.parametrize(("classes", "kind"), [(256, np.uint8), (258, np.uint16)])
def test_many_classes_do_not_overflow(classes, kind):
    image = np.ones((1, 2, 2, 2), np.float32)
    way = preprocess_case(case(image), grid(), RAW).inverse
    probabilities = np.zeros((classes, 2, 2, 2), np.float32)
    probabilities[-1] = 1
    labels = restore_labels(probabilities, way)
    assert labels.dtype == kind and (labels == classes - 1).all()


@pytest.mark.parametrize(
    ("channel", "expected"),
    [
        (Channel(scheme="nonorm"), [0, 5, 10]),
        (Channel(scheme="rescale_to_0_1"), [0, 0.5, 1]),
        (Channel(scheme="rgb_to_0_1"), [0, 5 / 255, 10 / 255]),
        (Channel(scheme="zscore"), [-1.2247449, 0, 1.2247449]),
        (Channel(scheme="ct", mean=5, std=2, percentile_00_5=1, percentile_99_5=9), [-2, 0, 2]),
    ],
)
def test_normalisation_schemes(channel, expected):
    values = np.array([0, 5, 10], np.float32).reshape(1, 1, 3)
    assert normalise(values, channel, None).ravel() == pytest.approx(expected)


def test_zscore_inside_the_mask_leaves_the_outside_alone():
    values = np.array([0, 5, 15], np.float32).reshape(1, 1, 3)
    assert normalise(values, Channel(scheme="zscore"), values > 0).ravel().tolist() == [0, -1, 1]


def test_the_mask_is_used_if_the_plan_says_so():
    image = np.random.default_rng(0).uniform(5, 9, (1, 6, 6, 6)).astype(np.float32)
    image[0, :3, :3] = 0  # a corner: the box around the rest is still the whole image
    outside = image[0] == 0
    zscore = (Channel(scheme="zscore"),)
    inside = preprocess_case(case(image), grid(), Intensity(channels=zscore, inside_mask=True)).image[0]
    assert (inside[outside] == 0).all() and inside[~outside].mean() == pytest.approx(0, abs=1e-5)
    assert inside[~outside].std() == pytest.approx(1, abs=1e-4)
    every = preprocess_case(case(image), grid(), Intensity(channels=zscore)).image[0]
    assert (every[outside] < -1).all() and every.mean() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("values", [(-1.0, 200.0), (0.0, 256.0)])
def test_colours_beyond_their_range_are_refused(values):
    image = np.where(np.indices((1, 2, 2, 2)).sum(axis=0) % 2, *values).astype(np.float32)
    with pytest.raises(ValidationErrors, match=f"^c: .*from {values[0]:g} to {values[1]:g}, expected 0 to 255"):
        preprocess_case(case(image), grid(), Intensity(channels=(Channel(scheme="rgb_to_0_1"),)))


# --- the store


@pytest.fixture
def site(tmp_path):
    return make_site(tmp_path / "raw" / "alpha", cases=3, patients=2)


def test_a_second_run_does_nothing_and_an_interrupted_one_goes_on(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    folder, new = preprocess(dataset, plan.local, tmp_path / "work")
    assert new == 3
    assert preprocess(dataset, plan.local, tmp_path / "work") == (folder, 0)
    (folder / "index.json").unlink()
    shutil.rmtree(folder / "alpha_001")
    assert preprocess(dataset, plan.local, tmp_path / "work") == (folder, 1)


def test_changing_the_rounds_prepares_nothing_again(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    preprocess(dataset, plan.local, tmp_path / "work")
    assert preprocess(dataset, plan.change({"training.rounds": 9}).local, tmp_path / "work")[1] == 0


def test_a_patch_is_read_from_disk_as_it_was_prepared(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    preprocess(dataset, plan.local, tmp_path / "work", processes=2)
    store = open_store(tmp_path / "work", "alpha", plan.local)
    ready = preprocess_case(dataset.read("alpha_002"), plan.local.geometry, plan.local.intensity)
    assert np.array_equal(store.image("alpha_002")[:, 2:9, 3:5, :4], ready.image[:, 2:9, 3:5, :4])
    assert np.array_equal(store.label("alpha_002")[:], ready.label)
    at = store.locations("alpha_002")[1]
    assert (ready.label[tuple(at.T)] == 1).all() and len(at) == (ready.label == 1).sum()
    assert dict(store.patients) == {"patient_000": ("alpha_000", "alpha_001"), "patient_001": ("alpha_002",)}


def test_numpy_is_handed_nothing_but_the_locations(tmp_path, site, monkeypatch):
    """numpy 2.0 knows no allow_pickle here and would store it among the classes."""
    handed = []
    savez = np.savez
    monkeypatch.setattr(np, "savez", lambda file, **arrays: handed.append(set(arrays)) or savez(file, **arrays))
    preprocess(open_dataset(site), small_plan().local, tmp_path / "work")
    assert handed == [{"1"}] * 3


def test_a_worker_is_sent_nothing_of_other_cases(tmp_path, site, monkeypatch):
    sent = []
    monkeypatch.setattr(store, "each", lambda function, items, **_: sent.extend(items))
    dataset = open_dataset(site)
    preprocess(dataset, small_plan().local, tmp_path / "work")
    assert [dict(one.cases) for one in sent] == [{case: files} for case, files in dataset.cases.items()]
    assert [one.patient(case) for one in sent for case in one.cases] == list(map(dataset.patient, dataset.cases))


@pytest.mark.parametrize(
    ("shape", "chunks", "blocks"),
    [((1, 36, 70, 200), (1, 36, 35, 50), (1, 18, 18, 25)), ((3, 1, 300, 100), (3, 1, 150, 100), (3, 1, 75, 100))],
)
def test_chunks_and_blocks_share_a_volume_evenly(tmp_path, shape, chunks, blocks):
    store._write(tmp_path / "image.b2nd", np.zeros(shape, np.float32))
    stored = store._open(tmp_path / "image.b2nd")
    assert stored.shape == shape and stored.chunks == chunks and stored.blocks == blocks


def test_whoever_reads_no_array_does_not_wait_for_blosc2():
    script = "import sys, autofed.preprocessing; sys.exit('blosc2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_way_back_is_stored_with_the_case(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    folder, _ = preprocess(dataset, plan.local, tmp_path / "work")
    ready = preprocess_case(dataset.read("alpha_000"), plan.local.geometry, plan.local.intensity)
    assert InverseTransform.parse(read_json(folder / "alpha_000" / "case.json"), "case") == ready.inverse


def test_stale_data_is_refused(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    preprocess(dataset, plan.local, tmp_path / "work")
    label = next((site / "labelsTr").iterdir())
    label.write_bytes(label.read_bytes())  # written again: another time stamp
    with pytest.raises(ValidationErrors, match="changed since they were prepared"):
        open_store(tmp_path / "work", "alpha", plan.local)


def test_data_of_another_plan_is_refused(tmp_path, site):
    plan = small_plan()
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    with pytest.raises(ValidationErrors, match="another plan"):
        open_store(tmp_path / "work", "alpha", plan.change({"geometry.spacing_mm": [2, 1, 1]}).local)
    with pytest.raises(ValidationErrors, match="found nothing"):
        open_store(tmp_path / "work", "bravo", plan.local)


def test_prepared_data_may_be_moved_without_the_raw_files(tmp_path, site):
    plan = small_plan()
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    shutil.rmtree(site)
    assert len(open_store(tmp_path / "work", "alpha", plan.local).folders) == 3


def test_unlabelled_cases_are_prepared_but_have_no_patient(tmp_path):
    plan, site = small_plan(), make_site(tmp_path / "raw" / "alpha", cases=3, unlabelled=1)
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    store = open_store(tmp_path / "work", "alpha", plan.local)
    assert len(store.folders) == 3 and len(store.patients) == 2


def test_pooled_data_keeps_every_patient_apart(tmp_path):
    plan = small_plan()
    for name in ("alpha", "bravo"):
        preprocess(open_dataset(make_site(tmp_path / name, cases=2, patients=1)), plan.local, tmp_path / "work")
    stores = {name: open_store(tmp_path / "work", name, plan.local) for name in preprocessed_sites(tmp_path / "work")}
    together = pool_stores(stores)
    assert len(together.patients) == 4 and len(together.folders) == 4
    assert together.label("bravo/bravo_001").shape == stores["bravo"].label("bravo_001").shape


def test_a_case_that_cannot_be_read_is_named_and_leaves_nothing_half_written(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    broken = site / "imagesTr" / "alpha_001_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-2000])
    with pytest.raises(ValidationErrors, match="alpha_001"):
        preprocess(dataset, plan.local, tmp_path / "work")
    names = sorted(p.name for p in (tmp_path / "work" / "alpha").rglob("*") if p.parent.parent.name == "alpha")
    assert names == ["alpha_000", "alpha_002"]


REGIONS = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def test_ignored_voxels_are_kept_and_are_no_place_for_a_patch(tmp_path):
    site = make_site(tmp_path / "alpha", cases=2, labels=REGIONS, order=(1, 2), annotated=0.6)
    plan = small_plan(labels=REGIONS, order=(1, 2))
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    store = open_store(tmp_path / "work", "alpha", plan.local)
    label, places = store.label("alpha_001")[:], store.locations("alpha_001")
    assert label.dtype == np.int16 and set(np.unique(label)) == {0, 1, 2, 3}
    held = {key: set(map(tuple, at.tolist())) for key, at in places.items()}
    by_hand = {1: (label == 1) | (label == 2), 2: label == 2, preprocessing.ANNOTATED: label < 3}
    assert held == {key: set(map(tuple, np.argwhere(mask).tolist())) for key, mask in by_hand.items()}


def test_what_is_ignored_stays_so_on_a_coarser_grid():
    label = np.zeros((8, 8, 8), np.int16)
    label[..., 4:], label[..., :2] = 3, 1
    found = resample_labels(label, (4, 4, 4), coarse_axis=None)
    assert (found[..., 2:] == 3).all() and (found[..., 0] == 1).all() and (found[..., 1] == 0).all()


def test_regions_come_back_where_they_are_more_likely_than_not_and_later_ones_lie_on_top():
    ready = preprocess_case(case(np.ones((1, 4, 4, 4), np.float32)), grid(), RAW)
    probabilities = np.zeros((2, 4, 4, 4), np.float32)
    probabilities[0, ..., :3], probabilities[1, ..., 2:] = 0.6, 0.51
    assert restore_regions(probabilities, ready.inverse, (1, 7))[0, 0].tolist() == [1, 1, 7, 7]
    assert restore_regions(probabilities * 0.8, ready.inverse, (1, 300)).dtype == np.uint16
    assert not restore_regions(probabilities * 0.8, ready.inverse, (1, 300)).any()
