"""Onto the grid and exactly back; a store that is whole, complete and never stale."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofed.case import Case, open_dataset
from autofed.files import read_json
from autofed.images import Geometry as FileGeometry
from autofed.plans import Channel, Geometry, Intensity
from autofed.prepared import (
    WayBack,
    normalise,
    open_store,
    pool,
    prepare,
    prepared_sites,
    preprocess,
    resample,
    resample_labels,
    restore,
    restore_labels,
)
from autofed.problems import Problems
from tests.plans_made import small_plan
from tests.synthetic import blobs, make_site

RAW = Intensity(channels=(Channel(scheme="nonorm"),))


def grid(spacing_mm=(1.0, 1.0, 1.0), transpose=(0, 1, 2), configuration="3d_fullres"):
    return Geometry(configuration=configuration, transpose=transpose, spacing_mm=spacing_mm, median_shape=(8, 8, 8),
                    resample_in_plane=False)  # fmt: skip


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
    ready = prepare(case(image, label), grid(transpose=tuple(order)), RAW)
    assert np.array_equal(restore(ready.image[0], ready.way_back), image[0])
    one_hot = np.stack([ready.label == k for k in range(3)]).astype(np.float32)
    assert np.array_equal(restore_labels(one_hot, ready.way_back), label)


def test_resampled_labels_come_back_almost_whole():
    generator = np.random.default_rng(0)
    label = blobs((24, 40, 40), 3, generator)
    image = (label + generator.normal(1, 0.1, label.shape)).astype(np.float32)[None]
    ready = prepare(case(image, label, (2.0, 1.0, 1.0)), grid((1.5, 1.3, 0.8)), RAW)
    assert ready.image.shape[1:] == (32, 31, 50)
    back = restore_labels(np.stack([ready.label == k for k in range(3)]).astype(np.float32), ready.way_back)
    assert back.shape == label.shape
    for value in (1, 2):
        overlap = 2 * ((back == value) & (label == value)).sum() / ((back == value).sum() + (label == value).sum())
        assert overlap > 0.93


def test_what_was_cropped_comes_back_as_background():
    image = np.zeros((1, 9, 9, 9), np.float32)
    image[0, 3:6, 3:6, 3:6] = 5
    ready = prepare(case(image), grid(), RAW)
    assert ready.image.shape == (1, 3, 3, 3)
    certain = np.stack([np.zeros((3, 3, 3)), np.ones((3, 3, 3))]).astype(np.float32)
    found = restore_labels(certain, ready.way_back)
    assert found.sum() == 27 and found[4, 4, 4] == 1


def test_resampling_knows_no_overshoot_and_keeps_a_ramp():
    step = np.zeros((4, 4, 16), np.float32)
    step[..., 8:] = 1
    finer = resample(step, (4, 4, 40), order=3, separate=False)
    assert finer.min() >= 0 and finer.max() <= 1
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32), (4, 4, 16))
    middle = resample(ramp, (4, 4, 32), order=1, separate=False)[0, 0, 4:-4]
    assert np.allclose(np.diff(middle), 0.5, atol=1e-5)


def test_coarse_slices_are_not_mixed():
    volume = np.zeros((2, 6, 6), np.float32)
    volume[1] = 1
    finer = resample(volume, (4, 12, 12), order=3, separate=True)
    assert set(np.unique(finer)) == {0.0, 1.0}
    label = resample_labels(volume.astype(np.int16), (4, 12, 12), separate=True)
    assert label.dtype == np.int16 and label[:2].max() == 0 and label[2:].min() == 1


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
    ready = prepare(dataset.read("alpha_002"), plan.local.geometry, plan.local.intensity)
    assert np.array_equal(store.image("alpha_002")[:, 2:9, 3:5, :4], ready.image[:, 2:9, 3:5, :4])
    assert np.array_equal(store.label("alpha_002")[:], ready.label)
    at = store.locations("alpha_002")[1]
    assert (ready.label[tuple(at.T)] == 1).all() and len(at) == (ready.label == 1).sum()
    assert dict(store.patients) == {"patient_000": ("alpha_000", "alpha_001"), "patient_001": ("alpha_002",)}


def test_the_way_back_is_stored_with_the_case(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    folder, _ = preprocess(dataset, plan.local, tmp_path / "work")
    ready = prepare(dataset.read("alpha_000"), plan.local.geometry, plan.local.intensity)
    assert WayBack.parse(read_json(folder / "alpha_000" / "case.json"), "case") == ready.way_back


def test_stale_data_is_refused(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    preprocess(dataset, plan.local, tmp_path / "work")
    label = next((site / "labelsTr").iterdir())
    label.write_bytes(label.read_bytes())  # written again: another time stamp
    with pytest.raises(Problems, match="changed since they were prepared"):
        open_store(tmp_path / "work", "alpha", plan.local)


def test_data_of_another_plan_is_refused(tmp_path, site):
    plan = small_plan()
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    with pytest.raises(Problems, match="another plan"):
        open_store(tmp_path / "work", "alpha", plan.change({"geometry.spacing_mm": [2, 1, 1]}).local)
    with pytest.raises(Problems, match="found nothing"):
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
    stores = {name: open_store(tmp_path / "work", name, plan.local) for name in prepared_sites(tmp_path / "work")}
    together = pool(stores)
    assert len(together.patients) == 4 and len(together.folders) == 4
    assert together.label("bravo/bravo_001").shape == stores["bravo"].label("bravo_001").shape


def test_a_case_that_cannot_be_read_is_named_and_leaves_nothing_half_written(tmp_path, site):
    plan, dataset = small_plan(), open_dataset(site)
    broken = site / "imagesTr" / "alpha_001_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-2000])
    with pytest.raises(Problems, match="alpha_001"):
        preprocess(dataset, plan.local, tmp_path / "work")
    names = sorted(p.name for p in (tmp_path / "work" / "alpha").rglob("*") if p.parent.parent.name == "alpha")
    assert names == ["alpha_000", "alpha_002"]
