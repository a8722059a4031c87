"""Entropy and mutual information against values that can be worked out by hand."""

import math

import pytest
import torch

from autofed.inference.uncertainty import Ensemble, entropy


def ensemble(*members):
    combined = Ensemble()
    for member in members:
        combined.add(torch.tensor(member, dtype=torch.float64).reshape(-1, 1))
    return combined


def test_entropy_is_a_share_of_the_largest():
    assert entropy(torch.full((3, 2), 1 / 3)).tolist() == pytest.approx([1, 1])
    assert entropy(torch.tensor([[1.0], [0.0]])).item() == 0


def test_members_that_agree_have_no_mutual_information():
    combined = ensemble([0.5, 0.5], [0.5, 0.5])
    assert combined.entropy.item() == pytest.approx(1)
    assert combined.mutual_information.item() == pytest.approx(0, abs=1e-9)


def test_members_that_contradict_each_other_have_all_of_it():
    combined = ensemble([1.0, 0.0], [0.0, 1.0])
    assert combined.mean.ravel().tolist() == [0.5, 0.5]
    assert combined.entropy.item() == pytest.approx(1)
    assert combined.mutual_information.item() == pytest.approx(1)


def test_between_the_two():
    h = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)  # noqa: E731
    combined = ensemble([0.9, 0.1], [0.6, 0.4])
    assert combined.entropy.item() == pytest.approx(h(0.75))
    assert combined.mutual_information.item() == pytest.approx(h(0.75) - (h(0.9) + h(0.6)) / 2)


def test_a_member_added_is_not_changed():
    first = torch.tensor([[0.9], [0.1]])
    combined = Ensemble()
    combined.add(first)
    combined.add(torch.tensor([[0.1], [0.9]]))
    assert first.ravel().tolist() == pytest.approx([0.9, 0.1])


def test_of_regions_the_most_doubtful_counts():
    """Two regions: in the first all members say one half, over the second two members contradict each other."""
    combined = Ensemble(is_regions=True)
    combined.add(torch.tensor([[0.5], [0.0]]))
    assert combined.entropy.item() == pytest.approx(1) and combined.mutual_information.item() == pytest.approx(
        0, abs=1e-6
    )
    combined.add(torch.tensor([[0.5], [1.0]]))
    assert combined.entropy.item() == pytest.approx(1) and combined.mutual_information.item() == pytest.approx(1)


def test_regions_that_are_all_certain_have_no_entropy():
    combined = Ensemble(is_regions=True)
    combined.add(torch.tensor([[1.0, 1.0, 0.25], [1.0, 0.0, 0.0]]))
    assert combined.entropy.tolist() == pytest.approx([0, 0, 0.8112781])
