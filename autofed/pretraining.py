"""From images that nobody labelled to weights that a training can begin with.

The network learns to restore patches from noise and missing squares, or cubes in 3D (denoising, Vincent et al., JMLR
2010; inpainting, Pathak et al., CVPR 2016), with a head for the channels instead of its own. The images are public: no
patient of a site is among them, and so nothing is charged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from autofed.batches import draw_patch, draw_view
from autofed.case import Dataset, in_words, open_unlabelled
from autofed.devices import place, ready, sent
from autofed.files import digest, file_digest
from autofed.network import build, weights_of
from autofed.parallel import Progress, silent
from autofed.plans import Network, Plan, Shape, Training
from autofed.prepared import Store, preprocess
from autofed.problems import Problems, refuse

FEWEST_IMAGES, MOST_IMAGES = 5, 500
"""Of fewer a network learns these alone; of more, so many are taken, evenly by name."""

LARGEST_BATCH = 16
SHARE = 0.1
"""Of the plan's hours, on top of them."""

FEWEST_STEPS, MOST_STEPS = 100, 2000
"""Less is no start worth having, more is better spent on the training itself."""

RATE = 2e-3
"""Adam's, at first; it falls to 0 as the plan's own does."""

NOISE = 0.3
"""Standard deviation of the noise, in that of the images."""

MISSING = 0.5
"""Share of the squares, or cubes, that are missing. Each is what one voxel of the fourth stage stands for."""

_STAGES = 4
_LOOKED_AT = 64
"""So many patches tell the mean and the spread of each channel."""


@dataclass(frozen=True)
class Learned:
    """Weights of the plan's network, of which those of its heads are as they begin, and what they were learned from.

    `errors` has each step's mean squared error over the variance of the images: 1 is what the mean of all gives.
    `images` names the files by what is in them.
    """

    weights: dict[str, np.ndarray]
    errors: np.ndarray
    count: int
    images: str
    batch: int

    @property
    def error(self) -> float:
        """The mean error of the last tenth of the steps."""
        return float(self.errors[-math.ceil(len(self.errors) / 10) :].mean())

    def words(self) -> dict[str, Any]:
        """For the header of the file with the weights."""
        return {"learned_from": "public images", "count": self.count, "images": self.images,
                "steps": len(self.errors), "batch": self.batch, "error": round(self.error, 4)}  # fmt: skip


def learn(
    plan: Plan,
    images: Path | str,
    work: Path,
    *,
    steps: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
) -> Learned:
    """Weights for the plan's network from a folder of images in raw layout; labels in it are not looked at.

    They are prepared in the folder `work`, and found there again. Patches are drawn, turned and mirrored as the plan's
    are; smaller images are padded. `steps` and the batch follow from the plan's budget (`length`) unless they are
    given. The same seed (the plan's) gives the same weights on the same machine. `Problems` if there are too few
    images, or others than the plan is for.
    """
    dataset = open_public(plan, images)
    store = _Images(_prepared(dataset, plan, work, progress), tuple(dataset.cases))
    batch, planned = length(plan)
    network = plan.local.network
    teacher = build(_with_restoring_head(network), seed=plan.local.training.seed)
    patches = _Patches(store, plan.local.training, batch, plan.local.training.seed)
    errors = _restore(teacher, network, patches, planned if steps is None else steps, device, progress)
    begun = weights_of(build(network, seed=plan.local.training.seed))
    learned = {name: array for name, array in weights_of(teacher).items() if not name.startswith("heads.")}
    files = {path.name: file_digest(path) for found in dataset.cases.values() for path in found.images}
    return Learned({**begun, **learned}, errors, len(store.cases), digest(files), batch)


def open_public(plan: Plan, folder: Path | str) -> Dataset:
    """The images that can be learned from; `Problems` if they are too few, or others than the plan is for."""
    dataset = open_unlabelled(folder)
    problems = [
        f"the images have {what}: {found}; the plan's are {planned}"
        for what in ("channels", "dimension")
        if (found := in_words(dataset.declaration(), what)) != (planned := in_words(plan.agreement, what))
    ]
    if len(dataset.cases) < FEWEST_IMAGES:
        problems.append(f"found {len(dataset.cases)} images; expected {FEWEST_IMAGES} or more")
    refuse(str(folder), problems)
    names = sorted(dataset.cases)
    taken = [names[i * len(names) // MOST_IMAGES] for i in range(MOST_IMAGES)] if len(names) > MOST_IMAGES else names
    return replace(dataset, cases={name: dataset.cases[name] for name in taken})


def length(plan: Plan) -> tuple[int, int]:
    """The batch and the number of steps that the plan's budget has.

    The batch is the largest of 16, 8, 4, 2 and 1 that fits the memory. The steps take a tenth of the hours at the
    measured speed, within bounds: the upper one where no hours are given or no speed is known.
    """
    network, patch, budget = _with_restoring_head(plan.local.network), plan.local.training.patch_size, plan.budget
    batch = LARGEST_BATCH
    while batch > 1 and network.training_bytes(patch, batch) > budget.memory_gb * 1e9:
        batch //= 2
    speeds = [budget.speed] if budget.speed else list(budget.site_speeds.values())
    if budget.hours is None or not speeds:
        return batch, MOST_STEPS
    seconds = max(speed.seconds(network, patch, batch) for speed in speeds)
    return batch, int(min(MOST_STEPS, max(FEWEST_STEPS, SHARE * 3600 * budget.hours / seconds)))


def _with_restoring_head(network: Network) -> Network:
    """The network with one head, for the channels."""
    return network.model_copy(update={"classes": network.in_channels, "deep_supervision": False})


# --- patches ---------------------------------------------------------------------------------------------------------


def _prepared(dataset: Dataset, plan: Plan, work: Path, progress: Progress) -> Mapping[str, Path]:
    """Where each image lies on the plan's grid."""
    folder, _ = preprocess(dataset, plan.local, work, progress=progress)
    return {case: folder / case for case in dataset.cases}


@dataclass(frozen=True)
class _Images:
    """A store of cases without labels: wherever one is asked for there is background, in no memory to speak of."""

    folders: Mapping[str, Path]
    cases: tuple[str, ...]

    @property
    def patients(self) -> Mapping[str, tuple[str, ...]]:
        return {case: (case,) for case in self.cases}

    def image(self, case: str) -> Any:
        return Store(self.folders, {}).image(case)

    def label(self, case: str) -> np.ndarray:
        return np.broadcast_to(np.int16(0), self.image(case).shape[1:])

    def locations(self, case: str) -> dict[int, np.ndarray]:
        return {}


@dataclass(frozen=True)
class _Patches:
    """Batches of patches, each named by its number and made from the seed and that alone."""

    images: _Images
    training: Training
    batch: int
    seed: int

    def __call__(self, step: int) -> np.ndarray:
        """The batch (B, C, *patch) of a step."""
        return np.stack([self.patch((self.seed, step, i)) for i in range(self.batch)])

    def patch(self, number: tuple[int, ...]) -> np.ndarray:
        """One patch (C, *patch), float32."""
        generator = np.random.default_rng(number)
        case = self.images.cases[int(generator.integers(len(self.images.cases)))]
        view = draw_view(self.training, generator)
        image, _ = draw_patch(cast("Store", self.images), case, self.training, view, generator)
        return np.ascontiguousarray(image, np.float32)

    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel, (1, C, 1, ...)."""
        found = [self.patch((self.seed, i)) for i in range(_LOOKED_AT)]
        axes = tuple(range(1, found[0].ndim))
        mean = np.mean([patch.mean(axes, np.float64) for patch in found], 0)
        square = np.mean([np.square(patch, dtype=np.float64).mean(axes) for patch in found], 0)
        std = np.sqrt(np.maximum(square - np.square(mean), 1e-12))
        shape = (1, -1, *(1 for _ in axes))
        return mean.reshape(shape).astype(np.float32), std.reshape(shape).astype(np.float32)


# --- restoring -------------------------------------------------------------------------------------------------------


def _restore(
    teacher: nn.Module, network: Network, patches: _Patches, steps: int, device: str, progress: Progress
) -> np.ndarray:
    """Teach a network to restore what was spoiled; the error of each step (float32)."""
    ready(device, "float32")
    module = place(teacher, network, device).train()
    optimiser = torch.optim.Adam(module.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, steps, power=0.9)
    mean, std = patches.scale()
    squares = _squares(network, patches.training.patch_size)
    errors = []
    for step in range(steps):
        whole = (patches(step) - mean) / std
        spoiled = _spoiled(whole, squares, np.random.default_rng((patches.seed, step, patches.batch)))
        seen = place(sent(spoiled * std + mean, device), network, device)  # on the plan's own scale
        loss = nn.functional.mse_loss(module(seen)[0], sent(whole, device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        errors.append(float(loss.detach()))
        progress("learning from public images", step + 1, steps)
    if not np.isfinite(errors).all():
        raise Problems("the public images", ["learning from them came to numbers that are not finite"])
    return np.asarray(errors, np.float32)


def _squares(network: Network, patch: Shape) -> tuple[int, ...]:
    """The edges of what is missing: along an axis that is hardly pooled, slices far apart, it is short."""
    pooled = [math.prod(stride[axis] for stride in network.strides[:_STAGES]) for axis in range(len(patch))]
    return tuple(min(edge, size) for edge, size in zip(pooled, patch, strict=True))


def _spoiled(whole: np.ndarray, squares: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Standardised patches (B, C, *patch) with noise on them, and squares of all channels set to their mean, 0."""
    counts = [math.ceil(size / edge) for size, edge in zip(whole.shape[2:], squares, strict=True)]
    kept = generator.random((len(whole), 1, *counts)) >= MISSING
    for axis, (edge, size) in enumerate(zip(squares, whole.shape[2:], strict=True), start=2):
        kept = kept.repeat(edge, axis).take(range(size), axis)
    noise = generator.standard_normal(whole.shape, np.float32)
    return (whole + np.float32(NOISE) * noise) * kept
