"""Validation on a site's held-out patients: on patches during training, on whole cases at the end."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from autofed.data.labels import Labels, mask
from autofed.inference.postprocessing import RULES, masks_by_rule
from autofed.inference.predictor import mirrored_probabilities
from autofed.inference.uncertainty import Ensemble
from autofed.messages import Arrays
from autofed.plans import LocalPlan, Plan
from autofed.preprocessing import Store
from autofed.training.batches import IDENTITY, sample_patch
from autofed.training.devices import autocast, place
from autofed.training.network import UNet, build, load_weights

SHARE = 0.2
"""So many patches are scored for each one that was trained on since the last validation (nnU-Net: 50 to 250)."""


def patch_dice(weights: Arrays, store: Store, plan: Plan, patches: int, device: str = "cpu") -> dict[str, float]:
    """Dice of each structure over patches of held-out patients, all counted as one (nnU-Net's pseudo Dice).

    The patches are the same in every round, so that scores of two models differ by the models alone. Every patient has
    a patch, `patches` in all if that is more. A structure that is neither there nor predicted has no score, nor has one
    that the site did not annotate.
    """
    local, labels = plan.local, Labels.of(plan.agreement).with_annotated(store.annotated)
    network = _network(weights, local, device)
    counts = np.zeros((len(labels.structures), 3), np.int64)
    for image, label in _patches(store, local, patches):
        with torch.inference_mode(), autocast(local.training.precision, device):
            logits = network(place(torch.from_numpy(image[None]), local.network, device))
        counts += _overlap_counts(logits[0].float().cpu().numpy(), label, labels)
    sizes = counts[:, 1] + counts[:, 2]
    return {n: float(2 * row[0] / size) for n, row, size in zip(labels.names, counts, sizes, strict=True) if size}


def case_dice(weights: Arrays, store: Store, plan: Plan, device: str = "cpu") -> dict[str, np.ndarray]:
    """Dice of whole held-out cases on the plan's grid, by case: (structures, `RULES`), NaN where not scored.

    Predicted as by `predict`, with mirroring; a structure that is in neither map is not scored, and neither are voxels
    and structures that were not annotated.
    """
    network, labels = _network(weights, plan.local, device), Labels.of(plan.agreement).with_annotated(store.annotated)
    scores = {}
    for case in sorted(case for cases in store.patients.values() for case in cases):
        label_map, reference = _predict(network, store, case, plan, labels, device), store.label(case)[:]
        scores[case] = _case_scores(label_map, reference, labels)
    return scores


def _case_scores(label_map: np.ndarray, reference: np.ndarray, labels: Labels) -> np.ndarray:
    """(structures, `RULES`), NaN where there is nothing to score."""
    annotated = reference != labels.ignore
    scores = np.full((len(labels.structures), len(RULES)), np.nan)
    for row, (name, values), masks in zip(scores, labels.structures, masks_by_rule(label_map, labels), strict=True):
        if labels.is_annotated(name):
            row[:] = [_dice(predicted & annotated, mask(reference, values)) for predicted in masks]
    return scores


def _network(weights: Arrays, local: LocalPlan, device: str) -> UNet:
    network = build(local.network)
    load_weights(network, weights)
    place(network, local.network, device).eval()
    return network


def _patches(store: Store, local: LocalPlan, patches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    patients = sorted(store.patients)
    for number in range(max(patches, len(patients))):
        generator = np.random.default_rng([local.training.seed, number])
        patient = patients[number % len(patients)]
        image, label = sample_patch(store, patient, local.training, IDENTITY, generator)
        yield np.ascontiguousarray(image, np.float32), label


def _overlap_counts(logits: np.ndarray, reference: np.ndarray, labels: Labels) -> np.ndarray:
    """(structures, 3): true positives, predicted voxels and reference voxels of each structure.

    Only annotated voxels count; of a structure that was not annotated none.
    """
    annotated = reference != labels.ignore
    best = logits.argmax(0)
    counts = []
    for channel, (name, values) in enumerate(labels.structures):
        is_counted = annotated & labels.is_annotated(name)
        predicted = (logits[channel] > 0 if labels.is_regions else best == channel + 1) & is_counted
        present = mask(reference, values) & is_counted
        counts.append([np.count_nonzero(voxels) for voxels in (predicted & present, predicted, present)])
    return np.array(counts)


def _predict(network: UNet, store: Store, case: str, plan: Plan, labels: Labels, device: str) -> np.ndarray:
    ensemble = Ensemble(is_regions=labels.is_regions)
    for probabilities in mirrored_probabilities(
        network, store.image(case)[:], plan, plan.inference.mirror_axes, device
    ):
        ensemble.add(probabilities)
    return labels.paint(ensemble.mean.cpu().numpy())


def _dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    size = int(np.count_nonzero(prediction)) + int(np.count_nonzero(reference))
    return 2 * int(np.count_nonzero(prediction & reference)) / size if size else float("nan")
