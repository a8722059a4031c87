from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from autofed.data import (
    Declaration,
    disagreements,
    find_images,
    open_dataset,
    open_datasets,
    read_channels,
    site_name_problem,
)
from autofed.data.labels import declared_labels
from autofed.errors import ValidationErrors
from tests.damage import declare, problems_of, rewrite
from tests.synthetic import ORGAN_AND_TUMOUR

DATA = Path(__file__).parent / "data"


def the_problem(verb, *arguments) -> str:
    found = problems_of(verb, *arguments)
    assert len(found) == 1, found
    return found[0]


# What is well


def test_a_volume_site_is_read(make_site):
    folder = make_site("alpha", cases=3, channels=("T1", "T2"), labels=ORGAN_AND_TUMOUR, spacing_mm=(3.0, 1.0, 0.5))
    dataset = open_dataset(folder)
    assert dataset.name == "alpha"
    assert dataset.channels == ("T1", "T2")
    assert dict(dataset.labels) == ORGAN_AND_TUMOUR
    assert list(dataset.cases) == ["alpha_000", "alpha_001", "alpha_002"]
    case = dataset.read("alpha_001")
    assert (case.id, case.patient) == ("alpha_001", "alpha_001")
    assert case.image.dtype == np.float32
    assert case.label.dtype == np.int32
    assert case.image.shape == (2, *case.label.shape)
    assert set(np.unique(case.label)) == {0, 1, 2}
    assert case.spacing_mm == (3.0, 1.0, 0.5)
    assert case.geometry.origin == (-10.0, 20.5, 3.25)
    assert dataset.declaration() == Declaration(channels=("T1", "T2"), labels=ORGAN_AND_TUMOUR, dimension=3)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd", ".gipl", ".tif", ".tiff"])
def test_a_volume_site_of_any_format_is_read(make_site, ending):
    folder = make_site("bravo", ending=ending, channels=("T1", "T2"), spacing_mm=(3.0, 1.0, 0.5))
    case = open_dataset(folder).read("bravo_000")
    assert case.image.shape == (2, *case.label.shape)
    assert case.spacing_mm == (3.0, 1.0, 0.5)
    assert open_dataset(folder).declaration().dimension == 3
    assert list(find_images(folder / "imagesTr", 2)) == [f"bravo_{i:03d}" for i in range(4)]


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".tif", ".nii.gz", ".mha"])
def test_a_flat_site_is_read(make_site, ending):
    dataset = open_dataset(make_site("bravo", dimension=2, ending=ending))
    case = dataset.read("bravo_000")
    assert case.image.shape == (1, *case.label.shape)
    assert case.label.shape[0] == 1
    assert dataset.declaration().dimension == 2
    assert dataset.cases["bravo_000"].label.suffix == (".png" if ending == ".jpg" else "." + ending.split(".")[-1])


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_a_colour_picture_holds_three_channels(make_site, ending):
    dataset = open_dataset(make_site("alpha", dimension=2, channels="RGB", ending=ending))
    assert [len(files.images) for files in dataset.cases.values()] == [1] * 4
    assert dataset.read("alpha_000").image.shape[0] == 3


def test_one_channel_needs_no_number(make_site):
    folder = make_site()
    for path in sorted((folder / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace("_0000.", ".")))
    assert list(open_dataset(folder).cases) == [f"alpha_{i:03d}" for i in range(4)]


def test_four_digits_are_a_case_where_no_file_is_a_first_channel(make_site):
    folder = make_site(cases=2)
    for part in ("imagesTr", "labelsTr"):
        for number, path in enumerate(sorted((folder / part).iterdir()), start=1):
            path.rename(path.with_name(f"scan_{number:04d}.nii.gz"))
    dataset = open_dataset(folder)
    assert list(dataset.cases) == ["scan_0001", "scan_0002"]
    assert all(files.label is not None for files in dataset.cases.values())


@pytest.mark.parametrize(("ending", "written"), [(".png", ".PNG"), (".jpg", ".JPG"), (".jpg", ".Jpg")])
def test_endings_may_be_in_capitals(make_site, ending, written):
    folder = make_site(dimension=2, ending=ending, cases=2)
    for path in [*(folder / "imagesTr").iterdir(), *(folder / "labelsTr").iterdir()]:
        path.rename(path.with_name(path.name.replace(ending, written).replace(".png", ".PNG")))
    for declared in (written, ending):
        declare(folder, file_ending=declared)
        dataset = open_dataset(folder)
        assert list(dataset.cases) == ["alpha_000", "alpha_001"]
        assert dataset.read("alpha_001").label.any()
    assert list(find_images(folder / "imagesTr", 1)) == ["alpha_000", "alpha_001"]


def test_two_label_maps_of_one_case(make_site):
    folder = make_site(dimension=2)
    shutil.copy(folder / "labelsTr" / "alpha_000.png", folder / "labelsTr" / "alpha_000.PNG")
    assert the_problem(open_dataset, folder).startswith("labelsTr holds alpha_000.PNG and alpha_000.png, one name but")


def test_unlabelled_cases_are_allowed(make_site):
    dataset = open_dataset(make_site(cases=3, unlabelled=2))
    assert [files.label is None for files in dataset.cases.values()] == [False, True, True]
    assert dataset.read("alpha_002").label is None


def test_patients_are_named_or_their_own(make_site):
    dataset = open_dataset(make_site(patients={"alpha_000": "p1", "alpha_001": "p1"}))
    assert [dataset.patient(case) for case in dataset.cases] == ["p1", "p1", "alpha_002", "alpha_003"]
    assert dataset.read("alpha_001").patient == "p1"
    dataset = open_dataset(make_site("bravo", cases=5, patients=2))
    assert len({dataset.patient(case) for case in dataset.cases}) == 3


def test_the_older_key_for_channels_is_read(make_site):
    folder = make_site()
    declare(folder, channel_names=..., modality={"0": "CT"})
    assert open_dataset(folder).channels == ("CT",)


def test_channels_are_in_the_order_of_their_numbers(make_site):
    names = [f"c{i}" for i in range(11)]
    dataset = open_dataset(make_site(cases=1, channels=names, shape=(2, 4, 4)))
    assert dataset.channels == tuple(names)
    assert [p.name[-11:-7] for p in dataset.cases["alpha_000"].images] == [f"{i:04d}" for i in range(11)]


def test_labels_may_be_declared_in_any_order(make_site):
    one, two = make_site("alpha", labels=ORGAN_AND_TUMOUR), make_site("bravo", labels=ORGAN_AND_TUMOUR)
    declare(two, labels={"tumour": 2, "background": 0, "organ": 1})
    assert [list(d.labels) for d in open_datasets([one, two])] == [["background", "organ", "tumour"]] * 2


def test_what_file_systems_leave_behind_is_passed_over(make_site):
    folder = make_site()
    for name in ("imagesTr/._alpha_000_0000.nii.gz", "labelsTr/._alpha_000.nii.gz", "imagesTr/.DS_Store"):
        (folder / name).write_bytes(b"left behind")
    assert len(open_dataset(folder).cases) == 4


def test_spacings_may_differ_in_the_last_digits(make_site):
    folder = make_site(spacing_mm=(3.0, 0.7, 0.7))
    rewrite(folder / "labelsTr" / "alpha_000.nii.gz", lambda a: a, spacing_mm=(3.0001, 0.7, 0.69999))
    assert open_dataset(folder).read("alpha_000").label is not None


def test_the_raw_digest_notices_every_change(make_site, tmp_path):
    folder = make_site()
    digests = [open_dataset(folder).raw_digest()]
    assert open_dataset(folder).raw_digest() == digests[0]
    rewrite(folder / "imagesTr" / "alpha_001_0000.nii.gz", lambda a: a + 1)
    digests.append(open_dataset(folder).raw_digest())
    (folder / "labelsTr" / "alpha_003.nii.gz").unlink()
    digests.append(open_dataset(folder).raw_digest())
    declare(folder, patients={"alpha_000": "p1"})
    digests.append(open_dataset(folder).raw_digest())
    assert len(set(digests)) == 4


@pytest.mark.parametrize("federation", ["hippocampus", "nuclei"])
def test_the_shipped_pictures_are_well(federation):
    datasets = open_datasets(sorted((DATA / federation / "sites").iterdir()))
    for dataset in datasets:
        assert json.loads((dataset.folder / "dataset.json").read_text())["numTraining"] == len(dataset.cases)
        for case in dataset.cases:
            assert dataset.read(case).label.any()
    test = DATA / federation / "test"
    cases = find_images(test / "imagesTs", len(datasets[0].channels))
    assert sorted(cases) == sorted(p.name.split(".")[0] for p in (test / "labelsTs").iterdir())
    assert not set(cases) & {case for dataset in datasets for case in dataset.cases}


# dataset.json


def test_an_empty_folder(tmp_path):
    said = the_problem(open_dataset, tmp_path)
    assert said == "there is no dataset.json; expected nnU-Net's raw layout (dataset.json, imagesTr, labelsTr)"


def test_no_folder(tmp_path):
    assert the_problem(open_dataset, tmp_path / "nowhere") == "there is no such folder"


def test_the_parent_folder_hints_at_the_sites_in_it(make_site, tmp_path):
    make_site("alpha")
    make_site("bravo")
    assert the_problem(open_dataset, tmp_path).endswith("did you mean the folders in it (alpha, bravo)?")


@pytest.mark.parametrize("content", ["{", "[1, 2]", "null"])
def test_a_broken_dataset_json(make_site, content):
    folder = make_site()
    (folder / "dataset.json").write_text(content)
    with pytest.raises(ValidationErrors) as caught:
        open_dataset(folder)
    assert caught.value.about == str(folder / "dataset.json")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"channel_names": ...}, "`channel_names` must map"),
        ({"channel_names": {}}, "`channel_names` must map"),
        ({"channel_names": ["CT"]}, "`channel_names` must map"),
        ({"channel_names": {"1": "CT"}}, "`channel_names` must map"),
        ({"labels": ...}, "`labels` must map"),
        ({"labels": ["background", "tumour"]}, "`labels` must map"),
        ({"labels": {"background": 0}}, "background 0 and then 1, 2"),
        (
            {"labels": {"background": 0, "organ": 1, "tumour": 3}},
            "without a gap; found background=0, organ=1, tumour=3",
        ),
        ({"labels": {"background": 0, "organ": 1, "tumour": 1}}, "without a gap"),
        ({"labels": {"organ": 0, "tumour": 1}}, "must be background 0"),
        ({"labels": {"0": "background", "1": "tumour"}}, "must be background 0"),
        ({"labels": {"background": 0, "tumour": "1"}}, "must be background 0"),
        ({"labels": {"background": 0, "tumour": None}}, "must be background 0"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "found None; write [1, 2]"),
        ({"labels": {"background": 0, "tumour": 1, "ignore": 3}}, "`ignore` is 3; write 2"),
        ({"labels": {"background": 0, "ignore": 1}}, "background 0 and then 1, 2"),
        ({"file_ending": ...}, "`file_ending` is None; expected one of .bmp"),
        ({"file_ending": "nii.gz"}, "`file_ending` is 'nii.gz'; expected one of"),
        ({"file_ending": ".dcm"}, "expected one of"),
        ({"patients": ["p1"]}, "`patients` must map"),
        ({"patients": {"alpha_000": 7}}, "`patients` must map"),
        ({"patients": None}, "`patients` must map"),
        ({"patients": {"nobody": "p1"}}, "`patients` names the case 'nobody', which is not in imagesTr"),
    ],
)
def test_a_wrong_declaration(make_site, changed, said):
    folder = make_site()
    declare(folder, **changed)
    assert said in the_problem(open_dataset, folder)


def test_all_that_is_wrong_in_a_declaration_comes_at_once(make_site):
    folder = make_site()
    declare(folder, channel_names=..., labels={"background": 1}, file_ending=".doc", patients=3)
    assert len(problems_of(open_dataset, folder)) == 4


@pytest.mark.parametrize("name", [".alpha", "-alpha", "al:pha", "alpha.", "pooled", "global", "Pooled", "a" * 65])
def test_a_site_of_an_odd_name(make_site, name):
    folder = make_site(cases=1)
    said = the_problem(open_dataset, folder.rename(folder.with_name(name)))
    assert repr(name) in said and said == site_name_problem(name)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../a", "a\\b", "a\nb", "a\n", " a"])
def test_a_site_name_leads_nowhere(name):
    assert "is called" in site_name_problem(name)


@pytest.mark.parametrize("name", ["alpha", "a", "7", "St. Mary-2 north_wing", "K\u00f6ln", "\u6771\u4eac"])
def test_names_that_hospitals_have(name):
    assert site_name_problem(name) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "`labels` must map"),
        ("[]", "expected an object with `labels`, found list"),
        ("null", "found NoneType"),
        ('{"labels": null}', "`labels` must map"),
        ('{"labels": ["background", "tumour"]}', "`labels` must map"),
        ('{"labels": {"background": 0, "whole": [1, 2]}}', "regions"),
        ('{"labels": {"background": false, "tumour": true}}', "must be background 0"),
    ],
)
def test_labels_that_are_declared_wrongly(tmp_path, content, said):
    (tmp_path / "dataset.json").write_text(content)
    assert said in the_problem(declared_labels, tmp_path / "dataset.json")


def test_labels_that_are_declared_well(make_site):
    assert declared_labels(make_site(labels=ORGAN_AND_TUMOUR) / "dataset.json") == ORGAN_AND_TUMOUR


# Files


def test_images_of_another_ending(make_site):
    folder = make_site()
    declare(folder, file_ending=".nrrd")
    assert "imagesTr holds no .nrrd files" in the_problem(open_dataset, folder)


@pytest.mark.parametrize("ending", [".nii.gz", ".jpg"])
def test_no_labels(make_site, ending):
    folder = make_site(dimension=2, ending=ending, unlabelled=4)
    label = ".png" if ending == ".jpg" else ending
    assert the_problem(open_dataset, folder) == f"labelsTr holds no {label} files; at least one case needs a label"


@pytest.mark.parametrize(
    ("part", "change", "geometry"),
    [
        ("shape", lambda a: a[:, 1:], {}),
        ("spacing", lambda a: a, {"spacing_mm": (2.0, 1.0, 1.0)}),
        ("direction", lambda a: a, {"direction": (0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0)}),
    ],
)
def test_channels_of_a_new_scan_that_do_not_lie_on_each_other(make_site, part, change, geometry):
    folder = make_site(channels=("T1", "T2"), shape=(8, 10, 12))
    path = folder / "imagesTr" / "alpha_001_0001.nii.gz"
    rewrite(path, change, **geometry)
    said = the_problem(read_channels, (path.with_name("alpha_001_0000.nii.gz"), path))
    assert said.startswith(f"alpha_001_0001.nii.gz has the {part} ")


# Voxels


def test_all_that_is_wrong_in_a_case_comes_at_once(make_site):
    folder = make_site()
    rewrite(folder / "imagesTr" / "alpha_001_0000.nii.gz", lambda a: np.full_like(a, np.nan))
    rewrite(folder / "labelsTr" / "alpha_001.nii.gz", lambda a: a + 1)
    assert len(problems_of(open_dataset(folder).read, "alpha_001")) == 2


def test_an_image_that_cannot_be_read_does_not_hide_a_label_that_is_wrong(make_site):
    folder = make_site(channels=("T1", "T2"))
    dataset = open_dataset(folder)
    for channel in ("0000", "0001"):
        path = folder / "imagesTr" / f"alpha_001_{channel}.nii.gz"
        path.write_bytes(path.read_bytes()[:-500])
    rewrite(folder / "labelsTr" / "alpha_001.nii.gz", lambda a: np.where(a == 1, 7, a).astype(np.uint8))
    one, two, label = problems_of(dataset.read, "alpha_001")
    assert one.startswith("imagesTr: alpha_001_0000.nii.gz: ") and two.startswith("imagesTr: alpha_001_0001.nii.gz: ")
    assert label == "the label holds the values [7], but dataset.json declares only background=0, tumour=1"
    (folder / "labelsTr" / "alpha_001.nii.gz").write_bytes(b"no label")
    assert problems_of(dataset.read, "alpha_001")[2].startswith("alpha_001.nii.gz: ")


# Several sites


def test_sites_that_agree(make_site):
    datasets = open_datasets([make_site("bravo"), make_site("alpha", cases=2)])
    assert [d.name for d in datasets] == ["bravo", "alpha"]


def test_sites_that_disagree_are_named_with_what_they_say(make_site):
    sites = [
        make_site("alpha"),
        make_site("bravo"),
        make_site("charlie", channels=("CT",), labels=ORGAN_AND_TUMOUR),
        make_site("delta", dimension=2, ending=".nii.gz"),
    ]
    channels, labels, dimension = problems_of(open_datasets, sites)
    assert "disagree on channels (alpha, bravo, delta: 1 (MRI); charlie: 1 (CT))" in channels
    assert "disagree on labels (alpha, bravo, delta: background=0, tumour=1; charlie: background=0, organ=1" in labels
    assert "disagree on dimension (alpha, bravo, charlie: 3D; delta: 2D)" in dimension


def test_the_same_names_with_other_values_disagree():
    one = Declaration(channels=("CT",), labels={"background": 0, "organ": 1, "tumour": 2}, dimension=3)
    two = one.model_copy(update={"labels": {"background": 0, "tumour": 1, "organ": 2}})
    assert disagreements({"alpha": one, "bravo": one}) == []
    assert len(disagreements({"alpha": one, "bravo": two})) == 1


def test_regions_and_the_order_they_are_painted_in_must_agree():
    whole, core, rim = ("whole", [1, 2, 3]), ("core", [1, 2]), ("rim", [2, 3])
    one = Declaration(channels=("CT",), labels={"background": 0, **dict([whole, core, rim])}, dimension=3,
                      regions_class_order=(2, 1, 3))  # fmt: skip
    same = one.model_copy(update={"labels": Declaration(channels=("CT",), dimension=3, labels={
        **dict([whole, core, rim]), "background": [0]}).labels})  # fmt: skip
    moved = one.model_copy(update={"labels": {"background": 0, **dict([whole, rim, core])}})
    painted = one.model_copy(update={"regions_class_order": (3, 1, 2)})
    assert disagreements({"alpha": one, "bravo": same}) == []
    for other in (moved, painted):
        (said,) = disagreements({"alpha": one, "bravo": other})
        assert "disagree on labels (alpha: background=0, whole=[1, 2, 3], core=[1, 2], rim=[2, 3], painted 2, 1" in said


def test_two_sites_of_one_name(make_site):
    said = the_problem(open_datasets, [make_site("north/alpha"), make_site("south/alpha"), make_site("bravo")])
    assert said == "two sites are called 'alpha'; rename one of the folders"
    assert the_problem(open_datasets, [make_site("north/alpha"), make_site("south/Alpha")]) == said


def test_the_problems_of_all_sites_come_at_once(make_site, tmp_path):
    alpha, bravo, charlie = make_site("alpha"), make_site("bravo"), make_site("charlie")
    (alpha / "imagesTr" / "alpha_000_0000.nii.gz").write_bytes(b"no image")
    declare(bravo, labels={"background": 0, "tumour": 2})
    found = problems_of(open_datasets, [alpha, bravo, charlie, tmp_path / "delta", make_site("echo", channels=("CT",))])
    assert [f.startswith(str(p)) for f, p in zip(found, (alpha, bravo, tmp_path / "delta"), strict=False)] == [True] * 3
    assert "charlie: 1 (MRI); echo: 1 (CT)" in found[3]
    assert len(found) == 4


# New scans


def test_new_scans_are_found(make_site):
    folder = make_site(channels=("T1", "T2"), cases=3, part="Ts")
    found = find_images(folder / "imagesTs", 2)
    assert list(found) == ["alpha_000", "alpha_001", "alpha_002"]
    assert [len(files.images) for files in found.values()] == [2, 2, 2]
    assert all(files.label is None for files in found.values())


def test_one_new_scan_is_a_folder_of_one(make_site):
    path = make_site() / "imagesTr" / "alpha_001_0000.nii.gz"
    assert find_images(path, 1)["alpha_001"].images == (path,)


def test_new_scans_that_are_numbered_are_cases_and_no_channels(make_site):
    folder = make_site(cases=2, part="Ts") / "imagesTs"
    for number, path in enumerate(sorted(folder.iterdir()), start=1):
        path.rename(folder / f"scan_{number:04d}.nii.gz")
    found = find_images(folder, 1)
    assert {case: files.images for case, files in found.items()} == {
        f"scan_{n:04d}": (folder / f"scan_{n:04d}.nii.gz",) for n in (1, 2)
    }


def test_new_scans_may_have_different_endings(make_site, tmp_path):
    (tmp_path / "new").mkdir()
    for ending in (".nii.gz", ".mha"):
        site = make_site(ending[1:4], ending=ending, cases=1)
        for path in (site / "imagesTr").iterdir():
            shutil.copy(path, tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("bring milk")
    assert len(find_images(tmp_path / "new", 1)) == 2


@pytest.mark.parametrize("exists", [True, False])
def test_no_new_scans(tmp_path, exists):
    folder = tmp_path / "new"
    if exists:
        folder.mkdir()
    assert "no images were found" in the_problem(find_images, folder, 1)


def test_new_scans_with_channels_missing_are_all_named(make_site):
    folder = make_site(channels=("T1", "T2"), cases=4, part="Ts") / "imagesTs"
    (folder / "alpha_000_0001.nii.gz").unlink()
    (folder / "alpha_001_0000.nii.gz").unlink()
    (folder / "alpha_002_0000.nii.gz").write_bytes(b"no image")
    found = "\n".join(problems_of(find_images, folder, 2))
    assert "alpha_000: found 1 channels, but the plan has 2" in found
    assert "alpha_001: found files numbered [1]; expected 0 to 1" in found
    assert "alpha_002: alpha_002_0000.nii.gz: the volume cannot be read" in found
    assert "alpha_003" not in found
