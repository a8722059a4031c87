"""Scores on held-out patients, against counts made by hand."""

import numpy as np
import pytest
import torch

from autofed.data import open_dataset
from autofed.data.labels import Labels
from autofed.inference import validation
from autofed.inference.postprocessing import RULES
from autofed.inference.validation import case_dice, patch_dice
from autofed.preprocessing import open_store, preprocess
from autofed.training.network import build, weights_of
from tests.plans_made import small_plan
from tests.synthetic import ORGAN_AND_TUMOUR, make_site


class Bright(torch.nn.Module):
    """Says 1 where the image is brighter than a threshold."""

    def __init__(self, threshold):
        super().__init__()
        self.threshold = threshold

    def forward(self, image):
        return torch.cat([self.threshold - image, image - self.threshold], dim=1)


def answers(monkeypatch, threshold):
    monkeypatch.setattr(validation, "_network", lambda *_: Bright(threshold))


def test_dice_of_all_patches_is_counted_as_one(lone_site, monkeypatch):
    plan, store = lone_site
    whole = plan.change({"patch_size": [32, 32, 32]})  # larger than the cases: every patch holds one
    answers(monkeypatch, 1.0)
    right = found = there = 0
    for case in store.folders:
        image, truth = store.image(case)[:][0], store.label(case)[:]
        right += np.count_nonzero((image > 1) & (truth == 1))
        found += np.count_nonzero(image > 1)
        there += np.count_nonzero(truth == 1)
    assert patch_dice({}, store, whole, 1) == {"structure_1": pytest.approx(2 * right / (found + there))}
    assert 0.3 < 2 * right / (found + there) < 1


def test_the_patches_are_the_same_each_time_and_as_many_as_wanted(lone_site, monkeypatch):
    plan, store = lone_site
    answers(monkeypatch, 1.0)
    assert patch_dice({}, store, plan, 5) == patch_dice({}, store, plan, 5)
    drawn = []
    monkeypatch.setattr(validation, "_overlap_counts", lambda *given: drawn.append(given) or np.ones((1, 3), int))
    patch_dice({}, store, plan, 7)
    patch_dice({}, store, plan, 1)
    assert len(drawn) == 7 + 3  # never fewer than there are patients


def test_a_class_that_is_nowhere_has_no_score(lone_site, monkeypatch):
    plan, store = lone_site
    answers(monkeypatch, 1e6)
    assert patch_dice({}, store, plan, 1) == {"structure_1": 0.0}
    monkeypatch.setattr(store.__class__, "label", lambda self, case: np.zeros(self.image(case).shape[1:], np.int16))
    assert patch_dice({}, store, plan, 1) == {}


def test_whole_cases_are_scored_after_every_rule(lone_site, monkeypatch):
    plan, store = lone_site
    answers(monkeypatch, 1.0)
    scores = case_dice({}, store, plan)
    assert sorted(scores) == ["alpha_000", "alpha_001", "alpha_002"]
    for case, table in scores.items():
        image, truth = store.image(case)[:][0], store.label(case)[:]
        plain = 2 * np.count_nonzero((image > 1) & (truth == 1)) / np.count_nonzero(image > 1, axis=None)
        assert table.shape == (1, len(RULES))
        assert table[0, 0] == pytest.approx(
            plain * np.count_nonzero(image > 1) / (np.count_nonzero(image > 1) + np.count_nonzero(truth == 1)), abs=1e-6
        )
        assert table[0, 1] == table[0, 2] == table[0, 3]  # with one structure all rules but the first are one


def test_a_real_network_is_scored_with_its_own_weights(lone_site):
    plan, store = lone_site
    weights = weights_of(build(plan.local.network, seed=1))
    other = {name: array * 0 for name, array in weights.items()}
    assert patch_dice(other, store, plan, 1) == {"structure_1": 0.0}  # of equal logits the first class, background
    assert patch_dice(weights, store, plan, 1) != {"structure_1": 0.0}


def test_regions_overlap_and_what_was_not_annotated_is_not_looked_at():
    labels = Labels.declared({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, (1, 2))
    truth = np.array([[[0, 1, 2, 2, 3, 3]]])
    logits = np.array([[-1, 1, 1, 1, 1, 1], [-1, -1, -1, 1, 1, -1]], np.float32).reshape(2, 1, 1, 6)
    assert validation._overlap_counts(logits, truth, labels).tolist() == [[3, 3, 3], [1, 1, 2]]
    classes = Labels.declared({"background": 0, "organ": 1, "tumour": 2, "ignore": 3})
    best = np.array([0, 1, 1, 2, 2, 1])
    found = validation._overlap_counts(
        (best == np.arange(3)[:, None]).astype(np.float32).reshape(3, 1, 1, 6), truth, classes
    )
    assert found.tolist() == [[1, 2, 1], [1, 1, 2]]


def test_a_structure_that_the_site_never_annotated_is_not_scored():
    for order in ((), (1, 2)):
        declared = {"background": 0, "organ": [1, 2] if order else 1, "tumour": 2}
        labels = Labels.declared(declared, order).with_annotated(["tumour"])
        logits = np.random.default_rng(0).normal(size=(labels.channels, 4, 4, 4))
        truth = np.random.default_rng(1).integers(0, 2, (4, 4, 4)) * 2
        organ, tumour = validation._overlap_counts(logits, truth, labels)
        assert not organ.any() and tumour.all()
        organ, tumour = validation._case_scores(labels.paint(logits), truth, labels)
        assert np.isnan(organ).all() and (tumour > 0).all() and len(organ) == len(RULES)


def test_a_store_knows_what_was_annotated_there(tmp_path):
    site = make_site(tmp_path / "alpha", cases=2, labels=ORGAN_AND_TUMOUR, annotated_structures=("tumour",))
    plan = small_plan(labels=ORGAN_AND_TUMOUR)
    preprocess(open_dataset(site), plan.local, tmp_path / "work")
    store = open_store(tmp_path / "work", "alpha", plan.local).only(["alpha_000", "alpha_001"])
    assert store.annotated == ("tumour",) and set(store.locations("alpha_000")) == {2}
    weights = weights_of(build(plan.local.network, seed=1))
    assert set(patch_dice(weights, store, plan, 1)) == {"tumour"}
    scores = np.stack(list(case_dice(weights, store, plan).values()))
    assert np.isnan(scores[:, 0]).all() and not np.isnan(scores[:, 1]).any()
