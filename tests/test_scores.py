"""Scores: values known in advance, what is left out of the means, and folders with everything wrong at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import ndimage

from autofed.data import images
from autofed.data.images import Geometry
from autofed.errors import ValidationErrors
from autofed.inference.scores import (
    CaseScores,
    Report,
    Scores,
    evaluate_folder,
    find_references,
    score_case,
    summarise,
)

LABELS = {"background": 0, "kidney": 1, "tumour": 2}
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
PICTURE = Geometry(2, (999.0, 1.0, 1.0))


def volume(spacing=(2.5, 1.0, 0.5), origin=(0.0, 0.0, 0.0), direction=UPRIGHT):
    return Geometry(3, spacing, origin, direction)


def cube(offset=(0, 0, 0), shape=(24, 24, 24), value=1):
    array = np.zeros(shape, np.int32)
    array[tuple(slice(5 + o, 15 + o) for o in offset)] = value
    return array


def one(prediction, reference, spacing=(1.0, 1.0, 1.0)):
    return score_case(prediction, reference, {"background": 0, "kidney": 1}, spacing).classes["kidney"]


# One case


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cube_shifted_along_an_axis_has_the_scores_of_the_textbook(axis, steps):
    offset = [0, 0, 0]
    offset[axis] = steps
    spacing = (2.5, 1.0, 0.5)
    scores = one(cube(offset), cube(), spacing)
    assert scores.dice == pytest.approx((10 - steps) / 10)
    assert scores.jaccard == pytest.approx((10 - steps) / (10 + steps), abs=1e-6)
    # The face that sticks out is a fifth of the surface, so the 95th percentile is the shift itself.
    assert scores.hd95_mm == pytest.approx(steps * spacing[axis])


def test_a_picture_is_scored_in_two_dimensions():
    prediction, reference = np.zeros((2, 1, 30, 30), np.int32)
    prediction[0, 5:15, 5:15] = 1
    reference[0, 9:19, 5:15] = 1
    assert one(prediction, reference, (999.0, 1.0, 1.0)) == Scores(dice=0.6, jaccard=round(6 / 14, 6), hd95_mm=4.0)
    holed = reference.copy()
    holed[0, 12:16, 8:12] = 0
    # The rim of the hole is 2 pixels from the outline. In 3D every voxel of a slice is surface, and this would be 1.
    assert one(reference, holed, (1.0, 1.0, 1.0)).hd95_mm == 2.0


def test_a_single_stray_voxel_does_not_move_the_95th_percentile():
    stray = cube()
    stray[23, 23, 23] = 1
    assert one(stray, cube()).hd95_mm == 0.0
    assert one(stray, cube()).dice < 1


def _surface(mask):
    return mask & ~ndimage.binary_erosion(mask)


def _hd95(a, b, spacing):
    """By distance transforms over the whole volume, where the library crops and searches trees."""
    a, b = _surface(a), _surface(b)
    to_b = ndimage.distance_transform_edt(~b, sampling=spacing)[a]
    to_a = ndimage.distance_transform_edt(~a, sampling=spacing)[b]
    return max(np.percentile(to_b, 95), np.percentile(to_a, 95))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ragged_shapes_that_touch_the_border_agree_with_the_definitions(seed):
    random = np.random.default_rng(seed)
    prediction, reference = (
        np.digitize(ndimage.gaussian_filter(random.normal(size=(12, 20, 17)), 1.5), [0.0, 0.12]).astype(np.int32)
        for _ in range(2)
    )
    spacing = (3.0, 0.7, 1.3)
    scored = score_case(prediction, reference, LABELS, spacing)
    assert list(scored.classes) == ["kidney", "tumour"]
    for name, scores in scored.classes.items():
        p, r = prediction == LABELS[name], reference == LABELS[name]
        both = np.count_nonzero(p & r)
        assert scores.dice == pytest.approx(2 * both / (p.sum() + r.sum()), abs=1e-5)
        assert scores.jaccard == pytest.approx(both / np.count_nonzero(p | r), abs=1e-5)
        assert scores.hd95_mm == pytest.approx(_hd95(p, r, spacing), abs=1e-4)


def test_a_structure_in_neither_map_is_not_scored_and_left_out_of_the_mean():
    scored = score_case(cube((1, 0, 0)), cube(), LABELS, (1, 1, 1), case="a", site="alpha")
    assert scored.classes["tumour"] == Scores(dice=None, jaccard=None, hd95_mm=None)
    assert scored.mean == scored.classes["kidney"]
    assert (scored.case, scored.site) == ("a", "alpha")
    empty = np.zeros((4, 4, 4), np.int32)
    assert score_case(empty, empty, LABELS, (1, 1, 1)).mean == Scores()


@pytest.mark.parametrize("swapped", [False, True])
def test_a_structure_in_only_one_map_scores_zero_without_a_distance(swapped):
    maps = [cube(), np.zeros((24, 24, 24), np.int32)]
    assert one(*(maps[::-1] if swapped else maps)) == Scores(dice=0.0, jaccard=0.0, hd95_mm=None)


def test_structures_that_miss_each_other_score_zero_with_a_distance():
    far = np.zeros((24, 24, 40), np.int32)
    near = far.copy()
    far[5:15, 5:15, 25:35] = near[5:15, 5:15, 5:15] = 1
    assert one(far, near) == Scores(dice=0.0, jaccard=0.0, hd95_mm=20.0)


def test_wrong_shape_and_undeclared_values_are_refused_together():
    with pytest.raises(ValidationErrors) as caught:
        score_case(cube(value=7), cube(shape=(24, 24, 25), value=-1), LABELS, (1, 1, 1), case="a")
    text = "\n".join(caught.value.problems)
    assert caught.value.about == "a" and len(caught.value.problems) == 3
    assert "(24, 24, 24)" in text and "(24, 24, 25)" in text and "[7]" in text and "[-1]" in text


def test_a_value_between_declared_ones_is_undeclared_too():
    with pytest.raises(ValidationErrors, match=r"\[2\]"):
        score_case(cube(value=2), cube(value=3), {"background": 0, "kidney": 1, "cyst": 3}, (1, 1, 1))


# Regions, and what was not annotated


NESTED = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}


def test_a_region_is_all_its_values_and_ignored_voxels_count_in_neither_map():
    reference = np.zeros((1, 6, 10), np.int32)
    reference[0, :, :4], reference[0, :2, :4], reference[0, :, 8:] = 1, 2, 3
    prediction = np.zeros_like(reference)
    prediction[0, :, 1:5], prediction[0, :3, 1:3] = 1, 2
    prediction[0, :, 8:] = 2  # where nobody knows
    found = score_case(prediction, reference, NESTED, (1, 1, 1)).classes
    assert list(found) == ["whole", "core"]
    # whole: 24 and 24 pixels, 18 of them common, a column off; core: 6 and 8 pixels, 4 of them common
    assert found["whole"] == Scores(dice=0.75, jaccard=0.6, hd95_mm=1.0)
    assert found["core"].dice == pytest.approx(2 * 4 / 14, abs=1e-6)
    prediction[0, :, 8:] = 0
    assert score_case(prediction, reference, NESTED, (1, 1, 1)).classes == found


def test_only_a_reference_may_ignore():
    reference = np.full((1, 4, 4), 3, np.int32)
    assert score_case(np.ones((1, 4, 4), np.int32), reference, NESTED, (1, 1, 1)).mean == Scores()
    with pytest.raises(ValidationErrors, match="the value 3, which only a reference may ignore"):
        score_case(reference, reference, NESTED, (1, 1, 1))
    with pytest.raises(
        ValidationErrors, match=r"the reference holds the values \[4\], but only background=0, whole=\[1, 2\]"
    ):
        score_case(np.zeros((1, 4, 4), np.int32), reference + 1, NESTED, (1, 1, 1))


# Means


def scored(case, site, kidney, tumour):
    classes = {"kidney": kidney, "tumour": tumour}
    return CaseScores(case=case, site=site, classes=classes, mean=Scores())


def full(dice, hd95=1.0):
    return Scores(dice=dice, jaccard=dice / (2 - dice), hd95_mm=hd95)


def test_means_leave_out_what_is_not_scored_and_weigh_structures_alike():
    cases = [
        scored("a", "alpha", full(0.8, 2.0), full(0.2, 9.0)),
        scored("b", "alpha", full(0.6, 4.0), Scores()),
        scored("c", "bravo", full(0.4, 6.0), Scores(dice=0.0, jaccard=0.0)),
    ]
    report = summarise(cases)
    assert report.classes["kidney"].dice == pytest.approx(0.6)
    assert report.classes["tumour"].dice == pytest.approx(0.1)
    assert report.classes["tumour"].hd95_mm == 9.0
    assert report.mean.dice == pytest.approx(0.35)  # the mean over cases would be 0.433
    assert report.mean.hd95_mm == pytest.approx(6.5)
    assert report.sites["alpha"].dice == pytest.approx((0.7 + 0.2) / 2)
    assert report.sites["bravo"].dice == pytest.approx(0.2)
    assert list(report.sites) == ["alpha", "bravo"]


def test_notes_count_what_the_means_leave_out():
    cases = [scored(c, None, full(0.5), Scores(dice=0.0, jaccard=0.0)) for c in "ab"]
    cases.append(scored("c", None, full(0.5), Scores()))
    notes = summarise(cases).notes
    assert len(notes) == 2
    assert notes[0].startswith("tumour: in 2 cases only one of prediction and reference")
    assert notes[1].startswith("tumour: in 1 case neither")
    assert summarise(cases[:0]).mean == Scores()


# Folders


@pytest.fixture
def folders(tmp_path):
    """Two volumes, with the files that `autofed predict` lays beside them."""
    predictions, labels = tmp_path / "predictions", tmp_path / "labels"
    for case, steps in (("one", 1), ("two", 3)):
        images.write(labels / f"{case}.nii.gz", cube().astype(np.uint8), volume())
        images.write(predictions / f"{case}.nii.gz", cube((steps, 0, 0)).astype(np.uint8), volume())
        for extra in ("entropy", "mutual_information"):
            images.write(predictions / f"{case}_{extra}.nii.gz", np.full((24, 24, 24), 0.5, np.float32), volume())
        (predictions / f"{case}.json").write_text("{}")
    (predictions / "pictures").mkdir()
    (labels / "readme.txt").write_text("not a label map")
    return predictions, labels


def test_a_folder_is_scored_case_by_case_and_site_by_site(folders):
    seen = []
    report = evaluate_folder(
        *folders, LABELS, sites={"one": "alpha", "two": "bravo"}, progress=lambda *step: seen.append(step)
    )
    assert [c.case for c in report.cases] == ["one", "two"]
    assert report.cases[0].classes["kidney"] == Scores(dice=0.9, jaccard=round(9 / 11, 6), hd95_mm=2.5)
    assert report.classes["kidney"].dice == pytest.approx(0.8)
    assert report.sites["bravo"].hd95_mm == pytest.approx(7.5)
    assert report.distance_unit == "mm" and not any("pixel" in note for note in report.notes)
    assert seen[-1] == ("evaluate", 2, 2)


@pytest.mark.slow
def test_worker_processes_give_the_same_report(folders):
    assert evaluate_folder(*folders, LABELS, processes=2) == evaluate_folder(*folders, LABELS)


def test_report_json_comes_back_as_it_went(folders, tmp_path):
    report = evaluate_folder(*folders, LABELS, sites={"one": "alpha", "two": "bravo"})
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    value = json.loads((tmp_path / "report.json").read_text())
    assert {"mean", "classes", "sites", "cases", "notes"} <= set(value)
    assert value["cases"][1]["classes"]["tumour"] == {"dice": None, "jaccard": None, "hd95_mm": None}


def test_pictures_are_scored_in_pixels_and_a_note_says_so(tmp_path):
    prediction, reference = np.zeros((2, 1, 30, 40), np.uint8)
    prediction[0, 5:15, 5:15] = reference[0, 9:19, 5:15] = 1
    images.write(tmp_path / "p" / "a.png", prediction, PICTURE)
    images.write(tmp_path / "p" / "a_entropy.png", np.full((1, 30, 40), 0.5), PICTURE)
    images.write(tmp_path / "l" / "a.png", reference, PICTURE)
    report = evaluate_folder(tmp_path / "p", tmp_path / "l", {"background": 0, "lesion": 1})
    assert report.mean.hd95_mm == 4.0
    assert report.distance_unit == "px" and "pixels" in report.notes[0]


def test_everything_wrong_with_two_folders_is_said_at_once(folders):
    predictions, labels = folders
    images.write(predictions / "extra.nii.gz", cube().astype(np.uint8), volume())
    images.write(labels / "missing.nii.gz", cube().astype(np.uint8), volume())
    for case, array, grid in (
        ("shape", cube(shape=(24, 24, 20)), volume()),
        ("value", cube(value=9), volume()),
        ("spacing", cube(), volume((2.5, 1.0, 0.6))),
    ):
        images.write(predictions / f"{case}.nii.gz", array.astype(np.uint8), grid)
        images.write(labels / f"{case}.nii.gz", cube().astype(np.uint8), volume())
    with pytest.raises(ValidationErrors) as caught:
        evaluate_folder(predictions, labels, LABELS)
    said = {problem.split(":")[0]: problem for problem in caught.value.problems}
    assert len(caught.value.problems) == 5
    assert "no reference" in said["extra"] and "no prediction" in said["missing"]
    assert "shape" in said["shape"] and "[9]" in said["value"] and "0.6" in said["spacing"]


def test_problems_of_voxels_alone_are_refused_too(folders):
    predictions, labels = folders
    images.write(predictions / "one.nii.gz", cube(value=9).astype(np.uint8), volume())
    with pytest.raises(ValidationErrors, match=r"one: the prediction holds the values \[9\]"):
        evaluate_folder(predictions, labels, LABELS)


def test_a_missing_prediction_does_not_silently_raise_the_mean(folders):
    predictions, labels = folders
    (predictions / "two.nii.gz").unlink()
    with pytest.raises(ValidationErrors, match="two: there is a reference, but no prediction"):
        evaluate_folder(predictions, labels, LABELS)


def test_folders_that_are_not_there_or_empty_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValidationErrors) as caught:
        evaluate_folder(tmp_path / "empty", tmp_path / "nowhere", LABELS)
    text = "\n".join(caught.value.problems)
    assert "nowhere: there is no such folder" in text and "empty holds no label maps" in text
    with pytest.raises(ValidationErrors, match="empty holds no label maps"):
        find_references(tmp_path / "empty")


@pytest.fixture
def by_site(folders):
    """The references of `folders`, each in the raw layout of a site."""
    predictions, labels = folders
    home = labels.parent / "sites"
    for case, site in (("one", "alpha"), ("two", "bravo")):
        (home / site / "labelsTr").mkdir(parents=True)
        (labels / f"{case}.nii.gz").rename(home / site / "labelsTr" / f"{case}.nii.gz")
    return predictions, home


def test_references_may_lie_with_their_sites(by_site):
    predictions, home = by_site
    references, sites = find_references(home)
    assert sites == {"one": "alpha", "two": "bravo"}
    report = evaluate_folder(predictions, home, LABELS)
    assert [c.site for c in report.cases] == ["alpha", "bravo"]
    assert report.sites["bravo"].dice == pytest.approx(0.7)
    assert evaluate_folder(predictions, references, LABELS, sites) == report
    assert find_references(home / "alpha") == ({"one": references["one"]}, {"one": "alpha"})


def test_a_case_of_two_sites_is_refused(by_site):
    _, home = by_site
    (home / "bravo" / "labelsTr" / "two.nii.gz").rename(home / "bravo" / "labelsTr" / "one.nii.gz")
    with pytest.raises(ValidationErrors, match="one: both alpha and bravo"):
        find_references(home)


def test_two_files_of_one_case_and_mixed_formats_are_refused(folders):
    predictions, labels = folders
    images.write(predictions / "one.mha", cube().astype(np.uint8), volume())
    for folder in folders:
        images.write(folder / "flat.png", np.ones((1, 8, 8), np.uint8), PICTURE)
    with pytest.raises(ValidationErrors) as caught:
        evaluate_folder(predictions, labels, LABELS)
    text = "\n".join(caught.value.problems)
    assert "one.mha" in text and "one.nii.gz" in text and "pictures and volumes are mixed (flat" in text


@pytest.mark.parametrize(
    "grid", [volume(origin=(40.0, 0.0, 0.0)), volume(direction=(-1.0, *UPRIGHT[1:]))], ids=["origin", "direction"]
)
def test_maps_that_claim_to_lie_elsewhere_are_noted(folders, grid):
    predictions, labels = folders
    assert not any("origin" in note for note in evaluate_folder(predictions, labels, LABELS).notes)
    images.write(predictions / "two.nii.gz", cube().astype(np.uint8), grid)
    notes = evaluate_folder(predictions, labels, LABELS).notes
    assert any("1 case (two)" in note and "origin or orientation" in note for note in notes)


def test_cases_of_no_known_site_are_noted(folders):
    report = evaluate_folder(*folders, LABELS, sites={"one": "alpha"})
    assert list(report.sites) == ["alpha"]
    assert "No site is known for 1 case; no site's mean holds them." in report.notes
