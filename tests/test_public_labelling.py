"""What a site's ensemble says of public images, and that no member is asked twice."""

import numpy as np
import pytest

from autofed.federation import public_labelling
from autofed.federation.public_labelling import Labeller
from autofed.inference.pseudo_labels import decode_prediction
from autofed.training.network import build, weights_of
from tests import small_federation


@pytest.fixture
def labeller(tmp_path):
    plan, public = small_federation.labelled(small_federation.make(tmp_path / "federation"))
    return Labeller(public, plan, tmp_path / "said")


def members(labeller, count):
    return [weights_of(build(labeller.plan.local.network, seed=seed)) for seed in range(count)]


def test_an_ensemble_says_the_mean_of_its_members(labeller):
    first, second = members(labeller, 2)
    alone = [labeller.label([member]) for member in (first, second)]
    for name, said in labeller.label([first, second]).items():
        each = [decode_prediction(found[name], is_regions=False)[0] for found in alone]
        assert np.abs(decode_prediction(said, is_regions=False)[0] - np.mean(each, axis=0)).max() < 0.02
        assert said.shape[1:] == labeller.public.grids[name]


def test_only_members_that_are_new_are_asked_and_old_ones_are_forgotten(labeller, monkeypatch):
    asked, ask = [], public_labelling.mean_probabilities
    monkeypatch.setattr(public_labelling, "mean_probabilities", lambda *a, **k: asked.append(1) or ask(*a, **k))
    first, second, third = members(labeller, 3)
    images = len(labeller.public.folders)
    whole = labeller.label([second, first])
    assert len(asked) == 2 * images
    again = labeller.label([second, first])
    assert len(asked) == 2 * images and all(np.array_equal(again[name], whole[name]) for name in whole)
    labeller.label([third, second])
    assert len(asked) == 3 * images and len(list(labeller.folder.iterdir())) == 2
    labeller.label([first])
    assert len(asked) == 4 * images


def test_a_member_that_says_no_number_leaves_nothing(labeller):
    broken = {name: np.full_like(array, np.nan) for name, array in members(labeller, 1)[0].items()}
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        labeller.label([broken])
    assert not list(labeller.folder.iterdir())
