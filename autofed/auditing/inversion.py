"""How much of a patient's patch can be seen in what a site released: the gradient-inversion attack.

Geiping et al., "Inverting Gradients - How easy is it to break privacy in federated learning?", NeurIPS 2020: an image
is sought whose gradient points where the released update points. The attacker knows the weights, the plan and, the
worst case, the label map. An instance norm hides brightness and contrast of an image from its gradient, so that a
reconstruction is compared after these were fitted, a blank one just as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from autofed.data.labels import Labels
from autofed.messages import Arrays
from autofed.parallel import Progress, silent
from autofed.plans import LocalPlan
from autofed.training.loss import make_loss
from autofed.training.network import build, load_weights, set_dropout

_RATE = 0.1
_VARIATION = 0.1
"""The weight of total variation, which keeps reconstructions smooth where gradients say little."""


@dataclass(frozen=True)
class ReconstructionMetrics:
    """How like the true patch a reconstruction is: 1 is the same in `ssim`, and `psnr` in dB has no upper end."""

    psnr: float
    ssim: float


@dataclass(frozen=True)
class Reconstruction:
    """An image (C, *patch), float32, and how like the true one it is."""

    image: np.ndarray
    likeness: ReconstructionMetrics


@dataclass(frozen=True)
class Inversion:
    """A patch (C, *patch), and its reconstructions from one update without and with the plan's mechanism.

    `blank` is how like the patch a blank image is, `label` how like it is its label map in the right brightness: what
    an attacker has who saw no update, without and with the label map.
    """

    mechanism: str
    truth: np.ndarray
    without: Reconstruction
    protected: Reconstruction
    blank: ReconstructionMetrics
    label: ReconstructionMetrics


def invert_gradient(
    update: Arrays,
    weights: Arrays,
    label: np.ndarray,
    local: LocalPlan,
    *,
    labels: Labels | None = None,
    iterations: int = 600,
    seed: int = 0,
    progress: Progress = silent,
) -> np.ndarray:
    """The image (C, *patch), float32, whose gradient at `weights` is most like the direction against the `update`.

    `update` is what was released of one local step, or of few, which led along nearly the same gradient; `label`
    (*patch) is the label map. Minimises 1 - cosine plus total variation by Adam, from noise (Geiping et al., eq. 4).

    Args:
        update: What was released, by the names of the weights.
        weights: Where the step began.
        label: The patch's label map (*patch), which the attacker knows.
        local: Network and training of the plan.
        labels: What the values of the label map mean.
        iterations: Steps of Adam.
        seed: Of the noise that it begins with.
        progress: Is called with what is being done, how many are done, and how many there are.
    """
    victim = _Victim(weights, label, local, labels)
    target = [-torch.from_numpy(np.ascontiguousarray(update[name])).float() for name in victim.names]
    generator = torch.Generator().manual_seed(seed)
    shape = (1, local.network.in_channels, *local.training.patch_size)
    image = torch.randn(shape, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([image], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    for iteration in range(iterations):
        loss = 1 - _cosine(victim.gradient(image), target) + _VARIATION * _variation(image)
        (image.grad,) = torch.autograd.grad(loss, image)
        optimiser.step()
        schedule.step()
        progress("reconstructing", iteration + 1, iterations)
    return image.detach()[0].numpy()


def gradient_of(
    image: np.ndarray, label: np.ndarray, weights: Arrays, local: LocalPlan, labels: Labels | None = None
) -> dict[str, np.ndarray]:
    """What training computes of one patch (C, *patch) with its label map (*patch): one array for each weight."""
    victim = _Victim(weights, label, local, labels)
    parts = victim.gradient(torch.from_numpy(image[None]).float(), further=False)
    return {name: part.detach().numpy() for name, part in zip(victim.names, parts, strict=True)}


def reconstruction_metrics(reconstructed: np.ndarray, truth: np.ndarray) -> ReconstructionMetrics:
    """PSNR and SSIM of an image (C, *patch) beside the true one, each channel's brightness and contrast fitted."""
    from monai.metrics.regression import PSNRMetric, SSIMMetric

    fitted = torch.from_numpy(fit_intensities(reconstructed, truth))[None].float()
    true = torch.from_numpy(truth)[None].float()
    span = float(true.max() - true.min()) or 1.0
    window = min(7, *truth.shape[1:])
    ssim = torch.as_tensor(SSIMMetric(truth.ndim - 1, span, win_size=window - 1 + window % 2)(fitted, true))
    psnr = torch.as_tensor(PSNRMetric(span)(fitted, true))
    return ReconstructionMetrics(float(psnr.mean()), float(ssim.mean()))


def fit_intensities(reconstructed: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`reconstructed` with each channel scaled and shifted to be nearest to `truth` in the sense of least squares."""
    fitted = np.empty_like(truth, np.float32)
    for channel, (one, true) in enumerate(zip(reconstructed.astype(float), truth.astype(float), strict=True)):
        spread = one.var()
        slope = np.mean((one - one.mean()) * (true - true.mean())) / spread if spread > 0 else 0.0
        fitted[channel] = true.mean() + slope * (one - one.mean())
    return fitted


def paint_labels(label: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """An image (C, *patch) of each label value's mean brightness: all that a label map (*patch) tells."""
    image = np.empty_like(truth, np.float32)
    for value in np.unique(label):
        image[:, label == value] = truth[:, label == value].mean(1, keepdims=True)
    return image


class _Victim:
    """The network and loss whose gradients are known, at known weights. No channel drops out: nothing is hidden."""

    def __init__(self, weights: Arrays, label: np.ndarray, local: LocalPlan, labels: Labels | None):
        self._module = build(local.network).train()
        set_dropout(self._module, False)
        load_weights(self._module, weights)
        self._loss = make_loss(local.training, len(self._module.heads), labels)
        self._label = torch.from_numpy(label[None, None].astype(np.int16))
        learning = {name: p for name, p in self._module.named_parameters() if local.training.learns(name)}
        self.names, self._parameters = list(learning), list(learning.values())

    def gradient(self, image: torch.Tensor, *, further: bool = True) -> Sequence[torch.Tensor]:
        """The gradient of the weights; with `further` it can itself be derived by the image."""
        loss = self._loss(self._module(image), self._label)
        return torch.autograd.grad(loss, self._parameters, create_graph=further)


def _cosine(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of two gradients as whole vectors."""
    product = sum((a * b).sum() for a, b in zip(one, other, strict=True))
    lengths = [torch.sqrt(sum((a * a).sum() for a in parts)) for parts in (one, other)]  # type: ignore[arg-type]
    return product / (lengths[0] * lengths[1]).clamp_min(1e-12)


def _variation(image: torch.Tensor) -> torch.Tensor:
    """The mean step from a voxel to the next, over all axes, for an image of contrast 1."""
    steps = sum((image.diff(dim=axis).abs().mean() for axis in range(2, image.ndim)), torch.zeros(()))
    return steps / image.detach().std().clamp_min(1e-6)
