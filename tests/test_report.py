"""Pictures show what they say, and the page stands alone, hides nothing and lets no name become markup."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image as Pillow

from autofed.data import images
from autofed.data.images import Geometry
from autofed.errors import ValidationErrors
from autofed.inference.scores import CaseScores, Report, Scores, evaluate_folder, summarise
from autofed.report import curves, draw_predictions, overlay, page, ranked
from autofed.report.drawing import LINES

LABELS = {"background": 0, "kidney": 1, "tumour": 2}
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
VOLUME = Geometry(3, (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), UPRIGHT)
PICTURE = Geometry(2, (999.0, 1.0, 1.0))
SKY, ORANGE = ((0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00))


def pixels(png):
    """A PNG as float (rows, columns, 3); fails if the bytes are no picture."""
    with Pillow.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"), dtype=float)


def near(array, colour, tolerance=12):
    return (np.abs(array - np.array(colour, dtype=float)) <= tolerance).all(axis=-1)


def phantom(shape=(10, 30, 40)):
    """A dark volume with a kidney and a small tumour beside it."""
    label = np.zeros(shape, np.int32)
    label[2:8, 8:22, 10:24] = 1
    label[6:8, 10:14, 26:30] = 2
    return (100.0 * label)[None].astype(np.float32), label


# Pictures


def test_a_volume_is_shown_in_three_rows_and_a_picture_in_one():
    image, label = phantom()
    volume = pixels(overlay(image, label, LABELS, VOLUME))
    flat = pixels(overlay(image[:, 5:6], label[5:6], LABELS, PICTURE))
    assert volume.shape[1] == flat.shape[1]
    assert volume.shape[0] > 2 * flat.shape[0]
    assert volume.std() > 10 and flat.std() > 10


def test_each_uncertainty_adds_a_panel():
    image, label = phantom()
    share = np.full(label.shape, 0.5, np.float32)
    widths = [
        pixels(overlay(image, label, LABELS, VOLUME, **maps)).shape[1]
        for maps in ({}, {"entropy": share}, {"entropy": share, "mutual_information": share})
    ]
    assert widths[1] - widths[0] == pytest.approx(widths[2] - widths[1], abs=2)
    assert widths[1] - widths[0] > 200


def test_structures_are_filled_in_their_own_colours():
    image = np.zeros((1, 1, 40, 40), np.float32)
    label = np.zeros((1, 40, 40), np.int32)
    label[:, :, :20], label[:, :, 20:] = 1, 2
    drawn = pixels(overlay(image, label, LABELS, PICTURE))
    # Half transparent on black: half of the palette's colour.
    assert near(drawn, np.array(SKY) / 2).sum() > 5000
    assert near(drawn, np.array(ORANGE) / 2).sum() > 5000


def test_the_reference_is_an_outline_and_not_an_area():
    image, label = phantom()
    nothing = np.zeros_like(label)
    drawn = pixels(overlay(image, nothing, LABELS, VOLUME, reference=label))
    line = near(drawn[:-70, 340:], SKY, 40).sum()  # without the legend
    area = near(pixels(overlay(image, label, LABELS, VOLUME))[:-70, 340:], (255 + np.array(SKY)) / 2, 60).sum()
    assert 500 < line < area / 2


def test_where_nothing_was_predicted_the_slices_of_the_reference_are_shown():
    image, label = phantom()
    label[2:] = 0
    label[1, 5:25, 5:35] = 1  # far from the middle of the volume
    drawn = pixels(overlay(image, np.zeros_like(label), LABELS, VOLUME, reference=label))
    assert near(drawn[60:300, 340:], SKY, 40).sum() > 200


def test_a_structure_that_fills_the_whole_slice_has_an_outline_all_the_same():
    image = np.zeros((1, 1, 40, 40), np.float32)
    everything = np.ones((1, 40, 40), np.int32)
    nothing = np.zeros_like(everything)
    drawn = pixels(overlay(image, nothing, LABELS, PICTURE, reference=everything))
    panel = drawn[60:300, 350:]
    assert near(panel, SKY, 60).sum() > 200


def test_pictures_of_three_channels_keep_their_colours_and_volumes_are_grey():
    image = np.zeros((3, 1, 40, 40), np.float32)
    image[0] = 200.0
    nothing = np.zeros((1, 40, 40), np.int32)
    assert near(pixels(overlay(image, nothing, LABELS, PICTURE)), (200, 0, 0)).sum() > 50_000
    flat = Geometry(3, (3.0, 1.0, 1.0), (0.0, 0.0, 0.0), UPRIGHT)  # three MRI sequences are no colours
    drawn = pixels(overlay(image, nothing, LABELS, flat))
    assert np.ptp(drawn, axis=-1)[60:300].max() < 40


def test_intensities_are_windowed_so_that_one_hot_voxel_does_not_blacken_the_image():
    image, label = phantom()
    image[0, 0, 0, 0] = 1e6
    kidney = pixels(overlay(image, np.zeros_like(label), LABELS, VOLUME))[:, :340]
    assert near(kidney, (255, 255, 255)).sum() > 2000
    assert 0.02 < near(kidney[60:250, 15:], (127, 127, 127), 60).mean() < 0.5


@pytest.mark.parametrize("value", [0.0, -7.0, np.nan])
def test_an_image_without_contrast_is_drawn_without_complaint(value):
    _, label = phantom()
    image = np.full((1, *label.shape), value, np.float32)
    image[0, 0] = 0.0
    drawn = pixels(overlay(image, label, LABELS, VOLUME))
    assert drawn[60:300, 15:340].mean() < 20  # black, also where there is no value at all


def test_the_slice_shows_a_small_structure_beside_a_large_one():
    image, label = phantom()
    label[6:8, 8:12] = np.where(label[6:8, 8:12] == 1, 0, label[6:8, 8:12])  # the organ is larger in other slices
    assert np.count_nonzero(label[3]) > np.count_nonzero(label[6])
    drawn = pixels(overlay(np.zeros_like(image), label, LABELS, VOLUME))
    assert near(drawn[60:300], np.array(ORANGE) / 2).sum() > 300


@pytest.mark.parametrize(
    "direction",
    [
        (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0),
        (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    ],
    ids=["RAS", "sagittal"],
)
def test_a_volume_is_shown_upright_however_it_is_stored(direction):
    """The same patient, stored along other axes, gives the same picture."""
    image, label = phantom((12, 30, 40))
    matrix = np.reshape(direction, (3, 3))
    expected = overlay(image, label, LABELS, Geometry(3, (3.0, 1.0, 1.5), (0.0,) * 3, UPRIGHT))
    order = [int(np.abs(matrix[:, axis]).argmax()) for axis in range(3)]  # which patient axis each file axis runs along
    flips = [axis for axis in range(3) if matrix[order[axis], axis] < 0]

    def stored(array):
        return np.flip(array.T.transpose(order), flips).T

    spacing_xyz = [(1.5, 1.0, 3.0)[axis] for axis in order]
    geometry = Geometry(3, tuple(reversed(spacing_xyz)), (0.0,) * 3, tuple(float(d) for d in direction))
    turned = overlay(stored(image[0])[None], stored(label), LABELS, geometry)
    assert np.array_equal(pixels(turned), pixels(expected))
    assert not np.array_equal(pixels(overlay(image, label, LABELS, VOLUME)), pixels(expected))


def test_right_anterior_and_superior_are_left_and_on_top():
    """A mark in the patient's right, anterior, superior corner is in the upper left corner of each plane."""
    label = np.zeros((20, 20, 20), np.int32)
    label[14:19, 1:6, 1:6] = 1
    geometry = Geometry(3, (1.0, 1.0, 1.0), (0.0,) * 3, UPRIGHT)
    drawn = pixels(overlay(np.zeros((1, 20, 20, 20), np.float32), label, LABELS, geometry))
    marked = near(drawn, np.array(SKY) / 2)
    panel, top = 330, drawn.shape[0] - 3 * 339 - 61  # square panels of 3 inches, with a legend below
    for row in range(3):
        rows, columns = np.nonzero(marked[top + row * 339 : top + row * 339 + panel, 352:682])
        assert len(rows) > 1000
        assert rows.mean() < panel / 2 and columns.mean() < panel / 2


def test_a_sheared_volume_is_turned_by_its_affine():
    image, label = phantom()
    affine = (-1.0, 0.1, 0, 0, 0, -1.0, 0, 0, 0, 0, 3.0, 0, 0, 0, 0, 1.0)  # nibabel's axes: this one is already LPS
    sheared = Geometry(3, VOLUME.spacing_mm, affine=affine)
    assert overlay(image, label, LABELS, sheared) == overlay(image, label, LABELS, VOLUME)


def test_spacing_sets_the_proportions():
    image, label = phantom((10, 30, 30))
    thin, thick = (
        pixels(overlay(image, label, LABELS, Geometry(3, (z, 1.0, 1.0), (0.0,) * 3, UPRIGHT))).shape[0]
        for z in (1.5, 3.0)
    )
    # Two rows are 15 or 30 mm high at 3 inches and 110 dots per inch for 30 mm.
    assert thick - thin == pytest.approx(2 * 15 / 30 * 330, abs=3)


def test_large_pictures_and_many_structures_are_drawn():
    names = {"background": 0, **{f"structure {i}": i for i in range(1, 31)}}
    label = np.tile(np.repeat(np.arange(30, dtype=np.int32), 60), (2000, 1))[None]
    drawn = pixels(overlay(label[None].astype(np.float32), label, names, PICTURE, reference=label))
    assert drawn.shape[1] < 1000 and drawn.shape[0] < 1000


@pytest.mark.parametrize("lists", [list, tuple])
def test_a_voxel_has_the_colour_of_the_smallest_region_that_holds_it_and_ignored_ones_have_none(lists):
    names = {"background": 0, "whole": lists([1, 2, 3]), "core": lists([2, 3]), "ignore": 4}
    image, label = np.zeros((1, 1, 40, 40), np.float32), np.zeros((1, 40, 40), np.int32)
    label[:, :, :20], label[:, :10, 20:], label[:, 10:, 20:] = 1, 2, 3
    ignored = np.full_like(label, 4)
    drawn = pixels(overlay(image, label, names, PICTURE))
    assert near(drawn, np.array(SKY) / 2).sum() > 5000 and near(drawn, np.array(ORANGE) / 2).sum() > 5000
    assert np.array_equal(pixels(overlay(image, label, names, PICTURE, reference=ignored)),
                          pixels(overlay(image, label, names, PICTURE, reference=np.zeros_like(label))))  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_names_are_text_and_neither_formulas_nor_hidden():
    image, label = phantom()
    names = {"background": 0, "_kidney": 1, "$\\frac{$": 2}
    plain = pixels(overlay(image, label, {"background": 0, "": 1, " ": 2}, VOLUME, title=""))
    named = pixels(overlay(image, label, names, VOLUME, title=""))
    assert (plain != named).any(axis=-1)[-60:, :400].sum() > 100
    assert pixels(overlay(image, label, names, VOLUME, title="a$b_{$ " + 60 * "long")).shape[1] == named.shape[1]


def test_maps_of_another_shape_are_refused_together():
    image, label = phantom()
    with pytest.raises(ValidationErrors) as caught:
        overlay(image, label[1:], LABELS, VOLUME, reference=label[:, 1:], entropy=label.astype(np.float32), title="a")
    assert caught.value.about == "a"
    assert [p.split(" has")[0] for p in caught.value.problems] == ["the prediction", "the reference"]


# Folders of predictions


def predict(folder, case, image, label, geometry, ending, wrong=0):
    """Lay down what `autofed predict` does, with a prediction that is `wrong` voxels off, and the reference."""
    inputs = folder / "images" / f"{case}_0000{ending}"
    images.write(inputs, image[0], geometry)
    images.write(folder / "labels" / f"{case}{ending}", label.astype(np.uint8), geometry)
    out = folder / "out"
    images.write(out / f"{case}{ending}", np.roll(label, wrong, axis=-1).astype(np.uint8), geometry)
    files = {"labels": f"{case}{ending}"}
    for kind in ("entropy", "mutual_information"):
        files[kind] = f"{case}_{kind}{ending}"
        images.write(out / files[kind], np.full(label.shape, 0.25, np.float32), geometry)
    value = {"case": case, "images": [str(inputs)], "labels": LABELS, "files": files, "volumes": {}}
    (out / f"{case}.json").write_text(json.dumps(value))
    return inputs


@pytest.fixture
def predicted(tmp_path):
    """Three cases of volumes, worse from one to the next."""
    image, label = phantom((6, 20, 36))
    for wrong, case in enumerate(("good", "fair", "poor")):
        predict(tmp_path, case, image, label, VOLUME, ".nii.gz", 2 * wrong)
    return tmp_path


def test_every_case_of_a_folder_gets_a_picture(predicted):
    (predicted / "out" / "report.json").write_text("[]")
    steps = []
    paths = draw_predictions(predicted / "out", lambda *step: steps.append(step))
    assert sorted(p.name for p in paths) == ["fair.png", "good.png", "poor.png"]
    assert all(p.parent == predicted / "out" / "pictures" for p in paths)
    assert steps[-1] == ("pictures", 3, 3)
    drawn = pixels(paths[0].read_bytes())
    assert drawn.shape[1] > 1200 and drawn.shape[0] > 300  # four panels


def test_a_case_whose_images_are_gone_is_passed_over(predicted):
    (predicted / "images" / "fair_0000.nii.gz").unlink()
    assert sorted(p.name for p in draw_predictions(predicted / "out")) == ["good.png", "poor.png"]


def test_uncertainty_of_pictures_is_read_as_shares_of_255(tmp_path):
    label = np.zeros((1, 40, 40), np.int32)
    predict(tmp_path, "a", label[None].astype(np.float32), label, PICTURE, ".png")
    (path,) = draw_predictions(tmp_path / "out")
    drawn = pixels(path.read_bytes())
    for share_of_scale in (0.25, 0.5**0.5):  # entropy's scale ends at 1, that of mutual information at 0.5, by roots
        colour = 255 * np.array(colormaps["inferno"](share_of_scale)[:3])
        assert near(drawn, colour).sum() > 50_000


@pytest.mark.parametrize("holds_out", [False, True])
def test_a_curve_is_called_what_it_shows(predicted, holds_out):
    dice = {"dice": {"organ": 0.5}} if holds_out else {}
    path = predicted / "run" / "fold_all" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"round": 1, "seconds": 1.0, "sites": {"alpha": {"loss": 1.0, **dice}}}) + "\n")
    report = evaluate_folder(predicted / "out", predicted / "labels", {"organ": 1})
    page(report, predicted / "out", None, [predicted / "run"], predicted / "page.html")
    text = (predicted / "page.html").read_text()
    assert "training loss" in text and ("held-out patients" in text) == holds_out


def test_the_same_mutual_information_has_the_same_colour_in_every_picture():
    drawn = []
    for top in (0.01, 0.3):
        image = np.zeros((1, 1, 40, 40), np.float32)
        information = np.full((1, 40, 40), 0.01, np.float32)
        information[0, 0, 0] = top  # the largest of this case
        label = np.zeros((1, 40, 40), np.int32)
        drawn.append(pixels(overlay(image, label, LABELS, PICTURE, mutual_information=information)))
    colour = 255 * np.array(colormaps["inferno"]((0.01 / 0.5) ** 0.5)[:3])
    assert all(near(picture, colour).sum() > 50_000 for picture in drawn)


def test_a_single_model_has_no_panel_of_mutual_information(predicted):
    path = predicted / "out" / "good.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "members": 1}))
    fair, good, _ = (pixels(p.read_bytes()) for p in draw_predictions(predicted / "out"))
    assert fair.shape[1] - good.shape[1] == pytest.approx(339, abs=1)


# Curves


def metrics(path, rounds, tail=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"round": r, "seconds": 1.0, "sites": {s: {"loss": v} for s, v in sites.items()}})
        for r, sites in rounds
    ]
    path.write_text("\n".join(lines) + "\n" + tail)
    return path


def test_curves_are_drawn_one_for_each_site(tmp_path):
    path = metrics(tmp_path / "m.jsonl", [(r, {"alpha": 1 / r, "bravo": 2 / r}) for r in range(1, 30)])
    drawn = pixels(curves(path))
    seen = [near(drawn, tuple(bytes.fromhex(colour[1:])), 20).sum() > 100 for colour in LINES]
    assert seen == [True, True, False, False, False, False]


@pytest.mark.parametrize("sites", [1, 30])
def test_a_single_round_and_many_sites_can_be_drawn(tmp_path, sites):
    path = metrics(tmp_path / "m.jsonl", [(1, {f"site {i}": float(i) for i in range(sites)})])
    assert (pixels(curves(path))[:, 80:600].std(axis=-1) > 20).sum() > 10 * sites


def test_a_round_that_was_run_again_counts_once_and_a_line_cut_short_not_at_all(tmp_path):
    clean = metrics(tmp_path / "a.jsonl", [(1, {"alpha": 1.0}), (2, {"alpha": 0.5})])
    again = metrics(
        tmp_path / "b.jsonl", [(1, {"alpha": 1.0}), (2, {"alpha": 9.0}), (2, {"alpha": 0.5})], tail='{"round": 3, "si'
    )
    assert np.array_equal(pixels(curves(clean)), pixels(curves(again)))
    other = metrics(tmp_path / "c.jsonl", [(1, {"alpha": 1.0}), (2, {"alpha": 9.0})])
    assert not np.array_equal(pixels(curves(clean)), pixels(curves(other)))


def test_dice_of_held_out_patients_is_drawn_below_in_the_colours_of_the_sites(tmp_path):
    lines = [
        {"round": r, "seconds": 1.0, "sites": {
            "alpha": {"loss": 1 / r, **({"dice": {"organ": 0.5 + r / 100, "tumour": 0.3}} if r % 5 == 0 else {})},
            "bravo": {"loss": 2 / r},
        }}
        for r in range(1, 30)
    ]  # fmt: skip
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    drawn = pixels(curves(path))
    alpha, bravo = (near(drawn, tuple(bytes.fromhex(colour[1:])), 20) for colour in LINES[:2])
    middle = len(drawn) // 2
    assert alpha[:middle].sum() > 100 and alpha[middle:, :600].sum() > 50
    assert bravo[:middle].sum() > 100 and bravo[middle:, :600].sum() == 0


def test_without_losses_there_is_no_curve(tmp_path):
    assert curves(tmp_path / "none.jsonl") is None
    (tmp_path / "empty.jsonl").write_text("")
    assert curves(tmp_path / "empty.jsonl") is None
    assert curves(metrics(tmp_path / "census.jsonl", [(1, {})])) is None


def test_damage_in_the_middle_of_metrics_is_refused(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"round": 1\n{"round": 2, "sites": {}}\n')
    with pytest.raises(ValidationErrors, match="line 1 is not JSON"):
        curves(path)


# The page


class Reader(HTMLParser):
    """Collects tags, attributes and text, and fails where tags do not close."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def written(predicted):
    runs = []
    for name in ("first", "second"):
        metrics(predicted / name / "fold_all" / "metrics.jsonl", [(1, {"alpha": 1.0}), (2, {"alpha": 0.5})])
        runs.append(predicted / name)
    sites = {"good": "alpha", "fair": "bravo", "poor": "bravo"}
    report = evaluate_folder(predicted / "out", predicted / "labels", LABELS, sites)
    page(report, predicted / "out", predicted / "labels", [*runs, predicted / "no run"], predicted / "report.html")
    return (predicted / "report.html").read_text(encoding="utf-8")


def test_the_page_stands_alone(written):
    reader = Reader(written)
    assert reader.tags.count("img") == 3 + 2  # a picture per case, a curve per run that has one
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert len(reader.addresses) == 5
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", written)
    for word in ("http", "//", "url(", "@import", "<script", "<link"):
        assert word not in without_pictures
    for address in reader.addresses:
        assert pixels(base64.b64decode(address.split(",")[1])).shape[1] > 400


def test_the_page_holds_scores_sites_glossary_and_what_it_is_not(written):
    text = " ".join(Reader(written).texts)
    for word in (
        "kidney",
        "tumour",
        "alpha",
        "bravo",
        "HD95 (mm)",
        "Entropy",
        "Mutual information",
        "no medical device",
    ):
        assert word in text
    cells = re.findall(r"<th>(good|fair|poor)</th>", written)
    assert cells == ["poor", "fair", "good"]
    assert "1.000" in text and "rank 1 of 3" in text


def test_pictures_on_the_page_show_the_reference(predicted, written):
    report = evaluate_folder(predicted / "out", predicted / "labels", LABELS)
    page(report, predicted / "out", None, [], predicted / "bare.html")
    bare = Reader((predicted / "bare.html").read_text()).addresses
    outlined = Reader(written).addresses
    assert len(bare) == 3 and not set(bare) & set(outlined)


def test_names_cannot_become_markup(tmp_path):
    evil = '<script>alert("&")</script>'
    scores = Scores(dice=0.5, jaccard=1 / 3, hd95_mm=2.0)
    case = CaseScores(case=evil, site=evil, classes={evil: scores, "b": scores}, mean=scores)
    run = tmp_path / "<b>run"
    metrics(run / "fold_all" / "metrics.jsonl", [(1, {evil: 1.0})])
    report = summarise([case], notes=[evil])
    images.write(tmp_path / "<i>labels" / "a.png", np.zeros((1, 8, 8), np.uint8), PICTURE)
    page(report, tmp_path / "<i>out", tmp_path / "<i>labels", [run], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    reader = Reader(text)
    assert not {"script", "i"} & set(reader.tags)
    assert "".join(reader.texts).count(evil) >= 6
    assert "&lt;b&gt;run" in text


def case(name, dice):
    return CaseScores(case=name, classes={"kidney": Scores(dice=dice)}, mean=Scores(dice=dice))


def test_cases_are_ranked_from_the_worst_and_those_without_scores_come_last():
    cases = [case("b", 0.5), case("none", None), case("a", 0.5), case("zero", 0.0), case("best", 0.9)]
    assert [c.case for c in ranked(cases)] == ["zero", "a", "b", "best", "none"]


def test_of_many_cases_the_worst_middle_and_best_are_shown(tmp_path):
    report = summarise([case(f"c{i:02}", i / 40) for i in range(30)])
    page(report, tmp_path, None, [], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    shown = re.findall(r"<figcaption><b>(c\d\d)</b>", text)
    assert shown == [f"c{i:02}" for i in (0, 1, 2, 3, 13, 14, 15, 16, 26, 27, 28, 29)]
    assert re.findall(r"<h3>(\w+)</h3>", text) == ["Worst", "Middle", "Best"]
    assert text.count("No picture: the images of this case were not found.") == 12
    assert len(re.findall(r"<th>c\d\d</th>", text)) == 30  # the table leaves out none


def test_a_structure_that_a_case_lacks_leaves_a_dash_in_its_column(tmp_path):
    both = CaseScores(case="b", classes={"kidney": Scores(dice=0.5), "tumour": Scores(dice=0.7)}, mean=Scores(dice=0.6))
    page(summarise([case("a", 0.5), both]), tmp_path, None, [], tmp_path / "page.html")
    row = (tmp_path / "page.html").read_text().split("<th>a</th>")[1].split("</tr>")[0]
    assert re.findall(r">([^<]+)<", row) == ["0.500", "–", "–", "0.500", "–"]


@pytest.mark.parametrize(("count", "kind"), [(40, "wide"), (41, "long")])
def test_a_long_table_is_scrolled(tmp_path, count, kind):
    page(summarise([case(f"c{i}", i / 50) for i in range(count)]), tmp_path, None, [], tmp_path / "page.html")
    assert re.findall(r"<div class=(\w+)>", (tmp_path / "page.html").read_text()) == ["wide", kind]


def test_only_volumes_are_said_to_be_shown_in_slices(predicted, written):
    report = evaluate_folder(predicted / "out", predicted / "labels", LABELS)
    flat = report.model_copy(update={"distance_unit": "px"})
    page(flat, predicted / "out", None, [], predicted / "flat.html")
    assert "patient's right" in written and "patient's right" not in (predicted / "flat.html").read_text()


def test_a_case_that_cannot_be_drawn_leaves_a_gap_that_is_explained(predicted):
    report = evaluate_folder(predicted / "out", predicted / "labels", LABELS)
    images.write(predicted / "images" / "fair_0000.nii.gz", np.zeros((6, 20, 30), np.float32), VOLUME)
    page(report, predicted / "out", predicted / "labels", [], predicted / "page.html")
    text = (predicted / "page.html").read_text()
    assert Reader(text).tags.count("img") == 2
    assert "No picture: this case" in text and "(6, 20, 30)" in text


def test_a_report_without_any_scored_case_still_makes_a_page(tmp_path):
    empty = Report(mean=Scores(), classes={"kidney": Scores()}, cases=(case("a", None),))
    page(empty, tmp_path, None, [], tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text())
    assert "Evaluation of 1 case" in reader.texts and "–" in reader.texts and "img" not in reader.tags
