"""From a scan to labels and uncertainty on the scan's own grid: sliding window, mirroring, ensemble."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference

from autofed.data import DECLARED, Case, describe_regions
from autofed.data.images import Geometry
from autofed.data.labels import Labels, mask
from autofed.errors import ValidationErrors, raise_if_any
from autofed.inference.postprocessing import NOTHING, Postprocessing
from autofed.inference.uncertainty import Ensemble
from autofed.messages import Arrays
from autofed.plans import Plan
from autofed.preprocessing import InverseTransform, preprocess_case, restore, restore_labels, restore_regions
from autofed.training.devices import autocast
from autofed.training.network import UNet, build, load_weights, set_dropout

_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True)
class Structure:
    """One structure in one scan: its size, and the range of it over the sets of weights.

    `measure` says what the size is: "volume_ml" or "area_mm2", and without millimetres "volume_voxels" or
    "area_pixels". All three sizes are on one scale (see `_structures`), but the range need not hold `size`: the
    structure in the ensemble's mean may be smaller or larger than that of any single member.
    """

    voxels: int
    measure: str
    size: float
    smallest: float
    largest: float


@dataclass(frozen=True, repr=False)
class Prediction:
    """An ensemble's prediction for one scan, on the scan's own grid (Z, Y, X).

    `labels` uint8; `entropy` and `mutual_information` float32 in [0, 1] (shares of ln K, of regions of ln 2);
    `probabilities` float16 (K, Z, Y, X) only on request; `structures` by name; `members` sets of weights times
    mirrored images.
    """

    labels: np.ndarray
    entropy: np.ndarray
    mutual_information: np.ndarray
    structures: Mapping[str, Structure]
    members: int
    plan_digest: str
    weights_digest: str
    probabilities: np.ndarray | None = None

    def __repr__(self) -> str:
        """Its size and its structures, but no map."""
        shape = " x ".join(map(str, self.labels.shape))
        structures = self.structures.items()
        sizes = ", ".join(f"{name} {s.size:.4g} {s.measure.partition('_')[2]}" for name, s in structures)
        return f"Prediction({shape} voxels; {sizes or 'no structures'}; {self.members} members)"


@dataclass(frozen=True)
class Member:
    """One set of weights of the ensemble, the plan it was trained under, and a function that reads it.

    `annotated` are the structures that it learned, if its site annotated some only and it was never averaged with
    others.
    """

    name: str
    plan: Plan
    read: Callable[[], Arrays]
    annotated: tuple[str, ...] = ()


class Predictor:
    """An ensemble ready to predict, case by case, with one network in memory at a time.

    `ValidationErrors` if members differ in labels, channels or the grid they were prepared on, or if weights do not fit
    their plan; everything is checked before the first case.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        device: str = "cpu",
        mirroring: bool = True,
        postprocessing: Postprocessing = NOTHING,
    ):
        _check(members)
        self.postprocessing = postprocessing
        self.members = tuple(members)
        self.plan = members[0].plan
        self.labels = Labels.of(self.plan.agreement)
        self.device = device
        self.mirroring = mirroring
        self._networks: dict[str, UNet] = {}
        digest = hashlib.sha256()
        for member in self.members:
            weights = member.read()
            load_weights(self._network(member.plan), weights, member.name)
            for name in sorted(weights):
                digest.update(np.ascontiguousarray(weights[name]).tobytes())
        self.weights_digest = digest.hexdigest()

    def predict(self, case: Case, *, probabilities: bool = False) -> Prediction:
        """The prediction for one case, whose label (if any) is not used."""
        raise_if_any(case.id, _case_problems(case, self.plan))
        local, labels = self.plan.local, self.labels
        preprocessed = preprocess_case(case, local.geometry, local.intensity)
        ensemble, member_counts = Ensemble(is_regions=labels.is_regions), []
        for member in self.members:
            member_counts.append(self._add(member, preprocessed.image, ensemble))
        mean = ensemble.mean.cpu().numpy()
        inverse = preprocessed.inverse
        label_map = restore_regions(mean, inverse, labels.order) if labels.is_regions else restore_labels(mean, inverse)
        label_map = self.postprocessing.apply(label_map, self.plan.agreement.labels)
        return Prediction(
            labels=label_map,
            entropy=_restored(ensemble.entropy, inverse),
            mutual_information=_restored(ensemble.mutual_information, inverse),
            structures=_structures(label_map, _value_counts(ensemble, labels), member_counts, labels, inverse),
            members=ensemble.members,
            plan_digest=self.plan.digest(),
            weights_digest=self.weights_digest,
            probabilities=_restored_probabilities(mean, inverse, labels) if probabilities else None,
        )

    def _add(self, member: Member, image: np.ndarray, ensemble: Ensemble) -> np.ndarray:
        """Add a member's predictions, one for each mirroring; returns its voxels of each value on the plan's grid."""
        network = self._network(member.plan)
        load_weights(network, member.read(), member.name)
        network.eval()
        axes = member.plan.inference.mirror_axes if self.mirroring else ()
        member_ensemble, labels = (
            Ensemble(is_regions=self.labels.is_regions),
            self.labels.with_annotated(member.annotated),
        )
        for full_probabilities in mirrored_probabilities(network, image, member.plan, axes, self.device):
            probabilities = _of_annotated(full_probabilities, labels)
            ensemble.add(probabilities)
            member_ensemble.add(probabilities)
        return _value_counts(member_ensemble, self.labels)

    def _network(self, plan: Plan) -> UNet:
        key = plan.local.network.digest()
        if key not in self._networks:
            self._networks[key] = build(plan.local.network).to(self.device)
        return self._networks[key]


def mean_probabilities(
    network: UNet, image: np.ndarray, plan: Plan, device: str, *, passes: int = 0, seed: int = 0
) -> np.ndarray:
    """Mean probabilities (K, *grid), float32, over all mirrorings of an image (C, *grid).

    Further `passes` over all mirrorings have dropout (Gal and Ghahramani, ICML 2016), determined by the `seed` alone;
    torch's generator is restored, and the network's dropout is off afterwards.

    Computed in the precision of the plan's training: on a machine that is fast in bfloat16, in a third of the time.

    Args:
        network: On the device, in evaluation mode.
        image: (C, *grid), float32, preprocessed.
        plan: Patch size, overlap, mirrored axes and precision.
        device: Where to compute.
        passes: Further passes, with dropout.
        seed: Determines which channels drop out.
    """
    total, count = torch.zeros(()), 0
    devices = [] if device == "cpu" or not passes else [torch.accelerator.current_device_index()]
    with autocast(plan.local.training.precision, device), torch.random.fork_rng(devices, enabled=passes > 0):
        if passes:
            torch.manual_seed(seed)
        for number in range(1 + passes):
            set_dropout(network, number > 0)
            for probabilities in mirrored_probabilities(
                network, image, plan, plan.inference.mirror_axes, device, at_once=_images_at_once(image, plan)
            ):
                total, count = total.to(device) + probabilities, count + 1
    set_dropout(network, False)
    return (total / count).cpu().numpy()


def combine_members(
    means: Sequence[np.ndarray], inverse: InverseTransform, plan: Plan
) -> tuple[np.ndarray, np.ndarray]:
    """The mean of members' probabilities, each (K, *grid), on the grid of the image's file.

    Mean probabilities (K, Z, Y, X), float16, and the entropy of the mean (Z, Y, X), float32 in [0, 1].
    """
    labels = Labels.of(plan.agreement)
    ensemble = Ensemble(is_regions=labels.is_regions)
    for mean in means:
        ensemble.add(torch.from_numpy(mean.astype(np.float32)))
    return _restored_probabilities(ensemble.mean.numpy(), inverse, labels), _restored(ensemble.entropy, inverse)


def _images_at_once(image: np.ndarray, plan: Plan) -> int:
    """How many images (C, *grid) have about as many voxels as the windows that are computed at once."""
    window = math.prod(plan.local.training.patch_size)
    return max(1, _WINDOWS_AT_ONCE * window // math.prod(image.shape[-plan.local.axes :]))


def _of_annotated(probabilities: torch.Tensor, labels: Labels) -> torch.Tensor:
    """Probabilities (K, *grid), 0 for structures that were not annotated; those of a class go to the background."""
    unknown = list(labels.unannotated_channels)
    if not unknown:
        return probabilities
    masked = probabilities.clone()
    if not labels.is_regions:
        masked[0] += masked[unknown].sum(0)
    masked[unknown] = 0
    return masked


@torch.inference_mode()
def mirrored_probabilities(
    network: UNet, image: np.ndarray, plan: Plan, axes: Sequence[int], device: str, at_once: int = 1
) -> Iterator[torch.Tensor]:
    """Probabilities (K, *grid) of an image (C, *grid), once for each set of mirrored axes, `at_once` in a batch.

    Args:
        network: On the device, in evaluation mode.
        image: (C, *grid), float32, preprocessed.
        plan: Patch size, overlap and precision.
        axes: The axes of the grid that are mirrored, in all their combinations.
        device: Where to compute.
        at_once: How many mirrored images share a batch.
    """
    tensor = torch.from_numpy(image).to(device)
    flat = plan.local.axes == 2
    is_regions = Labels.of(plan.agreement).is_regions
    mirrorings = chain.from_iterable(combinations(axes, n) for n in range(len(axes) + 1))
    flips = [[axis + (2 if flat else 1) for axis in mirrored] for mirrored in mirrorings]
    for first in range(0, len(flips), at_once):
        batch_flips = flips[first : first + at_once]
        batch = torch.stack([tensor.flip(flip) for flip in batch_flips])
        logits = (_slices if flat else _windows)(network, batch, plan).float()
        for flipped_logits, flip in zip(logits, batch_flips, strict=True):
            class_logits = flipped_logits.flip(flip)
            yield torch.sigmoid(class_logits) if is_regions else torch.softmax(class_logits, dim=0)


def _slices(network: UNet, image: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Slice by slice along the first axis of the grid."""
    return torch.stack([_windows(network, image[:, :, z], plan) for z in range(image.shape[2])], dim=2)


def _windows(network: UNet, image: torch.Tensor, plan: Plan) -> torch.Tensor:
    return sliding_window_inference(
        image,
        plan.local.training.patch_size,
        _WINDOWS_AT_ONCE,
        network,
        overlap=plan.inference.overlap,
        mode="gaussian",
        sigma_scale=0.125,
    )  # type: ignore[return-value]


def _check(members: Sequence[Member]) -> None:
    if not members:
        raise ValidationErrors("predict", ["there are no weights to predict with"])
    first = members[0]
    problems = []
    for member in members[1:]:
        for key in DECLARED:
            first_value, value = (describe_regions(m.plan.agreement, key) for m in (first, member))
            if first_value != value:
                problems.append(f"{first.name} and {member.name} differ in {key}: {first_value} and {value}")
        if first.plan.local.preprocessing_digest() != member.plan.local.preprocessing_digest():
            problems.append(f"{first.name} and {member.name} were prepared on different grids; predict with each alone")
    raise_if_any("predict", dict.fromkeys(problems))


def _case_problems(case: Case, plan: Plan) -> list[str]:
    agreement = plan.agreement
    problems = []
    if case.image.shape[0] != len(agreement.channels):
        problems.append(
            f"the image has {case.image.shape[0]} channels, the model takes {len(agreement.channels)} "
            f"({', '.join(agreement.channels)})"
        )
    if (case.image.shape[1] == 1) != (agreement.dimension == 2):
        problems.append(f"the image has {case.image.shape[1]} slices, the model is {agreement.dimension}D")
    if not np.isfinite(case.image).all():
        problems.append("the image holds NaN or infinite values")
    return problems


def _restored(values: torch.Tensor, inverse: InverseTransform) -> np.ndarray:
    shares: np.ndarray = np.clip(restore(values.cpu().numpy().astype(np.float32), inverse), 0, 1)
    return shares


def _restored_probabilities(mean: np.ndarray, inverse: InverseTransform, labels: Labels) -> np.ndarray:
    """All probabilities on the file's grid; what was cropped is background with probability 1, and no region."""
    fills = [float(k == 0 and not labels.is_regions) for k in range(len(mean))]
    return np.stack([restore(p, inverse, fill=fill).astype(np.float16) for p, fill in zip(mean, fills, strict=True)])


def _value_counts(ensemble: Ensemble, labels: Labels) -> np.ndarray:
    """Voxels of the plan's grid that are predicted to have each value."""
    label_map = labels.paint(ensemble.mean.cpu().numpy())
    return np.bincount(label_map.ravel(), minlength=labels.highest_value + 1)


def _unit(geometry: Geometry) -> tuple[str, float]:
    """The name of a structure's size, and the size of one voxel; without millimetres voxels are counted."""
    solid = geometry.dimension == 3
    if not geometry.in_millimetres:
        return ("volume_voxels" if solid else "area_pixels"), 1.0
    return ("volume_ml", geometry.voxel_mm3 / 1000) if solid else ("area_mm2", geometry.voxel_mm3)


def _structures(
    label_map: np.ndarray,
    ensemble_counts: np.ndarray,
    member_counts: Sequence[np.ndarray],
    labels: Labels,
    inverse: InverseTransform,
) -> dict[str, Structure]:
    """The structures of `label_map`, on the file's grid, with the range of their sizes over the members.

    `ensemble_counts` and `member_counts` are voxels per value on the plan's grid, of the ensemble and of each member.
    Resampling each member to the file's grid would cost as much as the ensemble again, so its count is multiplied by
    the factor by which the ensemble's own count changed there: a member that agrees with the ensemble has the
    ensemble's size. Where the ensemble has no such structure on one of the grids, the factor is that of the volumes of
    a voxel.
    """
    geometry = inverse.geometry
    measure, voxel = _unit(geometry)
    by_volume = np.prod([stop - start for start, stop in inverse.box]) / np.prod(inverse.grid)
    structures = {}
    for name, values in labels.structures:
        indices = list(values)
        voxels, ensemble_voxels = int(np.count_nonzero(mask(label_map, values))), ensemble_counts[indices].sum()
        factor = voxels / ensemble_voxels if voxels and ensemble_voxels else by_volume
        sizes = [float(c[indices].sum() * factor * voxel) for c in member_counts]
        size, smallest, largest = (round(s, 6) for s in (voxels * voxel, min(sizes), max(sizes)))
        structures[name] = Structure(voxels, measure, size, smallest, largest)
    return structures
