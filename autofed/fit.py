"""The only local training loop. It is handed the mechanism whose sampler it draws from and whose step it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from autofed import batches
from autofed.devices import arithmetic, compiled, loss_scales, place, ready, sent
from autofed.exchange import Arrays
from autofed.labels import Labels
from autofed.loss import make_loss
from autofed.network import build, load_weights, weights_of
from autofed.plans import Local, Network, Training
from autofed.prepared import Store
from autofed.privacy import Mechanism


@dataclass(frozen=True)
class Fitted:
    """What a site's training gave: the weights, and the loss of every step that drew somebody (float32)."""

    weights: dict[str, np.ndarray]
    losses: np.ndarray


def fit(
    weights: Arrays,
    store: Store,
    local: Local,
    mechanism: Mechanism,
    *,
    steps: int,
    rate: Callable[[float], float],
    seed: Sequence[int],
    labels: Labels | None = None,
    device: str = "cpu",
    feeder: batches.Feeder | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train from `weights` for so many steps on a site's patients.

    `rate` gives the share of the plan's learning rate when so much of these steps is done, from 0 to 1. The optimiser
    starts anew, since momentum of weights that have since been averaged points elsewhere. `labels` say what the values
    of the site's label maps mean (see `make_loss`). Patches are made by the `feeder`, which may serve many trainings,
    or by one thread for this one.
    """
    torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    learner = Learner(local.network, local.training, device, labels)
    load_weights(learner.module, weights)
    parameters = list(learner.module.parameters())
    optimiser = _optimiser(parameters, local)
    draws = islice(mechanism.sampler(list(store.patients), seed), steps)
    losses = []
    feed = batches.stream if feeder is None else feeder.stream
    for step, groups in enumerate(feed(store, draws, local.training, seed)):
        _set_rate(optimiser, local.training.learning_rate * rate(step / steps))
        found: list[float] = []
        gradients = (learner.gradient(group, found) for group in groups)
        _apply(parameters, mechanism.step(gradients, parameters), local.training.gradient_clip)
        optimiser.step()
        losses += [float(np.mean(found))] if found else []  # an empty draw has no loss
        on_step()
    return Fitted(weights_of(learner.module), np.asarray(losses, dtype=np.float32))


class Learner:
    """A network and its loss on a device, in the precision of the plan: one backward pass at a time."""

    def __init__(self, network: Network, training: Training, device: str, labels: Labels | None = None):
        ready(device, training.precision)
        module = build(network)
        self.module = place(module, network, device).train()
        self._forward = compiled(self.module, training.compile, device)
        self._loss = make_loss(training, len(module.heads), labels)
        self._network, self._training, self._device = network, training, device

    def gradient(self, patches: batches.Patches, losses: list[float]) -> list[torch.Tensor]:
        """The gradient of the mean loss over some patches, one tensor a parameter; the loss is appended to `losses`.

        Where float16 overflows, the pass is taken again with a smaller scale, so that no step is lost. If it overflows
        with all of them, which means in the network itself, the gradient is zero and there is no loss: a private
        mechanism has to bound every patient's.
        """
        image = place(sent(patches.image, self._device), self._network, self._device)
        label = sent(patches.label, self._device)
        scales = loss_scales(self._training.precision)
        for scale in scales:
            loss, found = self._pass(image, label, scale)
            if len(scales) == 1 or all(bool(part.isfinite().all()) for part in found):
                losses.append(loss)
                return found
        return [torch.zeros_like(p) for p in self.module.parameters()]

    def _pass(self, image: torch.Tensor, label: torch.Tensor, scale: float) -> tuple[float, list[torch.Tensor]]:
        """The loss, and its gradient, computed of `scale` times the loss."""
        self.module.zero_grad(set_to_none=True)
        with arithmetic(self._training.precision, self._device):
            outputs = self._forward(image)
        value = self._loss([logits.float() for logits in outputs], label)
        (value * scale).backward()
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.module.parameters()]
        for part in found if scale != 1 else []:
            part.mul_(1 / scale)  # a power of two: nothing is rounded
        return float(value.detach()), found


def _optimiser(parameters: list[nn.Parameter], local: Local) -> torch.optim.Optimizer:
    training = local.training
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        nesterov=training.momentum > 0,
        weight_decay=training.weight_decay,
    )


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _apply(parameters: list[nn.Parameter], gradient: list[torch.Tensor], clip: float) -> None:
    for parameter, part in zip(parameters, gradient, strict=True):
        parameter.grad = part.detach()
    nn.utils.clip_grad_norm_(parameters, clip)
