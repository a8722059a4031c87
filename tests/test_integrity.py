"""What the check of a site's data finds: one row for each thing that can be wrong, in the words that users read.

Each row damages a good site and measures it as `autofed plan` does. The rows are the table of docs/data-format.md.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image as Pillow

from autofed.data import images, open_dataset, open_datasets
from autofed.files import write_json
from autofed.fingerprints import measure
from tests.damage import declare, problems_of, rewrite
from tests.synthetic import TUMOUR, write_rgb

PAGE = Path(__file__).parent.parent / "docs" / "data-format.md"


def image_of(folder: Path, case: int = 1, channel: int = 0) -> Path:
    return the_image(folder / "imagesTr", f"alpha_{case:03d}_{channel:04d}.")


def label_of(folder: Path, case: int = 1) -> Path:
    return the_image(folder / "labelsTr", f"alpha_{case:03d}.")


def the_image(folder: Path, start: str) -> Path:
    (found,) = (p for p in folder.iterdir() if p.name.startswith(start) and images.ending_of(p))
    return found


def unchanged(array: np.ndarray) -> np.ndarray:
    return array


def spoil(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Put `value` into four voxels."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[0, :2, :2] = value
        return array

    return change


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def replace(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def stack(path: Path, *sizes: tuple[int, int]) -> None:
    first, *rest = [Pillow.new("L", size) for size in sizes]
    first.save(path, save_all=True, append_images=rest)


def flat_case(folder: Path) -> None:
    """Make case 1 a flat one."""
    for path in (image_of(folder), label_of(folder)):
        rewrite(path, lambda array: array[:1], dimension=2, origin=(0.0, 0.0), direction=(1.0, 0.0, 0.0, 1.0))


def shear(path: Path) -> None:
    volume = nibabel.load(path)
    affine = volume.affine @ np.array([[1, 0.4, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.asarray(volume.dataobj), affine), path)


def turn(path: Path) -> None:
    rewrite(path, unchanged, direction=(0.8, -0.6, 0.0, 0.6, 0.8, 0.0, 0.0, 0.0, 1.0))


def copy(path: Path, name: str) -> None:
    shutil.copy(path, path.with_name(name))


def copy_in_capitals(folder: Path) -> None:
    copy(image_of(folder), "Alpha_001_0000.nii.gz")
    declare(folder, numTraining=5)


def empty(folder: Path, files: str) -> None:
    for path in folder.glob(files):
        path.unlink()


NESTED = {"background": 0, "whole": [1, 2], "core": 2}
PLAIN = {"shape": (8, 10, 12)}
TWO = {"channels": ("T1", "T2"), **PLAIN}
FLAT = {"dimension": 2, "shape": (32, 40)}
JPEG = {**FLAT, "ending": ".jpg"}
STACK = {"ending": ".tif", "spacing_mm": (3.0, 1.0, 1.0), **PLAIN}

# What is wrong; a good site of four cases; the damage to it; the problems that come of it, in this order and no others:
# words of each.
# fmt: off
NAMES_AND_HEADERS = [
    ("a gap between labels", PLAIN, lambda f: declare(f, labels={"background": 0, "tumour": 2}),
     "`labels` must be background 0 and then 1, 2, ... without a gap; found background=0, tumour=2"),
    ("an ignore label that is not the highest", PLAIN, lambda f: declare(f, labels={**TUMOUR, "ignore": 255}),
     "`ignore` is 255; write 2, one more than the highest of all other values"),
    ("nothing but an ignore label", PLAIN, lambda f: declare(f, labels={"background": 0, "ignore": 1}),
     "`labels` must be background 0 and then 1, 2, ... without a gap; found background=0"),
    ("regions without an order", PLAIN, lambda f: declare(f, labels=NESTED),
     "`regions_class_order` must be one value for each of the regions whole, core, in this order and each once; "
     "found None; write [1, 2]"),
    ("regions painted with values that they do not have", PLAIN,
     lambda f: declare(f, labels=NESTED, regions_class_order=[2, 1]),
     "`regions_class_order` paints core with 1, which is none of its values [2]; write [1, 2]"),
    ("a region that another hides", PLAIN,
     lambda f: declare(f, labels={"background": 0, "core": 2, "whole": [1, 2]}, regions_class_order=[2, 1]),
     "core would be painted over by whole, which holds all of it; put whole before core in `labels` and in "
     "`regions_class_order`"),
    ("regions with odd values", PLAIN, lambda f: declare(f, labels={**NESTED, "core": [0, 2]}),
     "`labels` gives core the values [0, 2]; write whole numbers above 0, each once"),
    ("regions with a gap", PLAIN, lambda f: declare(f, labels={"background": 0, "whole": [1, 3]}),
     "the values of all regions must be 1, 2, ... without a gap; found background=0, whole=[1, 3]"),
    ("annotated that names nothing", PLAIN, lambda f: declare(f, annotated=[]),
     '`annotated` must list some of the structures tumour, for example ["tumour"]; found []; leave it out if all were'),
    ("annotated that names no structure", PLAIN, lambda f: declare(f, annotated=["tumour", "kidney", "tumour"]),
     "`annotated` names 'kidney', which is no structure; the structures are tumour",
     "`annotated` names tumour 2 times; keep one"),
    ("a file that is no image", PLAIN, lambda f: image_of(f).write_bytes(b"no image"),
     "alpha_001: alpha_001_0000.nii.gz: the volume cannot be read"),
    ("an empty file", PLAIN, lambda f: label_of(f).write_bytes(b""),
     "alpha_001: alpha_001.nii.gz: the volume cannot be read"),
    ("a picture cut off in its header", FLAT, lambda f: cut(image_of(f), 0.01),
     "alpha_001: alpha_001_0000.png: the picture cannot be read"),
    ("a TIFF volume that is cut off", STACK, lambda f: cut(image_of(f), 0.7),
     "alpha_001: alpha_001_0000.tif: the picture cannot be read"),
    ("a link that leads nowhere", PLAIN, lambda f: replace(image_of(f), f / "gone.nii.gz"),
     "alpha_001: alpha_001_0000.nii.gz: there is no such file"),
    ("a label of another shape", PLAIN, lambda f: rewrite(label_of(f), lambda a: a[:-1]),
     "alpha_001: alpha_001.nii.gz has the shape (7, 10, 12), alpha_001_0000.nii.gz (8, 10, 12); write both on one"),
    ("a label of another spacing", PLAIN, lambda f: rewrite(label_of(f), unchanged, spacing_mm=(3.0, 1.0, 1.0)),
     "alpha_001.nii.gz has the spacing (3.0, 1.0, 1.0) mm, alpha_001_0000.nii.gz (1.0, 1.0, 1.0) mm; write both on"),
    ("a label in another direction", PLAIN, lambda f: turn(label_of(f)),
     "alpha_001.nii.gz has the direction 0.8 -0.6 0 0.6 0.8 0 0 0 1, alpha_001_0000.nii.gz 1 0 0 0 1 0 0 0 1; write"),
    ("a label with sheared axes", PLAIN, lambda f: shear(label_of(f)),
     "alpha_001.nii.gz has the spacing",
     "alpha_001.nii.gz has the direction"),
    ("a channel of another shape", TWO, lambda f: rewrite(image_of(f, channel=1), lambda a: a[:, 1:]),
     "alpha_001_0001.nii.gz has the shape (8, 9, 12), alpha_001_0000.nii.gz (8, 10, 12); write both on one grid"),
    ("a channel of another direction", TWO, lambda f: turn(image_of(f, channel=1)),
     "alpha_001_0001.nii.gz has the direction"),
    ("a last channel that is missing", TWO, lambda f: image_of(f, channel=1).unlink(),
     "alpha_001: found 1 channels, dataset.json declares 2 (T1, T2)"),
    ("a first channel that is missing", TWO, lambda f: image_of(f).unlink(),
     "alpha_001: found files numbered [1]; expected 0 to 1",
     "alpha_001: found 1 channels, dataset.json declares 2 (T1, T2)"),
    ("a colour picture among grey ones", FLAT, lambda f: write_rgb(image_of(f), np.zeros((3, 32, 40), np.uint8)),
     "alpha_001: found 3 channels, dataset.json declares 1 (MRI)"),
    ("numTraining that is wrong", PLAIN, lambda f: declare(f, numTraining=5),
     "`numTraining` is 5, but imagesTr holds 4 cases, 4 of them with a label; correct the number, or look for what is"),
    ("one image with two endings", PLAIN, lambda f: copy(image_of(f), "alpha_001_0000.nii"),
     "alpha_001_0000.nii and alpha_001_0000.nii.gz, one name but for endings and capitals; keep one"),
    ("one label with two endings", JPEG, lambda f: copy(label_of(f), "alpha_001.jpg"),
     "labelsTr holds alpha_001.jpg and alpha_001.png, one name but for endings and capitals; keep one"),
    ("names that differ in capitals", PLAIN, copy_in_capitals,
     "imagesTr holds Alpha_001_0000.nii.gz and alpha_001_0000.nii.gz, one name but for endings and capitals"),
    ("two images for one label", PLAIN, lambda f: copy(image_of(f), "alpha_001.nii.gz"),
     "alpha_001: both alpha_001.nii.gz and alpha_001_0000.nii.gz are channel 0; remove one of them"),
    ("a label without an image", PLAIN, lambda f: copy(label_of(f), "alpha_009.nii.gz"),
     "labelsTr/alpha_009.nii.gz belongs to no image in imagesTr"),
    ("an empty site", PLAIN, lambda f: empty(f, "*Tr/*"),
     "imagesTr holds no .nii.gz files; expected files such as case_0000.nii.gz"),
    ("a site without labels", PLAIN, lambda f: empty(f, "labelsTr/*"),
     "labelsTr holds no .nii.gz files; at least one case needs a label"),
    ("a patient of a case that is not there", PLAIN, lambda f: declare(f, patients={"alpha_009": "p1"}),
     "`patients` names the case 'alpha_009', which is not in imagesTr"),
    ("a flat case among volumes", PLAIN, flat_case,
     "2D and 3D cases are mixed: alpha_001 are 2D, the others are not; make two datasets of them"),
    ("TIFF pages of different sizes", STACK, lambda f: stack(image_of(f), (12, 10), (6, 5)),
     "the pages of a volume are its slices, of one size, but page 0 is 10 x 12, page 1 is 5 x 6; remove previews"),
    ("the spacing of a TIFF volume that is none", STACK,
     lambda f: write_json(f / "imagesTr" / "alpha_001.json", {"spacing": [3, 1]}),
     "alpha_001.json: `spacing` is [3, 1]; expected mm from voxel to voxel, [z, y, x], as [3, 1, 1]"),
    ("a TIFF volume whose spacing only the label has", STACK, lambda f: empty(f, "imagesTr/alpha_001.json"),
     "alpha_001.tif has the spacing (3.0, 1.0, 1.0) mm, alpha_001_0000.tif (1.0, 1.0, 1.0) mm; write both on one grid",
     "the spacing of alpha_001 is not known, that of other cases is; write alpha_001.json beside it, like"),
    ("a TIFF volume without a spacing among others", STACK, lambda f: empty(f, "*Tr/alpha_001.json"),
     "the spacing of alpha_001 is not known, that of other cases is; write alpha_001.json beside it, like"),
]

VOXELS = [
    ("a volume that is cut off", PLAIN, lambda f: cut(image_of(f), 0.9),
     "alpha/alpha_001: imagesTr: alpha_001_0000.nii.gz: the volume is not whole"),
    ("a label that is cut off", PLAIN, lambda f: cut(label_of(f), 0.9),
     "alpha/alpha_001: alpha_001.nii.gz: the volume is not whole"),
    ("a picture that is cut off", FLAT, lambda f: cut(image_of(f), 0.7),
     "alpha_001_0000.png: the picture cannot be read"),
    ("NaN", PLAIN, lambda f: rewrite(image_of(f), spoil(np.nan)),
     "alpha/alpha_001: 4 voxels of channel 0 (MRI) are NaN or infinite; replace them before planning"),
    ("infinity in a second channel", TWO, lambda f: rewrite(image_of(f, channel=1), spoil(-np.inf)),
     "alpha/alpha_001: 4 voxels of channel 1 (T2) are NaN or infinite; replace them before planning"),
    ("NaN in a TIFF volume", STACK, lambda f: rewrite(image_of(f), spoil(np.nan)),
     "alpha/alpha_001: 4 voxels of channel 0 (MRI) are NaN or infinite; replace them before planning"),
    ("an image that is constant", PLAIN, lambda f: rewrite(image_of(f), lambda a: np.full_like(a, 7)),
     "alpha/alpha_001: the image is 7 everywhere; export it again, or take the case out"),
    ("values that are not declared", PLAIN, lambda f: rewrite(label_of(f), lambda a: (a * 7).astype(np.uint8)),
     "the label holds the values [7], but dataset.json declares only background=0, tumour=1"),
    ("many values that are not declared", PLAIN,
     lambda f: rewrite(label_of(f), lambda a: np.arange(a.size, dtype=np.uint8).reshape(a.shape) % 20),
     "the label holds the values [2, 3, 4, 5, 6, 7, 8, 9, 10, 11] and 8 more, but dataset.json declares only"),
    ("values of a structure that was not annotated", PLAIN,
     lambda f: [declare(f, labels={"background": 0, "tumour": 1, "organ": 2}, annotated=["organ"]),
                *[empty(f, f"labelsTr/alpha_00{n}*") for n in (0, 2, 3)]],
     "the label holds the values [1] (tumour), but `annotated` in dataset.json names only organ; add what was"),
    ("a label with fractions", PLAIN, lambda f: rewrite(label_of(f), lambda a: a * 0.5),
     "alpha_001.nii.gz: a label map holds whole numbers only, but this file has fractions or NaN; write the numbers"),
    ("a label with NaN", PLAIN, lambda f: rewrite(label_of(f), spoil(np.nan)),
     "alpha_001.nii.gz: a label map holds whole numbers only, but this file has fractions or NaN; write the numbers"),
    ("a label in colours", FLAT, lambda f: write_rgb(label_of(f), np.zeros((3, 32, 40), np.uint8)),
     "alpha_001.png: a label map has one channel, but this file has 3"),
    ("no foreground at the whole site", PLAIN,
     lambda f: [rewrite(label_of(f, case), np.zeros_like) for case in range(4)],
     "no label map holds any tumour; look whether labelsTr is right, or leave the site out; if all were looked for and "
     'none was there, say so in dataset.json: "annotated": ["tumour"]'),
]
# fmt: on


def rows(table: list[tuple]) -> Callable:
    """The table as parameters of a test: site, damage, the words of each problem."""
    return pytest.mark.parametrize(
        ("site", "damage", "said"), [pytest.param(*row[1:3], row[3:], id=row[0]) for row in table]
    )


def measured(folder: Path) -> object:
    return measure(open_dataset(folder))


@rows([*NAMES_AND_HEADERS, *VOXELS])
def test_what_is_wrong_is_said(make_site, site, damage, said):
    folder = make_site(**site)
    damage(folder)
    found = problems_of(measured, folder)
    assert len(found) == len(said), found
    assert all(words in problem for words, problem in zip(said, found, strict=True)), found


@rows(NAMES_AND_HEADERS)
def test_what_names_and_headers_give_away_is_said_before_voxels_are_read(make_site, monkeypatch, site, damage, said):
    folder = make_site(**site)
    damage(folder)
    monkeypatch.setattr(images, "read", None)
    assert len(problems_of(open_dataset, folder)) == len(said)


def test_all_that_names_and_headers_give_away_comes_at_once(make_site):
    folder = make_site(cases=5, **PLAIN)
    (folder / "imagesTr" / "alpha_000_0000.nii.gz").unlink()
    rewrite(label_of(folder), lambda a: a[:-1])
    image_of(folder, case=2).write_bytes(b"no image")
    label_of(folder, case=2).write_bytes(b"no label")
    declare(folder, patients={"nobody": "p1"})
    expected = [
        "labelsTr/alpha_000.nii.gz belongs to no image",
        "`numTraining` is 5",
        "`patients` names the case 'nobody'",
        "alpha_001: alpha_001.nii.gz has the shape",
        "alpha_002: alpha_002_0000.nii.gz: the volume cannot be read",
        "alpha_002: alpha_002.nii.gz: the volume cannot be read",
    ]
    found = problems_of(open_dataset, folder)
    assert len(found) == len(expected), found
    assert all(problem.startswith(words) for words, problem in zip(expected, found, strict=True)), found


@pytest.mark.parametrize("processes", [1, 2])
def test_all_that_voxels_give_away_comes_at_once(make_site, processes):
    folder = make_site(cases=5, **PLAIN)
    rewrite(image_of(folder, case=0), spoil(np.nan))
    rewrite(label_of(folder, case=0), lambda a: a + 1)
    cut(image_of(folder, case=1), 0.9)
    rewrite(image_of(folder, case=3), np.zeros_like)
    dataset = open_dataset(folder)
    found = problems_of(lambda: measure(dataset, processes=processes))
    assert [re.sub(" .*", "", problem) for problem in found] == [f"alpha/alpha_{n:03d}:" for n in (0, 0, 1, 3)]


def test_all_that_is_wrong_at_all_sites_comes_at_once(make_site):
    one, two = make_site("alpha", **PLAIN), make_site("bravo", **PLAIN)
    image_of(one).write_bytes(b"no image")
    declare(two, numTraining=9)
    found = problems_of(open_datasets, [one, two])
    assert [problem.split(": ")[0] for problem in found] == [str(one), str(two)]


@rows([*NAMES_AND_HEADERS, *VOXELS])
def test_the_page_for_users_has_the_message(site, damage, said):
    page = PAGE.read_text(encoding="utf-8")
    assert [words for words in said if words not in page] == []


# What is well


def float_label(folder: Path) -> None:
    rewrite(label_of(folder), lambda a: a.astype(np.float32))


def empty_mask(folder: Path) -> None:
    rewrite(label_of(folder), np.zeros_like)


def constant_channel(folder: Path) -> None:
    rewrite(image_of(folder, channel=1), np.zeros_like)


def fractions_beside_integers(folder: Path) -> None:
    rewrite(image_of(folder), lambda a: a.astype(np.float32) / 3)
    rewrite(image_of(folder, case=2), lambda a: a.astype(np.uint8))


def other_origin(folder: Path) -> None:
    rewrite(label_of(folder), unchanged, origin=(1.0, 2.0, 3.0))


def ignored_parts(folder: Path) -> None:
    declare(folder, labels={**TUMOUR, "ignore": 2})
    rewrite(label_of(folder), lambda a: np.where(np.arange(a.shape[-1]) > 6, 2, a).astype(np.uint8))
    rewrite(label_of(folder, case=2), lambda a: np.full_like(a, 2))


def nothing_anywhere(folder: Path) -> None:
    declare(folder, annotated=["tumour"])
    for case in range(4):
        rewrite(label_of(folder, case), np.zeros_like)


def values_of_regions(folder: Path) -> None:
    declare(folder, labels=NESTED, regions_class_order=[1, 2])
    rewrite(label_of(folder), lambda a: 2 * a)


def no_numtraining(folder: Path) -> None:
    path = folder / "dataset.json"
    write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "numTraining"})


def labelled_numtraining(folder: Path) -> None:
    label_of(folder).unlink()
    declare(folder, numTraining=3)


def strangers(folder: Path) -> None:
    """Files that are no images of this dataset."""
    for name in ("alpha_001.json", "notes.txt", "overview.png", "._alpha_001_0000.nii.gz"):
        (folder / "imagesTr" / name).write_text("not for autofed")


def no_spacings(folder: Path) -> None:
    empty(folder, "*Tr/*.json")


@pytest.mark.parametrize(
    ("change", "site"),
    [
        (float_label, {}),
        (empty_mask, {}),
        (constant_channel, TWO),
        (fractions_beside_integers, {}),
        (other_origin, {}),
        (ignored_parts, {}),
        (nothing_anywhere, {}),
        (values_of_regions, {}),
        (no_numtraining, {}),
        (labelled_numtraining, {}),
        (strangers, {}),
        (no_spacings, STACK),
        (unchanged, STACK),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_problem(make_site, change, site):
    folder = make_site(**site)
    before = len(open_dataset(folder).cases)
    change(folder)
    assert measure(open_dataset(folder)).cases == before == 4


def test_eight_bits_at_one_site_and_sixteen_at_the_other(make_site):
    eight, sixteen = make_site("alpha", **FLAT), make_site("bravo", **FLAT)
    for path in (sixteen / "imagesTr").iterdir():
        rewrite(path, lambda a: a.astype(np.uint16) * 257)
    one, two = (measure(dataset) for dataset in open_datasets([eight, sixteen]))
    assert one.declaration == two.declaration
    brightest = [np.asarray(Pillow.open(next((site / "imagesTr").iterdir()))).max() for site in (eight, sixteen)]
    assert brightest[0] <= 255 < brightest[1]


def test_a_tiff_site_is_what_it_would_be_as_nifti(make_site, tmp_path):
    tiff = open_dataset(make_site("alpha", **STACK))
    nifti = open_dataset(make_site("copies/alpha", spacing_mm=(3.0, 1.0, 1.0), **PLAIN))
    assert measure(tiff) == measure(nifti)
    one, two = tiff.read("alpha_001"), nifti.read("alpha_001")
    assert np.array_equal(one.image, two.image) and np.array_equal(one.label, two.label)


def test_the_digest_of_a_tiff_site_notices_another_spacing(make_site):
    folder = make_site(**STACK)
    before = open_dataset(folder).raw_digest()
    for part in ("imagesTr", "labelsTr"):
        write_json(folder / part / "alpha_001.json", {"spacing": [3.5, 1, 1]})
    assert open_dataset(folder).raw_digest() != before
