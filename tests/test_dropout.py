"""Dropout: off unless a plan asks for it, and then on in training and in the further passes of a labelling alone."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from autofed.auditing.inversion import gradient_of
from autofed.data import Case
from autofed.data.images import Geometry
from autofed.inference.predictor import Member, Predictor, mean_probabilities
from autofed.inference.uncertainty import entropy
from autofed.plans import training_bytes
from autofed.training.batches import PatchBatch
from autofed.training.fit import Learner
from autofed.training.network import build, coupling_layers, weights_of
from tests.plans_made import small_plan

KINDS = ("unet", "resenc", "dcfed")
SHAPES = {"2d": (1, 16, 16), "3d": (16, 16, 16)}


def plan_of(kind="unet", shape="2d", dropout=0.4):
    plan = small_plan(SHAPES[shape], labels=1)
    blocks = [] if kind == "unet" else [1] * len(plan.local.network.features)
    return plan.change({"network.kind": kind, "network.blocks": blocks, "network.dropout": dropout})


def without(plan):
    return plan.change({"network.dropout": 0.0})


def picture(plan, seed=0):
    shape = (1, *plan.local.training.patch_size)[-3:]
    return np.random.default_rng(seed).normal(size=(len(plan.agreement.channels), *shape)).astype(np.float32)


# --- the plan


def test_a_plan_without_dropout_is_written_as_ever():
    plan = plan_of()
    still = without(plan).local.network
    assert "dropout" not in still.model_dump(mode="json") and plan.local.network.model_dump()["dropout"] == 0.4
    assert still.digest() == small_plan(SHAPES["2d"], labels=1).local.network.digest() != plan.local.network.digest()
    assert type(plan).parse(plan.model_dump(mode="json"), "a plan") == plan
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValidationError):
            type(still).model_validate(still.model_dump() | {"dropout": wrong})


def test_what_is_left_of_the_channels_is_counted_in_the_memory():
    plan = plan_of(shape="3d").local
    patch, width = (64, 64, 64), plan.network.features[0]
    plain = without(plan_of(shape="3d")).local.network
    more = training_bytes(plan.network, patch, 2) - training_bytes(plain, patch, 2)
    assert more >= 4 * 2 * 64**3 * width  # a map of the finest stage at least


# --- the network


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_channels_drop_out_on_the_way_up_in_training_alone(kind, shape):
    plan = plan_of(kind, shape)
    module, still = (build(made.local.network, seed=1) for made in (plan, without(plan)))
    assert list(module.state_dict()) == list(still.state_dict())
    assert all(
        np.array_equal(a, b) for a, b in zip(weights_of(module).values(), weights_of(still).values(), strict=True)
    )
    assert coupling_layers(module) == []
    image, lost = torch.randn(4, plan.local.network.in_channels, *plan.local.training.patch_size), []
    module.dropout.register_forward_hook(lambda _, put, out: lost.append((out == 0).flatten(2).float().mean(2)))
    module.train()(image)
    assert [maps.shape[1] for maps in lost] == list(reversed(plan.local.network.features))
    assert all(set(maps.unique().tolist()) <= {0.0, 1.0} for maps in lost)
    assert 0.1 < torch.cat([maps.flatten() for maps in lost]).mean() < 0.7
    assert len(lost[0].unique(dim=0)) > 1  # an image has losses of its own
    with torch.inference_mode():
        assert torch.equal(module.eval()(image), still.eval()(image))


def test_the_same_patches_lose_the_same_channels_and_others_others():
    plan = plan_of()
    learner = Learner(plan.local.network, plan.local.training, "cpu")
    image = np.random.default_rng(0).normal(size=(2, 1, *plan.local.training.patch_size)).astype(np.float32)
    image = np.repeat(image, plan.local.network.in_channels, 1)

    def gradient(seed):
        found = learner.gradient(PatchBatch(image, (image[:, :1] > 0).astype(np.int16), seed), [])
        return torch.cat([part.flatten() for part in found])

    first = gradient(3)
    torch.rand(5)
    assert torch.equal(gradient(3), first) and not torch.equal(gradient(4), first)


def test_who_attacks_a_gradient_is_not_hindered_by_dropout():
    plan = plan_of()
    weights = weights_of(build(plan.local.network, seed=1))
    image = picture(plan)[:, 0]
    found = [gradient_of(image, (image[0] > 0).astype(np.int16), weights, made.local) for made in (plan, without(plan))]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in weights)


# --- what it says


@pytest.mark.parametrize("kind", KINDS)
def test_further_passes_are_drawn_by_their_seed_and_leave_everything_as_it_was(kind):
    plan = plan_of(kind)
    network, image = build(plan.local.network, seed=1).eval(), picture(plan)
    torch.manual_seed(1)
    before = torch.get_rng_state()

    def mean(**options):
        return mean_probabilities(network, image, plan, "cpu", **options)

    plain, first = mean(), mean(passes=3, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    assert np.array_equal(mean(passes=3, seed=7), first) and np.array_equal(mean(), plain)
    assert not np.array_equal(mean(passes=3, seed=8), first) and not np.array_equal(first, plain)
    assert np.allclose(first.sum(0), 1, atol=1e-5)


def test_a_network_that_is_sure_is_less_so_with_passes():
    plan = plan_of(shape="3d")
    network = build(plan.local.network, seed=1).eval()
    with torch.no_grad():
        network.heads[0].conv.conv.weight.mul_(10)
    image = picture(plan)
    plain, passed = (mean_probabilities(network, image, plan, "cpu", passes=n, seed=7) for n in (0, 8))
    doubt = [float(entropy(torch.from_numpy(found)).mean()) for found in (plain, passed)]
    assert doubt[1] > 1.2 * doubt[0]


def test_predictions_know_no_dropout():
    plan = plan_of(shape="3d")
    weights = weights_of(build(plan.local.network, seed=1))
    case = Case("c", "c", picture(plan), None, (1.0,) * 3, Geometry(3, (1.0,) * 3, (0.0,) * 3))
    found = [Predictor([Member("one", made, lambda: weights)]).predict(case, probabilities=True)
             for made in (plan, without(plan))]  # fmt: skip
    assert np.array_equal(found[0].probabilities, found[1].probabilities)
