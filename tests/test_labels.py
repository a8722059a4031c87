"""What may be declared, and what the values of a label map then mean."""

from __future__ import annotations

import numpy as np
import pytest

from autofed.data.labels import (
    Labels,
    annotated_problems,
    canonical,
    describe_values,
    labels_problems,
    mask,
    value_problems,
)

BRATS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
KIDNEYS = {"background": 0, "kidney": [1, 2, 3], "mass": [2, 3], "tumour": 2}
CROSSED = {"background": 0, "left": [1, 2], "right": [2, 3], "both": 2}


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "organ": 1, "ignore": 2}, ()),
        ({"organ": 1, "ignore": 2, "background": [0]}, None),
        (BRATS, [1, 2, 3]),
        ({**BRATS, "ignore": 4}, (1, 2, 3)),
        (KIDNEYS, [1, 3, 2]),
        (CROSSED, [1, 3, 2]),
        ({"background": 0, "tumour": [1, 2]}, [2]),
    ],
)
def test_what_may_be_declared(labels, order):
    assert labels_problems(labels, order) == []


def test_a_region_is_hidden_by_no_later_one():
    (found,) = labels_problems({"background": 0, "core": 1, "whole": [1, 2]}, [1, 2])
    hint = "put whole before core in `labels` and in `regions_class_order`"
    assert found == f"core would be painted over by whole, which holds all of it; {hint}"


@pytest.mark.parametrize(
    ("changed", "order", "said"),
    [
        ({}, None, ["found None; write [1, 2, 3]"]),
        ({}, [1, 2], ["each of the regions whole, core, enhancing, in this order and each once; found [1, 2]; write"]),
        ({}, [1, 2, 2], ["found [1, 2, 2]; write [1, 2, 3]"]),
        ({}, [1, 2, "3"], ["write [1, 2, 3]"]),
        ({}, [1, 3, 2], ["paints enhancing with 2, which is none of its values [3]; write [1, 2, 3]"]),
        ({"whole": []}, [1, 2, 3], ["gives whole the values []"]),
        ({"whole": [1, 2, 2]}, [1, 2, 3], ["gives whole the values [1, 2, 2]; write whole numbers above 0, each once"]),
        ({"whole": [0, 1], "core": "2"}, [1, 2, 3], ["gives whole the values [0, 1]", "gives core the values ['2']"]),
        ({"background": 1}, [1, 2, 3], ["need a background of 0; found background=1, whole=[1, 2, 3]"]),
        ({"enhancing": 7}, [1, 2, 7], ["1, 2, ... without a gap; found background=0, whole"]),
        ({"core": [3, 2, 1]}, [1, 2, 3], ["gives whole and core the same values [1, 2, 3]; keep one of them"]),
        ({"ignore": 3}, [1, 3], ["`ignore` is 3; write 4", "`regions_class_order` must be"]),
        ({"ignore": [4]}, [1, 2, 3], []),
        ({"ignore": [4, 5]}, [1, 2, 3], ["`ignore` is (4, 5); write 4"]),
        ({"ignore": True}, [1, 2, 3], ["`ignore` is True; write 4"]),
    ],
)
def test_what_is_wrong_with_regions_comes_with_what_to_write(changed, order, said):
    found = labels_problems({**BRATS, **changed}, order)
    assert len(found) == len(said) and all(words in f for words, f in zip(said, found, strict=True)), found


def test_sites_that_write_the_same_in_other_words_agree():
    assert canonical({"b": 2, "ignore": 3, "a": [1], "background": 0}) == {"background": 0, "a": 1, "b": 2, "ignore": 3}
    assert list(canonical({"b": 2, "ignore": 3, "a": [1], "background": 0})) == ["background", "a", "b", "ignore"]
    turned = {"ignore": 4, "whole": [3, 1, 2], "core": [3, 2], "background": 0, "enhancing": [3]}
    assert describe_values(canonical(turned), (1, 2, 3)) == describe_values(
        canonical({"background": 0, "whole": (1, 2, 3), "core": (2, 3), "enhancing": 3, "ignore": 4}), (1, 2, 3)
    )


def test_classes_have_a_background_among_their_outputs_and_regions_have_none():
    classes = Labels.declared({"background": 0, "organ": 1, "tumour": 2, "ignore": 3})
    assert (classes.channels, classes.ignore, classes.values, classes.highest_value) == (3, 3, {0, 1, 2}, 3)
    assert classes.targets().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    regions = Labels.declared({**BRATS, "ignore": 4}, (1, 2, 3))
    assert (regions.channels, regions.names) == (3, ("whole", "core", "enhancing"))
    assert regions.targets().tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert Labels.declared({"background": 0, "tumour": [1, 2]}, (1,)).channels == 1


def test_a_value_is_called_after_the_smallest_region_that_holds_it():
    assert Labels.declared(KIDNEYS).names_of_values() == {1: "kidney", 2: "tumour", 3: "mass"}
    assert Labels.declared({"background": 0, "tumour": [1, 2]}).names_of_values() == {1: "tumour", 2: "tumour"}


def test_masks_of_one_value_and_of_several():
    label = np.array([0, 1, 2, 3, 4])
    assert mask(label, (2,)).tolist() == [False, False, True, False, False]
    assert mask(label, (1, 3)).tolist() == [False, True, False, True, False]
    labels = Labels.declared({**BRATS, "ignore": 4})
    assert labels.is_foreground(label).tolist() == [False, True, True, True, False]


def test_a_site_may_have_annotated_some_of_the_structures():
    classes = Labels.declared({"background": 0, "organ": 1, "tumour": 2, "ignore": 3})
    partial = classes.with_annotated(["tumour"])
    assert [partial.is_annotated(name) for name in partial.names] == [False, True] and partial != classes
    assert classes.with_annotated([]) == classes.with_annotated(("tumour", "organ")) == classes
    assert partial.with_annotated(()) == classes and all(map(classes.is_annotated, classes.names))


@pytest.mark.parametrize(
    ("annotated", "said"),
    [
        (["core", "whole"], []),
        ([], ['`annotated` must list some of the structures whole, core, enhancing, for example ["whole"]; found []']),
        ("whole", ["found 'whole'; leave it out if all were annotated"]),
        (None, ["found None"]),
        ([1], ["found [1]"]),
        (
            ["background", "whole", "cor", "whole"],
            [
                "names 'background', which is no structure; the structures are whole, core, enhancing",
                "names 'cor', which",
                "names whole 2 times; keep one",
            ],
        ),
    ],
)
def test_what_is_wrong_with_the_structures_annotated(annotated, said):
    found = annotated_problems(annotated, BRATS)
    assert len(found) == len(said) and all(words in f for words, f in zip(said, found, strict=True)), found


def test_a_map_holds_values_of_what_was_annotated_alone():
    label = np.array([[[0, 1, 2, 3]]])
    classes = {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}
    (found,) = value_problems(label, classes, ["organ"])
    assert found == (
        "the label holds the values [2] (tumour), but `annotated` in dataset.json names only organ; add what was "
        "annotated to it, or write 0 there"
    )
    assert list(value_problems(label, classes, ["organ", "tumour"])) == list(value_problems(label, classes)) == []
    regions = canonical(BRATS)
    assert list(value_problems(label, regions, ["whole"])) == []  # its values are those of the regions inside it too
    (found,) = value_problems(label, regions, ["core"])
    assert found.startswith("the label holds the values [1] (whole), but")
