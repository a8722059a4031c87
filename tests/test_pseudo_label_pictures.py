"""Pictures of what sites agreed on."""

import io

import numpy as np
from matplotlib.image import imread

from autofed.data.images import Geometry
from autofed.data.labels import Labels
from autofed.preprocessing import UNKNOWN
from autofed.report.pseudo_label_pictures import PseudoLabelledImage, choose_images, draw
from tests.synthetic import TUMOUR

SHAPE = (1, 40, 48)
LABELS = Labels.declared(TUMOUR)


def picture(found, **more):
    image = np.linspace(0, 1, 40 * 48).reshape(1, *SHAPE)
    one = PseudoLabelledImage("case_$1", image, np.full(SHAPE, found, np.uint8), Geometry(2, (999.0, 1.0, 1.0)), **more)
    return imread(io.BytesIO(draw([one], LABELS)))


def test_half_of_what_is_shown_was_refused_and_half_is_taught():
    refused, taught = np.full(SHAPE, UNKNOWN, np.uint8), np.zeros(SHAPE, np.uint8)
    maps = {f"a{i}": taught for i in range(9)} | {f"b{i}": refused for i in range(9)}
    chosen = choose_images(maps)
    assert [name[0] for name in chosen] == ["a"] * 4 + ["b"] * 4 and {"a0", "a8", "b0", "b8"} <= set(chosen)
    assert [name[0] for name in choose_images({**maps, **dict.fromkeys(maps, taught)})] == ["a"] * 4 + ["b"] * 4
    assert choose_images(dict.fromkeys("ab", refused)) == ["a", "b"] and choose_images({}) == []


def test_taught_and_refused_regions_are_told_apart():
    """Background is the image as it is, what nobody vouches for is grey, and a structure has its colour."""
    pictures = {found: picture(found)[..., :3] for found in (0, 1, UNKNOWN)}
    coloured = {found: float((np.ptp(pixels, axis=2) > 0.2).mean()) for found, pixels in pictures.items()}
    assert coloured[1] > 0.05 > coloured[0] == coloured[UNKNOWN]
    assert np.abs(pictures[0] - pictures[UNKNOWN]).mean() > 0.02


def test_where_the_truth_is_known_its_outline_is_drawn():
    truth = np.zeros(SHAPE, np.uint8)
    truth[:, 10:30, 10:30] = 1
    assert (picture(UNKNOWN, reference=truth) != picture(UNKNOWN)).any()
