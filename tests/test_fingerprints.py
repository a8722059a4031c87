"""Merging is exact, and what is counted is right."""

from functools import reduce
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofed.data import Case, Declaration, open_dataset
from autofed.data.images import Geometry
from autofed.errors import ValidationErrors
from autofed.files import write_json
from autofed.fingerprints import FIXED_POINT, Fingerprint, crop_box, measure, measure_case, merge, values
from autofed.fingerprints.exact import _add
from autofed.planner import make
from tests.synthetic import make_site

DECLARATION = Declaration(channels=("CT",), labels={"background": 0, "a": 1, "b": 2}, dimension=3)


def case(seed, shape=(6, 7, 8), spacing_mm=(2.0, 1.0, 0.7)):
    generator = np.random.default_rng(seed)
    image = generator.normal(40, 200, (1, *shape)).astype(np.float32)
    label = generator.integers(0, 3, shape).astype(np.int32)
    return Case(f"case_{seed}", f"case_{seed}", image, label, spacing_mm, Geometry(3, spacing_mm, (0.0,) * 3))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=4, unique=True), st.floats(0.3, 5))
def test_merging_is_the_same_in_any_order(seeds, spacing):
    parts = [measure_case(case(s, spacing_mm=(spacing, 1.0, 1.0)), DECLARATION) for s in seeds]
    merged = {reduce(_add, order).model_dump_json() for order in permutations(parts)}
    assert len(merged) == 1
    half = len(parts) // 2
    grouped = _add(reduce(_add, parts[:half]), reduce(_add, parts[half:]))
    assert grouped.model_dump_json() == merged.pop()


def test_processes_give_the_same_fingerprint(tmp_path):
    site = open_dataset(make_site(tmp_path / "alpha", cases=4))
    assert measure(site, processes=2) == measure(site, processes=1)


def test_saved_and_loaded_is_the_same(tmp_path):
    found = measure(open_dataset(make_site(tmp_path / "alpha", cases=3)))
    found.save(tmp_path / "alpha.json")
    assert Fingerprint.load(tmp_path / "alpha.json") == found


def test_counts_are_those_of_the_case():
    one = case(1)
    found = measure_case(one, DECLARATION)
    assert [values(a.size).tolist() for a in found.axes] == [[6], [7], [8]]
    assert [values(a.spacing_mm).tolist() for a in found.axes] == [[2.0], [1.0], [0.7]]
    assert found.classes["b"].voxels == int((one.label == 2).sum())
    assert found.classes["b"].volume == pytest.approx((one.label == 2).sum() * 1.4 * FIXED_POINT)
    inside = one.image[0][one.label > 0]
    assert found.channels[0].total / FIXED_POINT == pytest.approx(inside.mean(), abs=1e-3)
    assert sum(found.channels[0].histogram.values()) == pytest.approx(FIXED_POINT, rel=1e-4)


def test_merged_intensities_hold_the_variance_between_sites(tmp_path):
    """Averaging the sites' standard deviations would give about 10 here; the pooled one is about 100."""
    declaration = Declaration(channels=("CT",), labels={"background": 0, "a": 1}, dimension=3)
    parts = []
    for seed, mean in ((1, -100), (2, 100)):
        image = np.random.default_rng(seed).normal(mean, 10, (1, 9, 9, 9)).astype(np.float32)
        label = np.ones((9, 9, 9), np.int32)
        parts.append(measure_case(Case("c", "c", image, label, (1.0,) * 3, Geometry(3, (1.0,) * 3)), declaration))
    sums = _add(*parts).channels[0]
    mean = sums.total / sums.cases / FIXED_POINT
    assert (sums.squares / sums.cases / FIXED_POINT - mean**2) ** 0.5 == pytest.approx(100, rel=0.05)


def test_plan_of_merged_sites_is_that_of_the_pooled_data(tmp_path):
    """The same cases in one folder or in two: every section but the sites' names is the same."""
    apart = [make_site(tmp_path / "alpha", cases=3, seed=1), make_site(tmp_path / "bravo", cases=4, seed=2)]
    merged = merge([measure(open_dataset(s)) for s in apart])
    parts = [measure(open_dataset(s)).model_copy(update={"sites": {}}) for s in apart]
    together = _add(*parts).model_copy(update={"sites": {"all": merged.sites["alpha"]}})
    assert make(merged).local.geometry == make(together).local.geometry
    assert make(merged).local.intensity == make(together).local.intensity
    assert make(merged).local.network == make(together).local.network


def test_patients_are_counted_once(tmp_path):
    site = make_site(tmp_path / "alpha", cases=4, patients=2)
    assert measure(open_dataset(site)).sites["alpha"].patients == 2


def test_disagreeing_and_double_sites_are_refused_together(tmp_path):
    alpha = measure(open_dataset(make_site(tmp_path / "alpha", cases=2)))
    bravo = measure(open_dataset(make_site(tmp_path / "bravo", cases=2, channels=("T1", "T2"))))
    with pytest.raises(ValidationErrors) as error:
        merge([alpha, alpha, bravo])
    text = str(error.value)
    assert "alpha comes 2 times" in text and "disagree on channels" in text and "T1, T2" in text


def spoiled(found, **changes):
    """The JSON of a fingerprint with some of its fields, named by their paths, set to something else."""
    value = found.model_dump(mode="json")
    for path, new in changes.items():
        *sections, last = path.split("__")
        part = value
        for key in sections:
            part = part[int(key) if isinstance(part, list) else key]
        if new is None:
            del part[last]
        else:
            part[last] = new
    return value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sites": {}}, "there is none"),
        ({"sites": {"../etc": {"patients": 1, "cases": 1, "labelled": 1}}}, "the site is called"),
        ({"sites": {"pooled": {"patients": 1, "cases": 1, "labelled": 1}}}, "no site may be called"),
        ({"sites__alpha__patients": 9}, "9 patients"),
        ({"sites__alpha__patients": 0}, "0 patients"),
        ({"channels": []}, "channels: found 0"),
        ({"classes__tumour": None}, "classes: found"),
        ({"crop_ratio": {}}, "crop_ratio: 0 cases are counted, but the sites have 2"),
        ({"axes__2__size": {"32": 10**13}}, "axes.x.size: 10000000000000 cases"),
        ({"crop_ratio": {"half": 2}}, "crop_ratio: found .'half'"),
        ({"crop_ratio": {"nan": 2}}, "crop_ratio: found .'nan'"),
        ({"axes__0__spacing_mm": {"0.0": 2}}, "axes.z.spacing_mm"),
        ({"axes__2__size": {"inf": 2}}, "axes.x.size"),
        ({"axes__1__extent_mm": {"5.0": -2}}, "axes.y.extent_mm"),
        ({"channels__0__histogram": {"5000": 2}}, "channels.CT.histogram"),
        ({"channels__0__histogram": {}}, "channels.CT: the intensities"),
        ({"channels__0__cases": 0}, "channels.CT: the intensities"),
        ({"declaration__dimension": 4}, "dimension: found 4"),
        ({"declaration__labels__tumour": 3}, "without a gap"),
    ],
)
def test_a_fingerprint_whose_parts_do_not_belong_together_is_refused(tmp_path, changes, says):
    found = measure(open_dataset(make_site(tmp_path / "alpha", cases=2, channels=("CT",))))
    write_json(tmp_path / "alpha.json", spoiled(found))
    assert Fingerprint.load(tmp_path / "alpha.json") == found
    write_json(tmp_path / "alpha.json", spoiled(found, **changes))
    with pytest.raises(ValidationErrors, match=says):
        Fingerprint.load(tmp_path / "alpha.json")


def test_what_names_no_site_is_not_merged():
    part = measure_case(case(1), DECLARATION)
    for nothing in ([], [part]):
        with pytest.raises(ValidationErrors, match="there is no site"):
            merge(nothing)


def test_crop_box_is_the_smallest_around_what_is_not_zero():
    image = np.zeros((2, 5, 6, 7), np.float32)
    image[0, 1, 2, 3] = 1
    image[1, 3, 4, 5] = -1
    assert crop_box(image) == (slice(1, 4), slice(2, 5), slice(3, 6))
    assert crop_box(np.zeros((1, 5, 6, 7))) == (slice(0, 5), slice(0, 6), slice(0, 7))


def test_regions_are_counted_whole_and_ignored_voxels_by_themselves():
    """Each voxel of the core counts for the whole too; intensities are those of annotated foreground."""
    declared = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    declaration = Declaration(channels=("CT",), labels=declared, regions_class_order=(1, 2), dimension=3)
    one = case(1)
    one.label[0] = 3
    found = measure_case(one, declaration)
    counts = {value: int((one.label == value).sum()) for value in range(4)}
    assert {name: c.voxels for name, c in found.classes.items()} == {
        "background": counts[0], "whole": counts[1] + counts[2], "core": counts[2], "ignore": counts[3]
    }  # fmt: skip
    assert found.classes["whole"].components <= found.classes["core"].components
    assert found.classes["ignore"].components == 0
    inside = one.image[0][(one.label == 1) | (one.label == 2)]
    assert found.channels[0].total / FIXED_POINT == pytest.approx(inside.mean(), abs=1e-3)
    assert Fingerprint.parse(found.model_dump(mode="json") | {"sites": {"alpha": {
        "patients": 1, "cases": 1, "labelled": 1}}}, "alpha").declaration == declaration  # fmt: skip


def test_a_site_that_ignores_everything_has_nothing_to_learn_from(tmp_path):
    site = make_site(tmp_path / "alpha", labels={"background": 0, "organ": 1, "ignore": 2}, annotated=0.0)
    with pytest.raises(ValidationErrors, match="no label map holds any organ; look"):
        measure(open_dataset(site))
