"""The only local training loop: patients are drawn by the mechanism's sampler, steps made by its `step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import nn

from autofed.data.labels import Labels
from autofed.messages import Arrays
from autofed.plans import LocalPlan, Network, Training
from autofed.preprocessing import Store
from autofed.privacy import Mechanism
from autofed.privacy.none import NoPrivacy
from autofed.training import batches
from autofed.training.devices import autocast, compiled, loss_scales, place, prepare_device, to_device
from autofed.training.effective_steps import effective_steps
from autofed.training.loss import Loss, make_loss
from autofed.training.network import build, load_weights, weights_of

PatchStream = Callable[..., Iterator[list[batches.PatchBatch]]]

_PUBLIC = 0x9B11C
"""Separates the random stream of public cases from that of patients."""


@dataclass(frozen=True)
class AuxiliaryLoss:
    """A further loss, on public cases with labels that were agreed on, and its weight.

    Its gradient, from so many `batches` of the plan's size and clipped to the length `clip` (or the plan's), is added
    to the mechanism's gradient of the patients; it depends on no patient.
    """

    store: Store
    labels: Labels
    weight: float
    batches: int = 1
    clip: float | None = None


@dataclass(frozen=True)
class LocalResult:
    """What a site's training resulted in: the weights, and the loss of every step that drew a patient (float32).

    `effective_steps` is how far the steps would have gone along a gradient of 1 (`autofed.training.effective_steps`),
    `momentum` what the optimiser carries, by the names of the weights; it is empty without momentum.
    """

    weights: dict[str, np.ndarray]
    losses: np.ndarray
    effective_steps: float
    momentum: dict[str, np.ndarray] = field(default_factory=dict)

    def update(self, before: Arrays) -> dict[str, np.ndarray]:
        """The weights less those before."""
        return {name: self.weights[name] - array for name, array in before.items()}


@dataclass(frozen=True)
class Schedule:
    """How many steps a training has, at which learning rates, and its random seed.

    `rate` gives the share of the plan's learning rate when so much of the `steps` is done, from 0 to 1. `seed`
    determines everything random, unless a private mechanism samples with its own key.
    """

    steps: int
    rate: Callable[[float], float]
    seed: Sequence[int]


@dataclass(frozen=True)
class GradientTerms:
    """What is added to each gradient after mechanism and clipping: none of it depends on a patient.

    `proximal` times the distance from the first weights (FedProx), the `correction` (SCAFFOLD), and the bounded
    gradient of an `auxiliary` loss on public images (DCFed).
    """

    proximal: float = 0.0
    correction: Arrays | None = None
    auxiliary: AuxiliaryLoss | None = None


@dataclass(frozen=True)
class Compute:
    """What a training runs on.

    `device` is "cpu", "cuda" or "mps". Patches are made by the `loader`, which may serve many trainings, or by one
    thread for this one. `on_step` is called after every step.
    """

    device: str = "cpu"
    loader: batches.PatchLoader | None = None
    on_step: Callable[[], None] = lambda: None


def fit(
    weights: Arrays,
    store: Store,
    local: LocalPlan,
    mechanism: Mechanism,
    schedule: Schedule,
    *,
    terms: GradientTerms | None = None,
    momentum: Arrays | None = None,
    labels: Labels | None = None,
    compute: Compute | None = None,
) -> LocalResult:
    """Train from `weights` on a site's patients.

    Args:
        weights: What the network starts from, by name.
        store: The patients, prepared on the plan's grid.
        local: The site's part of the plan: network and recipe.
        mechanism: What samples the patients and bounds their influence on a step.
        schedule: How many steps, at which rates, from which seed.
        terms: What is added to every gradient and depends on no patient; nothing by default.
        momentum: The momentum to start with, by name; by default it starts at zero, since momentum of weights that
            have since been averaged points elsewhere.
        labels: What the values of the site's label maps mean (see `make_loss`).
        compute: The device, the patch loader, and what is called after every step; a CPU by default.

    Returns:
        The new weights, the loss of each step, the effective number of steps, and the momentum.
    """
    terms, compute, seed = terms or GradientTerms(), compute or Compute(), schedule.seed
    torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    learner = Learner(local.network, local.training, compute.device, labels)
    load_weights(learner.module, weights)
    parameters = list(learner.named.values())
    optimiser = _optimiser(learner.named, local, momentum or {})
    patch_stream = batches.stream if compute.loader is None else compute.loader.stream
    additions = _additions(learner, terms, local.training, patch_stream, schedule)
    samples = islice(mechanism.sampler(list(store.patients), seed), schedule.steps)
    rates = [local.training.learning_rate * schedule.rate(step / schedule.steps) for step in range(schedule.steps)]
    losses: list[float] = []
    for step, patch_batches in enumerate(patch_stream(store, samples, local.training, seed)):
        _set_rate(optimiser, rates[step])
        step_losses: list[float] = []
        gradients = (learner.gradient(patch_batch, step_losses) for patch_batch in patch_batches)
        for parameter, gradient in zip(parameters, mechanism.step(gradients, parameters), strict=True):
            parameter.grad = gradient.detach()
        nn.utils.clip_grad_norm_(parameters, local.training.gradient_clip)
        for addition in additions:
            addition.add()
        optimiser.step()
        losses += [float(np.mean(step_losses))] if step_losses else []  # an empty sample has no loss
        compute.on_step()
    effective = effective_steps(rates, local.training.momentum, local.training.momentum > 0, terms.proximal)
    momentum_after = _momentum(optimiser, learner.named)
    return LocalResult(weights_of(learner.module), np.asarray(losses, dtype=np.float32), effective, momentum_after)


class Learner:
    """A network and its loss on a device, in the precision of the plan: one backward pass at a time.

    `named` are the parameters that learn, in the network's order; others have no gradient.
    """

    def __init__(self, network: Network, training: Training, device: str, labels: Labels | None = None):
        prepare_device(device, training.precision)
        module = build(network)
        self.module = place(module, network, device).train()
        self.named = {name: p for name, p in self.module.named_parameters() if training.learns(name)}
        self.module.requires_grad_(False)
        for parameter in self.named.values():
            parameter.requires_grad_(True)
        self._forward = compiled(self.module, training.compile, device)
        self.resolutions = len(module.heads)
        self._loss = make_loss(training, self.resolutions, labels)
        self._network, self._training, self._device = network, training, device

    def gradient(
        self, patch_batch: batches.PatchBatch, losses: list[float], loss_function: Loss | None = None
    ) -> list[torch.Tensor]:
        """The gradient of the mean loss over some patches, one tensor for each of `named`.

        The loss is appended to `losses`. `loss_function` replaces the loss of the patients. Which channels drop
        out follows from the patches' own seed: from a generator that goes on from patient to patient, leaving one out
        would change the others' gradients.

        Where float16 overflows, the pass is taken again with a smaller scale, so that no step is lost. If it overflows
        with all of them, which means in the network itself, the gradient is zero and there is no loss: a private
        mechanism has to bound every patient's.
        """
        image = place(to_device(patch_batch.image, self._device), self._network, self._device)
        label = to_device(patch_batch.label, self._device)
        scales = loss_scales(self._training.precision)
        for scale in scales:
            if self._network.dropout:
                torch.manual_seed(patch_batch.seed)
            loss, gradient = self._pass(image, label, scale, loss_function or self._loss)
            if len(scales) == 1 or all(bool(part.isfinite().all()) for part in gradient):
                losses.append(loss)
                return gradient
        return [torch.zeros_like(p) for p in self.named.values()]

    def _pass(
        self, image: torch.Tensor, label: torch.Tensor, scale: float, loss_function: Loss
    ) -> tuple[float, list[torch.Tensor]]:
        """The loss and its gradient, from a backward pass of `scale` times the loss."""
        for parameter in self.named.values():  # module.zero_grad would take 2 ms
            parameter.grad = None
        with autocast(self._training.precision, self._device):
            outputs = self._forward(image)
        value = loss_function([logits.float() for logits in outputs], label)
        torch.autograd.backward(value * scale)
        gradient = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.named.values()]
        for part in gradient if scale != 1 else []:
            part.mul_(1 / scale)  # a power of two: nothing is rounded
        return float(value.detach()), gradient


def _additions(
    learner: Learner, terms: GradientTerms, training: Training, patch_stream: PatchStream, schedule: Schedule
) -> list[_GradientCorrection | _AuxiliaryGradient]:
    """What is added to every gradient and depends on no patient (`GradientTerms`), in this order."""
    additions: list[_GradientCorrection | _AuxiliaryGradient] = []
    if terms.proximal or terms.correction:
        additions.append(_GradientCorrection(learner.named, terms.proximal, terms.correction or {}))
    if terms.auxiliary and terms.auxiliary.weight:
        additions.append(_AuxiliaryGradient(learner, terms.auxiliary, training, patch_stream, schedule))
    return additions


class _GradientCorrection:
    """Adds FedProx's proximal term and SCAFFOLD's correction to every gradient."""

    def __init__(self, named: Mapping[str, nn.Parameter], proximal: float, correction: Arrays):
        self._parameters = list(named.values())
        self._proximal = proximal
        self._start = [p.detach().clone() for p in self._parameters] if proximal else []
        self._correction = [torch.from_numpy(correction[n]).to(p) for n, p in named.items()] if correction else []

    def add(self) -> None:
        """Add them to the parameters' gradients."""
        for parameter, start in zip(self._parameters, self._start, strict=False):
            parameter.grad.add_(parameter.detach() - start, alpha=self._proximal)  # type: ignore[union-attr]
        for parameter, part in zip(self._parameters, self._correction, strict=False):
            parameter.grad.add_(part)  # type: ignore[union-attr]


class _AuxiliaryGradient:
    """Adds the gradient of the `AuxiliaryLoss` to every gradient."""

    def __init__(
        self,
        learner: Learner,
        auxiliary: AuxiliaryLoss,
        training: Training,
        patch_stream: PatchStream,
        schedule: Schedule,
    ):
        seed = (*schedule.seed, _PUBLIC)
        self._sampling = NoPrivacy(training.batch_size, auxiliary.batches)
        samples = islice(self._sampling.sampler(sorted(auxiliary.store.patients), seed), schedule.steps)
        self._patches = patch_stream(auxiliary.store, samples, training, seed)
        self._loss_function = make_loss(training, learner.resolutions, auxiliary.labels)
        self._learner, self._weight, self._clip = learner, auxiliary.weight, auxiliary.clip or training.gradient_clip

    def add(self) -> None:
        """Add the gradient of the next patches to that of the parameters, without changing what they have so far."""
        parameters = list(self._learner.named.values())
        patient_gradients = [p.grad for p in parameters]
        auxiliary_gradient = self._sampling.step(
            (self._learner.gradient(patch_batch, [], self._loss_function) for patch_batch in next(self._patches)),
            parameters,
        )
        norm = torch.sqrt(
            sum(
                (part.square().sum() for part in auxiliary_gradient),
                torch.zeros((), device=auxiliary_gradient[0].device),
            )
        )
        share = self._weight * float(torch.clamp(self._clip / (norm + 1e-6), max=1.0))
        for parameter, gradient, part in zip(parameters, patient_gradients, auxiliary_gradient, strict=True):
            parameter.grad = gradient.add_(part, alpha=share) if gradient is not None else part.mul_(share)


def _optimiser(named: Mapping[str, nn.Parameter], local: LocalPlan, momentum: Arrays) -> torch.optim.Optimizer:
    training = local.training
    optimiser = torch.optim.SGD(
        named.values(),
        lr=training.learning_rate,
        momentum=training.momentum,
        nesterov=training.momentum > 0,
        weight_decay=training.weight_decay,
    )
    for name, array in momentum.items():
        optimiser.state[named[name]]["momentum_buffer"] = torch.from_numpy(array.copy()).to(named[name])
    return optimiser


def _momentum(optimiser: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, np.ndarray]:
    """What the optimiser carries, by the names of the weights."""
    buffers = {name: optimiser.state[parameter].get("momentum_buffer") for name, parameter in named.items()}
    return {name: buffer.detach().cpu().numpy().copy() for name, buffer in buffers.items() if buffer is not None}


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
