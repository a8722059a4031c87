"""The loss of classes and of regions against sums by hand, and what is not annotated has no say in it."""

import pytest
import torch

from autofed.data.labels import Labels
from autofed.training.loss import make_loss
from tests.plans_made import small_plan

TRAINING = small_plan().local.training
CLASSES = Labels.declared({"background": 0, "organ": 1, "tumour": 2, "ignore": 3})
REGIONS = Labels.declared({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, (1, 2))


def drawn(labels, shape=(2, 8, 8, 8), seed=0):
    """Logits at two resolutions, and labels of all values."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(0, labels.highest_value + 1, (shape[0], 1, *shape[1:]), generator=generator, dtype=torch.int16)
    sizes = (shape[1:], [n // 2 for n in shape[1:]])
    return [torch.randn(shape[0], labels.channels, *size, generator=generator) for size in sizes], maps


def gradients(loss, logits, maps):
    leaves = [part.clone().requires_grad_() for part in logits]
    value = loss(leaves, maps)
    value.backward()
    return value.item(), [leaf.grad for leaf in leaves]


def dice_of(probabilities, targets):
    """1 - Dice of each patch and channel, averaged."""
    both, all_ = (probabilities * targets).flatten(2).sum(-1), (probabilities + targets).flatten(2).sum(-1)
    return (1 - (2 * both + 1e-5) / (all_ + 1e-5)).mean()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_where_all_is_annotated_an_ignore_label_changes_nothing(batch_dice):
    training = TRAINING.model_copy(update={"batch_dice": batch_dice})
    logits, maps = drawn(CLASSES)
    maps = maps.clamp_max(2)
    plain, masked = (gradients(make_loss(training, 2, labels), logits, maps) for labels in (None, CLASSES))
    assert plain[0] == pytest.approx(masked[0], abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain[1], masked[1], strict=True))


def test_regions_are_binary_tasks_without_a_background():
    logits, maps = drawn(REGIONS)
    maps = maps.clamp_max(2)
    target = torch.cat([maps > 0, maps == 2], dim=1).float()
    p = torch.sigmoid(logits[0])
    entropy = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    loss_gradients = make_loss(TRAINING, 1, REGIONS)(logits[:1], maps)
    assert loss_gradients.item() == pytest.approx((dice_of(p, target) + entropy).item(), abs=1e-5)


def test_what_is_annotated_counts_as_if_the_rest_were_not_there():
    """A patch whose right half is ignored has the loss of its left half."""
    for labels in (CLASSES, REGIONS):
        logits, maps = drawn(labels)
        maps = maps.clamp_max(2)
        half = make_loss(TRAINING, 1, labels)([logits[0][..., :4]], maps[..., :4])
        maps[..., 4:] = labels.ignore
        assert make_loss(TRAINING, 1, labels)([logits[0]], maps).item() == pytest.approx(half.item(), abs=1e-6)


@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_ignored_voxels_have_no_influence(labels, batch_dice):
    """Whatever is predicted there, the loss is the same; and its gradient there is zero, elsewhere it is not."""
    loss = make_loss(TRAINING.model_copy(update={"batch_dice": batch_dice}), 2, labels)
    logits, maps = drawn(labels)
    maps[..., :4] = labels.ignore  # whole blocks, so that the coarser grid has the same border
    maps[..., 4:] = maps[..., 4:].clamp_max(2)
    value, loss_gradients = gradients(loss, logits, maps)
    other = [part.clone() for part in logits]
    for part, gradient in zip(other, loss_gradients, strict=True):
        edge = part.shape[-1] // 2
        part[..., :edge] = 50 * torch.randn_like(part[..., :edge])
        assert not gradient[..., :edge].any() and gradient[..., edge:].any()
    assert loss(other, maps).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("labels", [CLASSES, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_a_patch_that_nobody_annotated_teaches_nothing(labels, batch_dice):
    loss = make_loss(TRAINING.model_copy(update={"batch_dice": batch_dice}), 2, labels)
    logits, maps = drawn(labels)
    value, loss_gradients = gradients(loss, logits, torch.full_like(maps, labels.ignore))
    assert value == 0 and not any(gradient.any() for gradient in loss_gradients)
    mixed = maps.clamp_max(2)
    mixed[0] = labels.ignore
    value, loss_gradients = gradients(loss, logits, mixed)
    assert 0 < value < 10
    assert all(not gradient[0].any() and gradient[1].any() and gradient.isfinite().all() for gradient in loss_gradients)


# Structures that a site never annotated

PARTIAL = {
    "classes": Labels.declared({"background": 0, "organ": 1, "tumour": 2, "cyst": 3}).with_annotated(["tumour"]),
    "one of two": Labels.declared({"background": 0, "organ": 1, "tumour": 2}).with_annotated(["organ"]),
    "with ignore": CLASSES.with_annotated(["tumour"]),
}


def partial_maps(labels, seed=0):
    """Logits at two resolutions, and labels of background, what was annotated and ignore."""
    logits, maps = drawn(labels, seed=seed)
    there = {value for name, values in labels.structures if labels.is_annotated(name) for value in values}
    known = torch.tensor([v if v in {*there, labels.ignore} else 0 for v in range(labels.highest_value + 1)])
    return logits, known[maps.long()].to(torch.int16)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("labels", PARTIAL.values(), ids=PARTIAL)
def test_moving_probability_between_background_and_what_was_not_annotated_changes_nothing(labels, batch_dice):
    """The gradient along that direction is 0: for each class, its share of the logits' gradient is that of its p."""
    loss = make_loss(TRAINING.model_copy(update={"batch_dice": batch_dice}), 2, labels)
    logits, maps = partial_maps(labels)
    value, loss_gradients = gradients(loss, logits, maps)
    unknown = [k for k, name in enumerate(labels.names, start=1) if not labels.is_annotated(name)]
    background = maps[:, 0] == 0
    for part, gradient in zip(logits, loss_gradients, strict=True):
        p = part.softmax(1)
        for k in unknown:
            along = gradient[:, 0] / p[:, 0] - gradient[:, k] / p[:, k]  # p0 rises as much as pk falls
            assert along.abs().max() < 1e-6 < (gradient[:, 0] / p[:, 0]).abs().max()
    assert all((loss_gradients[0][:, k][background] <= 0).all() for k in unknown)  # descent pushes it down nowhere
    moved = []
    for part in logits:
        p = part.softmax(1)
        p[:, 0], p[:, unknown[0]] = 0.1 * p[:, 0], p[:, unknown[0]] + 0.9 * p[:, 0]
        moved.append(p.log())
    assert loss(moved, maps).item() == pytest.approx(value, abs=1e-6)


def test_what_is_known_to_be_absent_is_pushed_down():
    labels = PARTIAL["one of two"]
    logits, maps = partial_maps(labels)
    _, (gradient,) = gradients(make_loss(TRAINING, 1, labels.with_annotated(())), logits[:1], maps)
    assert (gradient[:, 2][maps[:, 0] == 0] > 0).all()


@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_loss_is_that_of_a_network_with_the_summed_probabilities(batch_dice):
    """Organ and cyst are one with the background: a task of two classes, whose probabilities are sums."""
    training, labels = TRAINING.model_copy(update={"batch_dice": batch_dice}), PARTIAL["classes"]
    logits, maps = partial_maps(labels)
    p = [part.softmax(1) for part in logits]
    two = [torch.stack([part[:, 0] + part[:, 1] + part[:, 3], part[:, 2]], 1).log() for part in p]
    expected_loss = make_loss(training, 2)(two, (maps == 2).to(torch.int16))
    assert make_loss(training, 2, labels)(logits, maps).item() == pytest.approx(expected_loss.item(), abs=1e-6)


def test_a_region_that_was_not_annotated_has_no_part_in_the_loss():
    labels = REGIONS.with_annotated(["whole"])
    logits, maps = drawn(REGIONS)
    value, loss_gradients = gradients(make_loss(TRAINING, 2, labels), logits, maps)
    assert all(not gradient[:, 1].any() and gradient[:, 0].any() for gradient in loss_gradients)
    alone = Labels.declared({"background": 0, "whole": [1, 2], "ignore": 3}, (1,))
    expected_loss = make_loss(TRAINING, 2, alone)([part[:, :1] for part in logits], maps)
    assert value == pytest.approx(expected_loss.item(), abs=1e-6)


def test_where_every_structure_was_annotated_the_loss_is_bit_for_bit_the_common_one():
    labels = Labels.declared({"background": 0, "organ": 1, "tumour": 2})
    logits, maps = drawn(labels)
    common, named = (
        gradients(make_loss(TRAINING, 2, chosen), logits, maps)
        for chosen in (None, labels.with_annotated(["tumour", "organ"]))
    )
    assert common[0] == named[0] and all(torch.equal(a, b) for a, b in zip(common[1], named[1], strict=True))
