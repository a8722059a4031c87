"""The training loop takes the mechanism's step, follows the schedule, and learns."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from autofed.data.labels import Labels
from autofed.privacy.none import NoPrivacy
from autofed.training.fit import AuxiliaryLoss, Compute, GradientTerms, Learner, Schedule, fit
from autofed.training.loss import make_loss
from autofed.training.network import build, weights_of


def poly(begun, share):
    """nnU-Net's schedule over the part of a training that begins at `begun`."""
    return lambda done: (1 - begun - share * done) ** 0.9


def at_full_rate(steps):
    """So many steps, each at the rate of the plan."""
    return Schedule(steps, lambda done: 1, (1,))


def train(
    lone_site, mechanism=None, steps=4, seed=(1,), begun=0.0, share=1.0, weights=None, auxiliary=None, **settings
):
    plan, store = lone_site
    local = plan.change(settings).local if settings else plan.local
    weights = weights or weights_of(build(local.network, seed=1))
    rate, chosen = poly(begun, share), mechanism or NoPrivacy(2)
    return fit(weights, store, local, chosen, Schedule(steps, rate, seed), terms=GradientTerms(auxiliary=auxiliary))


def test_the_same_seed_gives_the_same_weights_to_the_bit(lone_site):
    once, again, other = train(lone_site), train(lone_site), train(lone_site, seed=(2,))
    assert all(np.array_equal(once.weights[n], again.weights[n]) for n in once.weights)
    assert np.array_equal(once.losses, again.losses)
    assert any(not np.array_equal(once.weights[n], other.weights[n]) for n in once.weights)


def test_training_lowers_the_loss(lone_site):
    fitted = train(lone_site, steps=40, **{"learning_rate": 0.05, "network.features": [8, 16, 16]})
    assert fitted.losses[-8:].mean() < 0.75 * fitted.losses[:4].mean()


def test_the_weights_given_are_left_as_they_are(lone_site):
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    before = {n: w.copy() for n, w in weights.items()}
    train(lone_site, weights=weights, steps=2)
    assert all(np.array_equal(before[n], weights[n]) for n in weights)


@dataclass(frozen=True)
class _Recording(NoPrivacy):
    """Notes what it is asked, and steps along nothing."""

    seen: list = field(default_factory=list)

    def sampler(self, patients, seed):
        while True:
            yield [[patients[0]], [patients[1], patients[1]]]

    def step(self, gradients, like):
        groups = [[part.clone() for part in g] for g in gradients]
        self.seen.append(len(groups))
        return [torch.zeros_like(part) for part in groups[0]]


def test_the_mechanism_draws_and_takes_every_step(lone_site):
    mechanism = _Recording(batch_size=1)
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    fitted = train(lone_site, mechanism, steps=3, weights=weights, weight_decay=0)
    assert mechanism.seen == [2, 2, 2]  # one backward pass for each group of the draw
    assert all(np.array_equal(fitted.weights[n], weights[n]) for n in weights)


def auxiliary(lone_site, weight=1.0, **more):
    """The site's own cases as if they were public ones."""
    plan, store = lone_site
    return AuxiliaryLoss(store, replace(Labels.of(plan.agreement), ignore=255), weight, **more)


def test_public_cases_are_learned_outside_of_the_mechanism(lone_site):
    """It sees as many gradients as without them, and what it makes of these has no part in theirs."""
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    mechanism = _Recording(batch_size=1)
    fitted = train(lone_site, mechanism, steps=3, weights=weights, weight_decay=0, auxiliary=auxiliary(lone_site))
    assert mechanism.seen == [2, 2, 2]
    assert all(not np.array_equal(fitted.weights[n], weights[n]) for n in weights if weights[n].ndim > 1)
    plain, same_draws = train(lone_site), train(lone_site, auxiliary=auxiliary(lone_site, 0.0))
    assert all(np.array_equal(plain.weights[n], same_draws.weights[n]) for n in weights)


def test_public_cases_weigh_what_they_are_said_to_and_have_the_clip_of_their_own(lone_site):
    """One step of plain descent from rest goes weight times the clipped gradient."""
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    plain = {"learning_rate": 0.01, "training.momentum": 0, "weight_decay": 0}

    def way(weight, clip=None, **settings):
        public_loss = auxiliary(lone_site, weight, clip=clip)
        fitted = train(
            lone_site, _Recording(batch_size=1), 1, weights=weights, auxiliary=public_loss, **plain, **settings
        )
        return sum(float(((fitted.weights[n] - weights[n]) ** 2).sum()) for n in weights) ** 0.5

    assert way(1000.0, gradient_clip=1e-3) == pytest.approx(0.01 * 1000 * 1e-3, rel=1e-2)
    assert way(500.0, gradient_clip=1e-3) == pytest.approx(0.01 * 500 * 1e-3, rel=1e-2)
    assert way(500.0, gradient_clip=1e6, clip=2e-3) == pytest.approx(0.01 * 500 * 2e-3, rel=1e-2)


def test_public_cases_come_in_as_many_batches_as_wanted_and_their_gradients_are_averaged(lone_site, monkeypatch):
    seen, gradient = [], Learner.gradient

    def spied(self, patches, losses, measure=None):
        found = gradient(self, patches, losses, measure)
        seen.extend([[part.clone() for part in found]] if measure else [])
        return found

    monkeypatch.setattr(Learner, "gradient", spied)
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    plain = {"learning_rate": 1.0, "training.momentum": 0, "weight_decay": 0, "gradient_clip": 1e6}
    fitted = train(
        lone_site, _Recording(batch_size=1), 1, weights=weights, auxiliary=auxiliary(lone_site, batches=3), **plain
    )
    assert len(seen) == 3
    for (name, before), *parts in zip(weights.items(), *seen, strict=True):
        mean = sum(part.numpy() for part in parts) / 3
        assert fitted.weights[name] - before == pytest.approx(-mean, abs=1e-5)


def test_public_cases_teach_what_the_patients_do(lone_site):
    """With the decoder alone, the way down stays as it began for both."""
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    parts = {"trained": "decoder", "weight_decay": 0}
    fitted = train(lone_site, _Recording(batch_size=1), 2, weights=weights, auxiliary=auxiliary(lone_site), **parts)
    moved = {n.split(".")[0] for n in weights if not np.array_equal(fitted.weights[n], weights[n])}
    assert moved == {"up", "heads"}


def test_a_zero_learning_rate_at_the_end_of_the_schedule(lone_site):
    """The last step of a training that is over moves nothing: (1 - t)^0.9 is 0 at t = 1."""
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    fitted = train(lone_site, steps=1, begun=1.0, share=0.0, weights=weights)
    assert all(np.array_equal(fitted.weights[n], weights[n]) for n in weights)


@dataclass(frozen=True)
class _Push(NoPrivacy):
    """Takes every step along the same gradient, which is all ones and of the norm asked for."""

    norm: float = 1.0

    def step(self, gradients, like):
        ones = [torch.ones_like(part) for part in list(gradients)[0]]
        size = sum(part.numel() for part in ones) ** 0.5
        return [part * (self.norm / size) for part in ones]


def way_of(lone_site, norm, steps, begun, share, **settings):
    """How far the weights go, in learning rates."""
    weights = weights_of(build(lone_site[0].local.network, seed=1))
    plain = {"learning_rate": 0.01, "training.momentum": 0, "weight_decay": 0, **settings}
    fitted = train(lone_site, _Push(2, norm=norm), steps, begun=begun, share=share, weights=weights, **plain)
    return sum(float(((fitted.weights[n] - weights[n]) ** 2).sum()) for n in weights) ** 0.5 / 0.01


def test_a_gradient_longer_than_the_clip_is_shortened_to_it_and_others_are_left(lone_site):
    assert way_of(lone_site, 500.0, 1, 0, 1, gradient_clip=3) == pytest.approx(3, rel=1e-3)
    assert way_of(lone_site, 2.0, 1, 0, 1, gradient_clip=3) == pytest.approx(2, rel=1e-3)


def test_the_learning_rate_falls_with_the_power_of_nine_tenths(lone_site):
    assert way_of(lone_site, 1.0, 1, 0.6, 0.2) == pytest.approx(0.4**0.9, rel=1e-3)
    expected = sum((1 - t) ** 0.9 for t in (0.2, 0.4, 0.6, 0.8))
    assert way_of(lone_site, 1.0, 4, 0.2, 0.8) == pytest.approx(expected, rel=1e-3)


PLAIN = {"learning_rate": 0.01, "training.momentum": 0, "weight_decay": 0, "gradient_clip": 3}


def test_the_correction_is_added_after_the_clip_to_every_step(lone_site):
    start = weights_of(build(lone_site[0].local.network, seed=1))
    ones = {name: np.full_like(array, 2.0) for name, array in start.items()}
    made = lone_site[0].change(PLAIN).local
    terms = GradientTerms(correction=ones)
    found = fit(start, lone_site[1], made, _Push(2, norm=0.0), at_full_rate(3), terms=terms)
    assert all(np.allclose(found.weights[n] - start[n], -0.01 * 3 * 2.0, atol=1e-5) for n in start)
    assert found.effective_steps == pytest.approx(0.03)


def test_the_proximal_term_pulls_back_to_the_start_by_the_way_so_far(lone_site):
    start = weights_of(build(lone_site[0].local.network, seed=1))
    made = lone_site[0].change(PLAIN | {"learning_rate": 0.1}).local
    fits = {mu: fit(start, lone_site[1], made, _Push(2, norm=1.0), at_full_rate(5), terms=GradientTerms(mu))
            for mu in (0.0, 4.0)}  # fmt: skip
    way = {mu: np.sqrt(sum(((f.weights[n] - start[n]) ** 2).sum() for n in start)) for mu, f in fits.items()}
    assert way[0.0] == pytest.approx(0.5, rel=1e-3)
    assert way[4.0] == pytest.approx(0.1 * sum(0.6**k for k in range(5)), rel=1e-3)
    assert {mu: f.effective_steps for mu, f in fits.items()} == pytest.approx(way, rel=1e-3)


def test_two_halves_with_the_momentum_carried_over_are_the_whole(lone_site):
    """Along gradients that are always the same; without it the second half begins at rest."""
    start = weights_of(build(lone_site[0].local.network, seed=1))
    made = lone_site[0].change(PLAIN | {"training.momentum": 0.9}).local
    go = lambda weights, steps, momentum=None: fit(  # noqa: E731
        weights, lone_site[1], made, _Push(2, norm=1.0), at_full_rate(steps), momentum=momentum
    )
    whole, half = go(start, 6), go(start, 3)
    carried, anew = go(half.weights, 3, half.momentum), go(half.weights, 3)
    assert all(np.allclose(carried.weights[n], whole.weights[n], atol=1e-6) for n in start)
    assert not any(np.allclose(anew.weights[n], whole.weights[n], atol=1e-6) for n in start)
    assert set(half.momentum) == set(start)


def test_progress_is_told_of_every_step(lone_site):
    plan, store = lone_site
    steps = []
    weights = weights_of(build(plan.local.network, seed=1))
    compute = Compute(on_step=lambda: steps.append(1))
    fit(weights, store, plan.local, NoPrivacy(1), Schedule(3, poly(0, 1), (1,)), compute=compute)
    assert len(steps) == 3


def test_loss_is_small_for_a_perfect_answer_and_large_for_a_wrong_one(lone_site):
    local = lone_site[0].local
    label = torch.zeros(1, 1, 16, 16, 16, dtype=torch.int16)
    label[..., 4:12] = 1
    right = torch.stack([(label[:, 0] == k).float() * 20 for k in range(2)], dim=1)
    coarse = right[..., ::2, ::2, ::2]
    loss = make_loss(local.training, 2)
    assert loss([right, coarse], label) < 0.01
    assert loss([-right, -coarse], label) > 5
    # the finer resolution weighs twice as much as the coarser
    fine_wrong, coarse_wrong = loss([-right, coarse], label).item(), loss([right, -coarse], label).item()
    assert fine_wrong == pytest.approx(2 * coarse_wrong, rel=0.05)


def test_batch_dice_counts_all_patches_as_one(lone_site):
    """One patch is answered perfectly, the other holds nothing and has false positives: Dice 1 and 0, or one in all."""
    local = lone_site[0].local
    label = torch.zeros(2, 1, 16, 16, 16, dtype=torch.int16)
    label[0, ..., :4] = 1
    answer = label[:, 0].clone()
    answer[1, ..., :4] = 1
    logits = torch.stack([(answer == k).float() * 20 for k in range(2)], dim=1)
    training = local.training
    losses = {
        batch: make_loss(training.model_copy(update={"batch_dice": batch}), 1)([logits], label).item()
        for batch in (False, True)
    }
    cross_entropy = torch.nn.functional.cross_entropy(logits, label[:, 0].long()).item()
    assert losses[False] == pytest.approx(cross_entropy + 1 - (1 + 0) / 2, abs=1e-3)
    assert losses[True] == pytest.approx(cross_entropy + 1 - 2 / 3, abs=1e-3)
