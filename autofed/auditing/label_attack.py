"""The attacker who sees what a site says of public images, and none of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import numpy as np

from autofed.auditing.canaries import Canaries, Score, label_exposure_scores
from autofed.errors import ValidationErrors
from autofed.federation.model_selection import moving_average
from autofed.federation.public_labelling import Labeller
from autofed.federation.student import student_steps, train_on_labels
from autofed.inference import pseudo_labels
from autofed.messages import Arrays
from autofed.parallel import Progress, silent
from autofed.plans import Plan
from autofed.preprocessing import PublicImages

_OPEN = pseudo_labels.ConfidenceThresholds(confidence=0.0, doubt=math.inf, share=0.0)
"""An attacker learns from every voxel."""


def label_attack_score(
    plan: Plan,
    canaries: Canaries,
    public: PublicImages,
    folder: Path,
    device: str = "cpu",
    progress: Progress = silent,
) -> Score:
    """The attacker who sees one answer: what the model of the last round says of public images, as DCFed sends it.

    With `training.ema` that model is the moving average, as at a site. `folder` holds what is made on the way.

    Args:
        plan: The plan that is audited.
        canaries: The planted patients.
        public: The public images that the site labels.
        folder: For what is made on the way.
        device: What trains the student.
        progress: Is called with what is being done, how many are done, and how many there are.
    """

    def overheard(rounds: Iterator[Arrays]) -> np.ndarray:
        labeller = Labeller(public, plan, folder / "said", device)
        try:
            predictions = labeller.label([_model(plan, rounds)])
        except ArithmeticError as error:
            raise ValidationErrors(
                "audit", [f"{error}; lower the learning rate, so that canaries can be learned"]
            ) from None
        return scores_from_labels(plan, canaries, public, predictions, folder / "labels", device, progress)

    return overheard


def scores_from_labels(
    plan: Plan,
    canaries: Canaries,
    public: PublicImages,
    predictions: Mapping[str, np.ndarray],
    folder: Path,
    device: str = "cpu",
    progress: Progress = silent,
) -> np.ndarray:
    """The score of every canary, from what was said of public images (`pseudo_labels.write`) and what everybody knows.

    A student learns the most likely labels from the weights that the plan starts from, for as many steps as a site, and
    is asked how well it fits each canary's wrong labels (`canaries.label_exposure_scores`).

    Args:
        plan: The plan that is audited.
        canaries: The planted patients.
        public: The public images.
        predictions: What the site sent for each of them (`pseudo_labels.encode_prediction`).
        folder: For what is made on the way.
        device: What trains the student.
        progress: Is called with what is being done, how many are done, and how many there are.
    """
    labels, total, done = public.labels, student_steps(plan), count(1)
    maps = {
        name: pseudo_labels.apply_thresholds(
            pseudo_labels.decode_prediction(answer, is_regions=labels.is_regions)[0], labels.order, _OPEN
        )
        for name, answer in predictions.items()
    }
    progress("training a student", 0, total)
    weights = train_on_labels(
        plan,
        public.labelled(maps, folder),
        labels,
        (plan.local.training.seed, 0),
        device,
        lambda: progress("training a student", next(done), total),
    )
    return label_exposure_scores(plan, canaries, weights, device)


def _model(plan: Plan, rounds: Iterator[Arrays]) -> Arrays:
    """The model that a site answers with after the last round."""
    ema, model = plan.agreement.training.ema, None
    for round, weights in enumerate(rounds, 1):
        model = moving_average(model, weights, ema, round) if ema else weights
    if model is None:
        raise ValidationErrors("audit", ["the plan has no rounds"])
    return model
