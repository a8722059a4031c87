"""Canary patients: pictures with wrong labels, each in or out of a training by a coin, that an audit looks for.

A network that was trained on such a picture errs on it in the way it was taught to; so its loss on it tells an attacker
whether it was there (as the loss tells Steinke et al. 2023, section 6): one who sees the final weights
(`loss_decrease_scores`), or one who has only a network that learned from its labels (`label_exposure_scores`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from autofed.auditing.one_run import Trial, releases
from autofed.data.labels import Labels
from autofed.messages import Arrays
from autofed.plans import Plan
from autofed.preprocessing import Store
from autofed.privacy import BatchSample, Gradient, Mechanism
from autofed.privacy.events import PrivacyEvent
from autofed.training.batches import IDENTITY, sample_patch
from autofed.training.devices import autocast, place
from autofed.training.fit import Compute, Schedule, fit
from autofed.training.loss import make_loss
from autofed.training.network import build, load_weights, set_dropout, weights_of

_BLOCKS = 4
"""A wrong label map has so many blocks along each axis, each of a value of its own."""

_SMOOTH = 1 / 12
"""Random pictures are smooth over this share of an edge."""

_DECOYS = 16
"""A canary's own wrong labels are compared with those of so many others."""

Score = Callable[[Iterator[Arrays]], np.ndarray]
"""An attacker: the score of every canary, in the order of their names, from the weights that a site has after each
round, or from what these were used for. It must read them to the end."""


@dataclass(frozen=True)
class Canaries(Store):
    """Patients in memory, one case each, of the size of a patch."""

    images: Mapping[str, np.ndarray] = field(default_factory=dict)
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)

    def image(self, case: str) -> Any:
        """The image (C, *grid), float32."""
        return self.images[case]

    def label(self, case: str) -> Any:
        """The wrong label map (*grid)."""
        return self.maps[case]

    def locations(self, case: str) -> dict[int, np.ndarray]:
        """None: patches are taken anywhere."""
        return {}


def make_canaries(plan: Plan, count: int, generator: np.random.Generator, site: Store | None = None) -> Canaries:
    """So many canaries for a plan: patches of a site's patients, at most one of each, or clouds of random values."""
    training, values = plan.local.training, sorted(Labels.of(plan.agreement).values)
    shape = (1, *training.patch_size)[-3:]
    if site is None:
        pictures = [make_picture(plan, generator) for _ in range(count)]
    else:
        patients = generator.permutation(sorted(site.patients))[:count]
        drawn = (sample_patch(site, patient, training, IDENTITY, generator)[0] for patient in patients)
        pictures = [np.ascontiguousarray(image, np.float32).reshape(-1, *shape) for image in drawn]
    names = [f"canary_{i:06d}" for i in range(len(pictures))]
    maps = [_blocks(shape, values, generator) for _ in names]
    each = {name: (name,) for name in names}
    return Canaries({}, each, (), dict(zip(names, pictures, strict=True)), dict(zip(names, maps, strict=True)))


def make_picture(plan: Plan, generator: np.random.Generator) -> np.ndarray:
    """Smooth random values (C, *grid) of mean 0 and deviation 1, as normalised images have them, of a patch's size."""
    shape = (len(plan.agreement.channels), *(1, *plan.local.training.patch_size)[-3:])
    image: np.ndarray = gaussian_filter(generator.standard_normal(shape), [0, *(edge * _SMOOTH for edge in shape[1:])])
    normalised: np.ndarray = ((image - image.mean()) / image.std()).astype(np.float32)
    return normalised


def _blocks(shape: Sequence[int], values: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """A label map (*grid) of random blocks."""
    coarse = generator.choice(values, size=[min(_BLOCKS, edge) for edge in shape])
    places = np.ix_(*(np.arange(edge) * n // edge for edge, n in zip(shape, coarse.shape, strict=True)))
    return coarse[places].astype(np.int16)


def attack(
    plan: Plan,
    mechanism: Mechanism,
    canaries: Canaries,
    steps: int,
    generator: np.random.Generator,
    score: Score,
    *,
    device: str = "cpu",
    on_step: Callable[[], None] = lambda: None,
) -> Trial:
    """Train the plan's network at one site, for all of its rounds of so many steps, on the canaries that are in.

    What the attacker makes of it is the `score`'s. `mechanism` is made for so many patients as there are canaries;
    whoever is out is drawn all the same and contributes nothing.

    Args:
        plan: The plan whose network and rounds are used.
        mechanism: Its mechanism, made for as many patients as there are canaries.
        canaries: The patients, of whom a coin decides who is in.
        steps: Local steps of a round.
        generator: Tosses the coins and gives the noise keys.
        score: What the attacker makes of the weights after each round: one number a canary.
        device: What trains.
        on_step: Is called after every step.
    """
    included = generator.random(len(canaries.patients)) < 0.5
    absent = frozenset(name for name, there in zip(sorted(canaries.patients), included, strict=True) if not there)
    events: list[PrivacyEvent] = []
    training = _Training(plan, canaries, absent, steps, Compute(device, on_step=on_step), start(plan))
    scores = score(_rounds(training, mechanism, generator, events))
    return Trial(scores, included, tuple(events))


def loss_decrease_scores(plan: Plan, canaries: Canaries, device: str = "cpu") -> Score:
    """The attacker who sees weights: by how much a canary's loss has fallen from the start to the end."""

    def loss_decrease(rounds: Iterator[Arrays]) -> np.ndarray:
        (last,) = deque(rounds, maxlen=1)
        before, after = (_losses(plan, canaries, weights, device)[0] for weights in (start(plan), last))
        decrease: np.ndarray = before - after
        return decrease

    return loss_decrease


def label_exposure_scores(plan: Plan, canaries: Canaries, weights: Arrays, device: str = "cpu") -> np.ndarray:
    """By how much better a network fits each canary's wrong labels to its picture than both are fitted otherwise.

    l(i, j) is the loss of the labels of canary j over the picture of canary i. The score is mean_j l(i, j) +
    mean_k l(k, i) - l(i, i) over some j and k: how hard a picture and how hard a label map is falls out, which differ
    far more than what a few echoes leave. Of canaries that were not learned all l are alike otherwise, since pictures
    and labels were drawn apart.
    """
    losses = _losses(plan, canaries, weights, device, min(_DECOYS, len(canaries.patients) - 1))
    of_picture = losses.mean(axis=0)
    of_labels = np.mean([np.roll(row, shift) for shift, row in enumerate(losses)], axis=0)
    scores: np.ndarray = of_picture + of_labels - losses[0]
    return scores


def start(plan: Plan) -> dict[str, np.ndarray]:
    """The weights that a plan's training starts from, as everybody knows who has the plan."""
    return weights_of(build(plan.local.network, seed=plan.local.training.seed))


def _rounds(
    training: _Training, mechanism: Mechanism, generator: np.random.Generator, events: list[PrivacyEvent]
) -> Iterator[Arrays]:
    """The weights after each round; what it cost is added to `events`."""
    rounds = training.plan.agreement.training.rounds
    for update, cost in releases(mechanism, rounds, training.steps, generator, training.update):
        events += cost
        training.weights = {name: array + update[name] for name, array in training.weights.items()}
        yield training.weights


@dataclass
class _Training:
    """A site that trains on the canaries that are in, with the weights and the momentum that it has come to."""

    plan: Plan
    canaries: Canaries
    absent: frozenset[str]
    steps: int
    compute: Compute
    weights: Arrays
    momentum: Arrays = field(default_factory=dict)

    def update(self, mechanism: Mechanism, round: int) -> Arrays:
        """What a round of the site, as it trains, makes of the weights; less those before."""
        rounds, training = self.plan.agreement.training, self.plan.local.training
        fitted = fit(
            self.weights,
            self.canaries,
            self.plan.local,
            cast(Mechanism, _Without(mechanism, self.absent)),
            Schedule(self.steps, lambda done: rounds.rate_at(round - 1 + done), (training.seed, round)),
            momentum=self.momentum,
            labels=Labels.of(self.plan.agreement),
            compute=self.compute,
        )
        self.momentum = fitted.momentum if training.keep_momentum else {}
        return fitted.update(self.weights)


@dataclass(frozen=True)
class _Without:
    """What training asks of a mechanism, with some patients replaced by nothing."""

    mechanism: Mechanism
    absent: frozenset[str]

    def sampler(self, patients: Sequence[str], seed: Sequence[int]) -> Iterator[BatchSample]:
        """Everyone is drawn; of the absent no gradient is taken."""
        for draw in self.mechanism.sampler(patients, seed):
            there = ([name for name in group if name not in self.absent] for group in draw)
            yield [group for group in there if group]

    def step(self, gradients: Iterator[Gradient], like: Gradient) -> Gradient:
        """The mechanism's own."""
        return self.mechanism.step(gradients, like)


def _losses(plan: Plan, canaries: Canaries, weights: Arrays, device: str, decoys: int = 0) -> np.ndarray:
    """The losses (1 + decoys, n) of the canaries in the order of their names.

    The first row is that under their own labels; row t that under the labels of the canary t places on. No
    channel drops out.
    """
    network, training = plan.local.network, plan.local.training
    module = build(network).train()
    set_dropout(module, False)
    load_weights(module, weights)
    place(module, network, device)
    loss = make_loss(training, len(module.heads), Labels.of(plan.agreement))
    names, shape = sorted(canaries.patients), tuple(training.patch_size)
    losses = np.zeros((1 + decoys, len(names)))
    for number, name in enumerate(names):
        image = torch.from_numpy(canaries.images[name].reshape(1, -1, *shape))
        with torch.no_grad(), autocast(training.precision, device):
            outputs = [logits.float() for logits in module(place(image, network, device))]
            for shift in range(1 + decoys):
                label_map = canaries.maps[names[(number + shift) % len(names)]]
                label = torch.from_numpy(label_map.reshape(1, 1, *shape)).to(device)
                losses[shift, number] = float(loss(outputs, label))
    return losses
