"""Pseudo-labels: how they are written down, fused, gated, and whose word counts."""

import numpy as np
import pytest

from autofed.inference import pseudo_labels
from autofed.inference.pseudo_labels import ConfidenceThresholds
from autofed.preprocessing import UNKNOWN

SHAPE = (1, 6, 8)
OPEN = ConfidenceThresholds(0.0, 1.0, 0.0)


def site_prediction(tumour, doubt=0.0, shape=SHAPE):
    """What a site says that sees a tumour with this probability."""
    p = np.broadcast_to(np.asarray(tumour, np.float32), shape)
    return pseudo_labels.encode_prediction(
        np.stack([1 - p, p]), np.broadcast_to(np.float32(doubt), shape), is_regions=False
    )


def square(low=0.02, high=0.98):
    """Probabilities of a tumour in the middle."""
    p = np.full(SHAPE, low, np.float32)
    p[:, 2:5, 2:6] = high
    return p


@pytest.mark.parametrize("is_regions", [True, False])
def test_what_is_written_is_read_to_half_a_255th(is_regions):
    generator = np.random.default_rng(0)
    p = generator.dirichlet([1, 1, 1], size=SHAPE).astype(np.float32).transpose(3, 0, 1, 2)
    doubt = generator.random(SHAPE, np.float32)
    written = pseudo_labels.encode_prediction(p, doubt, is_regions=is_regions)
    assert written.dtype == np.uint8 and len(written) == (4 if is_regions else 3)
    found, uncertainty = pseudo_labels.decode_prediction(written, is_regions=is_regions)
    assert np.abs(uncertainty - doubt).max() <= 0.5 / 255 + 1e-6
    assert np.abs(found - p).max() <= (0.5 if is_regions else 1) / 255 + 1e-6
    if not is_regions:
        assert found.sum(0) == pytest.approx(1, abs=1e-6)


def test_a_site_that_says_more_than_everything_is_still_read_as_probabilities():
    found, _ = pseudo_labels.decode_prediction(np.full((3, *SHAPE), 255, np.uint8), is_regions=False)
    assert found.sum(0) == pytest.approx(1) and found.min() >= 0


def test_fusion_is_the_mean_weighted_by_certainty():
    """By hand: w = exp(-0/.5) = 1 and exp(-1/.5) = .1353; p = (1 + 0 * .1353) / 1.1353."""
    fused = pseudo_labels.fuse(
        {"a": site_prediction(1.0), "b": site_prediction(0.0, doubt=1.0)}, {"a": 1, "b": 1}, 0.5, is_regions=False
    )
    assert fused[1] == pytest.approx(1 / (1 + np.exp(-2)), rel=1e-5)
    assert fused.sum(0) == pytest.approx(1)
    halved = pseudo_labels.fuse(
        {"a": site_prediction(1.0), "b": site_prediction(0.0)}, {"a": 0.5, "b": 1}, 0.5, is_regions=False
    )
    assert halved[1] == pytest.approx(1 / 3)


def test_fusion_does_not_depend_on_the_order_of_the_sites():
    generator = np.random.default_rng(1)
    views = {site: generator.integers(0, 256, (2, *SHAPE), dtype=np.uint8) for site in "cab"}
    trust = {"a": 0.3, "b": 0.7, "c": 1.0}
    turned = dict(sorted(views.items()))
    assert np.array_equal(
        pseudo_labels.fuse(views, trust, 0.3, is_regions=True), pseudo_labels.fuse(turned, trust, 0.3, is_regions=True)
    )


def test_the_voxel_gates_shut_out_what_is_not_sure():
    p = square()
    p[0, 0, 0], p[0, 0, 1] = 0.4, 0.6
    label = pseudo_labels.apply_thresholds(np.stack([1 - p, p]), (), ConfidenceThresholds(0.75, 0.85, 0.5))
    assert (label[:, 2:5, 2:6] == 1).all() and label[0, 0, 0] == label[0, 0, 1] == UNKNOWN
    assert set(np.unique(label)) == {0, 1, UNKNOWN}
    by_entropy = pseudo_labels.apply_thresholds(np.stack([1 - p, p]), (), ConfidenceThresholds(0.0, 0.1, 0.0))
    assert (by_entropy == UNKNOWN).all()  # .98 has an entropy of .14


def test_the_image_gate_shuts_out_an_image_whose_structure_is_in_doubt():
    p = square(high=0.6)
    assert (
        pseudo_labels.apply_thresholds(np.stack([1 - p, p]), (), ConfidenceThresholds(0.75, 0.85, 0.5)) == UNKNOWN
    ).all()
    assert (pseudo_labels.apply_thresholds(np.stack([1 - p, p]), (), ConfidenceThresholds(0.75, 0.85, 0.0)) == 0).any()
    empty = np.full(SHAPE, 0.01, np.float32)
    assert (
        pseudo_labels.apply_thresholds(np.stack([1 - empty, empty]), (), ConfidenceThresholds(0.75, 0.85, 0.5)) == 0
    ).all()


def test_regions_are_gated_by_their_least_sure_one_and_painted_in_order():
    whole, core = square(), square(0.02, 0.02)
    core[0, 3, 3], core[0, 3, 4] = 0.97, 0.5
    label = pseudo_labels.apply_thresholds(np.stack([whole, core]), (1, 2), ConfidenceThresholds(0.75, 1.0, 0.0))
    assert label[0, 3, 3] == 2 and label[0, 2, 2] == 1 and label[0, 0, 0] == 0 and label[0, 3, 4] == UNKNOWN


def test_dice_between_sites_counts_all_images_together():
    between = pseudo_labels.PairwiseDice()
    for a, b in (([1, 1, 0], [1, 0, 0]), ([0, 0, 1], [0, 0, 1]), ([0, 0, 0], [0, 0, 0])):
        between.add([np.array([a], bool), np.array([b], bool)])
    assert between.dice() == pytest.approx(np.array([[1, 0.8], [0.8, 1]]))
    nothing = pseudo_labels.PairwiseDice()
    nothing.add([np.zeros((2, 4), bool)] * 2)
    assert (nothing.dice() == 1).all() and (nothing.dice(nothing=0) == 0).all()


def test_a_site_that_agrees_with_nobody_is_hardly_heard():
    dice = np.array([[1, 0.9, 0.3], [0.9, 1, 0.35], [0.3, 0.35, 1]])
    trust = pseudo_labels.site_weights(dice, 0.1)
    assert trust[:2].tolist() == [1, 1] and trust[2] == pytest.approx(np.exp(-5.5))


def test_a_minority_of_liars_who_agree_is_outvoted():
    """However well they agree with each other, and however badly the others do."""
    for honest, lying in ((0.8, 0.95), (0.5, 1.0)):
        dice = np.full((5, 5), 0.15)
        dice[:3, :3], dice[3:, 3:] = honest, lying
        np.fill_diagonal(dice, 1)
        assert (
            pseudo_labels.site_weights(dice, 0.1)[:3].min() == 1
            and pseudo_labels.site_weights(dice, 0.1)[3:].max() < 0.1
        )


def test_of_four_sites_each_is_judged_by_the_second_that_it_agrees_with():
    """Of three others the worse half is left out, and of the better half, which is two, the worse one counts."""
    dice = np.array([
        [1.0, 0.9, 0.8, 0.1],
        [0.9, 1.0, 0.7, 0.2],
        [0.8, 0.7, 1.0, 0.3],
        [0.1, 0.2, 0.3, 1.0],
    ])  # fmt: skip
    assert pseudo_labels.site_weights(dice, 0.1) == pytest.approx(np.exp([0, -1, -1, -6]))


def test_of_two_against_two_nobody_can_say_who_errs():
    """However well two agree with each other: one's like does not vouch for one."""
    dice = np.full((4, 4), 0.15)
    dice[:2, :2], dice[2:, 2:] = 0.7, 1.0
    np.fill_diagonal(dice, 1)
    assert (pseudo_labels.site_weights(dice, 0.1) == 1).all()


def test_a_liar_among_six_is_hardly_heard_and_three_of_six_are_no_majority():
    dice = np.full((6, 6), 0.8)
    dice[5, :5] = dice[:5, 5] = 0.2
    assert (
        pseudo_labels.site_weights(dice, 0.1)[:5].tolist() == [1] * 5
        and pseudo_labels.site_weights(dice, 0.1)[5] < 0.01
    )
    halves = np.full((6, 6), 0.2)
    halves[:3, :3], halves[3:, 3:] = 0.7, 1.0
    assert (pseudo_labels.site_weights(halves, 0.1) == 1).all()


@pytest.mark.parametrize("sites", [1, 2])
def test_of_one_or_two_sites_nobody_can_say_who_errs(sites):
    dice = np.full((sites, sites), 0.1) + 0.9 * np.eye(sites)
    assert (pseudo_labels.site_weights(dice, 0.1) == 1).all()


def test_a_liar_does_not_turn_the_labels_of_three():
    good, bad = square(), 1 - square()
    views = {"a": site_prediction(good, 0.1), "b": site_prediction(good, 0.1), "liar": site_prediction(bad, 0.0)}
    between = pseudo_labels.PairwiseDice()
    between.add([pseudo_labels.structure_masks(view, is_regions=False) for view in views.values()])
    trust = dict(zip(views, pseudo_labels.site_weights(between.dice(), 0.1), strict=True))
    label = pseudo_labels.apply_thresholds(
        pseudo_labels.fuse(views, trust, 0.3, is_regions=False), (), ConfidenceThresholds(0.75, 0.85, 0.5)
    )
    assert np.array_equal(label, (good > 0.5).astype(np.uint8))


def test_the_ramp_rises_from_next_to_nothing_to_one():
    values = [pseudo_labels.ramp(share) for share in (-1, 0, 0.5, 1, 2)]
    assert values == sorted(values) and values[0] == values[1] == pytest.approx(np.exp(-5)) and values[3:] == [1, 1]


def test_changes_are_counted_where_there_is_more_than_background():
    before = {"a": np.zeros(SHAPE, np.uint8), "b": np.zeros(SHAPE, np.uint8)}
    now = {name: array.copy() for name, array in before.items()}
    assert pseudo_labels.changed_share(before, now) == 0
    now["a"][0, 0, :4] = 1
    before["a"][0, 0, :1] = 1
    assert pseudo_labels.changed_share(before, now) == 3 / 4
    for maps in (before, now):
        maps["b"][:] = UNKNOWN
    assert pseudo_labels.changed_share(before, now) == 3 / 4
    assert (
        pseudo_labels.changed_share({"a": before["b"]}, {"a": now["a"]}) == 1
    )  # what was not known and is background now


def test_what_is_kept_is_told_of_images_and_of_voxels():
    half = np.zeros(SHAPE, np.uint8)
    half[0, :3] = UNKNOWN
    assert pseudo_labels.labelled_shares({"a": half, "b": np.full(SHAPE, UNKNOWN, np.uint8)}) == (0.5, 0.25)
    assert pseudo_labels.labelled_shares({}) == (0.0, 0.0)
