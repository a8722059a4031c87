"""How good a model is on the patients that a site held out: on patches while it trains, on whole cases in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from autofed.batches import draw_patch
from autofed.devices import arithmetic, place
from autofed.exchange import Arrays
from autofed.inference import views
from autofed.network import UNet, build, load_weights
from autofed.plans import Local, Plan
from autofed.postprocessing import by_rule
from autofed.prepared import Store
from autofed.uncertainty import Ensemble

SHARE = 0.2
"""So many patches are looked at for each one that was trained on since the last look (nnU-Net: 50 to 250)."""


def patch_dice(weights: Arrays, store: Store, local: Local, patches: int, device: str = "cpu") -> dict[int, float]:
    """Dice of each class over patches of held-out patients, all counted as one (nnU-Net's pseudo Dice).

    The patches are the same whatever the round: what differs between two models is not chance. Every patient is looked
    at, `patches` in all if that is more. A class that is neither there nor predicted has no score.
    """
    network = _network(weights, local, device)
    hits = np.zeros((3, local.network.classes))
    for image, label in _patches(store, local, patches):
        with torch.inference_mode(), arithmetic(local.training.precision, device):
            logits = network(place(torch.from_numpy(image[None]), local.network, device))
        hits += _hits(logits.argmax(1)[0].cpu().numpy(), label, local.network.classes)
    both, predicted, there = hits
    return {
        k: float(2 * both[k] / (predicted[k] + there[k]))
        for k in range(1, local.network.classes)
        if predicted[k] + there[k]
    }


def case_dice(
    weights: Arrays, store: Store, plan: Plan, device: str = "cpu", on_case: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    """Dice of whole held-out cases on the plan's grid, by case: (classes - 1, `RULES`), NaN where not scored.

    Predicted as `predict` does, with mirrored views; a class that is in neither map is not scored.
    """
    network = _network(weights, plan.local, device)
    scores = {}
    for case in sorted(case for cases in store.patients.values() for case in cases):
        labels, truth = _predict(network, store, case, plan, device), store.label(case)[:]
        values = range(1, plan.local.network.classes)
        masks = zip(values, by_rule(labels, values), strict=True)
        scores[case] = np.array([[_dice(mask, truth == value) for mask in each] for value, each in masks])
        on_case()
    return scores


def _network(weights: Arrays, local: Local, device: str) -> UNet:
    network = build(local.network)
    load_weights(network, weights)
    place(network, local.network, device).eval()
    return network


def _patches(store: Store, local: Local, patches: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    patients = sorted(store.patients)
    for number in range(max(patches, len(patients))):
        generator = np.random.default_rng([local.training.seed, number])
        patient = patients[number % len(patients)]
        yield draw_patch(store, patient, local.training, local.training.patch_size, generator)


def _hits(found: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Voxels of each class that are right, that were predicted, and that are there."""
    right = found[found == truth]
    return np.stack([np.bincount(v.ravel(), minlength=classes)[:classes] for v in (right, found, truth)])


def _predict(network: UNet, store: Store, case: str, plan: Plan, device: str) -> np.ndarray:
    ensemble = Ensemble()
    for probabilities in views(network, store.image(case)[:], plan, plan.inference.mirror_axes, device):
        ensemble.add(probabilities)
    return ensemble.mean.argmax(0).cpu().numpy()


def _dice(found: np.ndarray, truth: np.ndarray) -> float:
    size = int(np.count_nonzero(found)) + int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(found & truth)) / size if size else float("nan")
