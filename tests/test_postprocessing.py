"""Largest components: what is taken away, and when."""

import numpy as np
import pytest

from autofed.data.labels import Labels
from autofed.inference.postprocessing import (
    NOTHING,
    RULES,
    Postprocessing,
    choose_postprocessing,
    largest,
    masks_by_rule,
)

VALUES = {"background": 0, "organ": 1, "tumour": 2}


def two_pieces():
    """An organ with a tumour on it and a bit of organ elsewhere; a bit of tumour that touches nothing."""
    labels = np.zeros((1, 12, 12), np.uint8)
    labels[0, 1:5, 1:5] = 1
    labels[0, 5:7, 1:5] = 2
    labels[0, 9, 9] = 1
    labels[0, 10, 1:3] = 2
    return labels


def test_the_largest_component_stays_and_corners_touch():
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1]], bool)
    expected = mask.copy()
    expected[:, 3] = False  # two above each other, and one alone
    assert np.array_equal(largest(mask), expected)
    assert not largest(np.zeros((3, 3, 3), bool)).any()


def test_each_structure_by_itself_or_all_as_one():
    labels = two_pieces()
    organ = Postprocessing(structures=("organ",)).apply(labels, VALUES)
    assert organ[0, 9, 9] == 0 and (organ[0, 10, 1:3] == 2).all() and (organ[0, 5:7] == labels[0, 5:7]).all()
    whole = Postprocessing(foreground=True).apply(labels, VALUES)
    assert np.count_nonzero(whole) == 16 + 8 and (whole[0, 5:7, 1:5] == 2).all()
    assert np.array_equal(NOTHING.apply(labels, VALUES), labels)
    assert labels[0, 9, 9] == 1  # what was given is left as it is


def test_masks_by_rule_are_what_the_rules_do():
    labels = two_pieces()
    rules = [
        NOTHING, Postprocessing(structures=("organ", "tumour")), Postprocessing(foreground=True),
        Postprocessing(foreground=True, structures=("organ", "tumour")),
    ]  # fmt: skip
    for value, masks in zip((1, 2), masks_by_rule(labels, Labels.declared(VALUES)), strict=True):
        assert len(masks) == len(RULES)
        for rule, mask in zip(rules, masks, strict=True):
            assert np.array_equal(mask, rule.apply(labels, VALUES) == value)


@pytest.mark.parametrize(
    ("organ", "tumour", "expected"),
    [
        ((0.8, 0.8, 0.8, 0.8), (0.5, 0.5, 0.5, 0.5), NOTHING),
        ((0.8, 0.9, 0.8, 0.8), (0.5, 0.4, 0.5, 0.5), Postprocessing(structures=("organ",))),
        ((0.8, 0.8, 0.9, 0.9), (0.5, 0.5, 0.5, 0.6), Postprocessing(foreground=True, structures=("tumour",))),
        # all as one helps in the mean, but one structure falls
        ((0.8, 0.8, 0.9, 0.9), (0.5, 0.5, 0.45, 0.5), NOTHING),
        ((np.nan,) * 4, (0.5, 0.6, 0.4, 0.4), Postprocessing(structures=("tumour",))),
        ((np.nan,) * 4, (np.nan,) * 4, NOTHING),
    ],
)
def test_decisions_follow_nnunets_rule(organ, tumour, expected):
    assert choose_postprocessing({"organ": np.array(organ), "tumour": np.array(tumour)}) == expected


def test_a_region_is_only_made_smaller_with_all_others():
    labels = two_pieces()
    nested = Labels.declared({"background": 0, "whole": [1, 2], "core": 2}, (1, 2))
    whole = Postprocessing(foreground=True).apply(labels, VALUES)
    for values, masks in zip(((1, 2), (2,)), masks_by_rule(labels, nested), strict=True):
        assert [np.array_equal(masks[i], np.isin(labels, values)) for i in (0, 1)] == [True, True]
        assert [np.array_equal(masks[i], np.isin(whole, values)) for i in (2, 3)] == [True, True]


def test_several_runs_do_what_all_of_them_do():
    one = Postprocessing(foreground=True, structures=("organ", "tumour"))
    assert one.merged_with(Postprocessing(structures=("tumour",))) == Postprocessing(structures=("tumour",))
    assert bool(one) and not NOTHING
