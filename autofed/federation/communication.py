"""What was sent instead of weights in a run whose sites label public images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autofed import algorithms, plans
from autofed.errors import ValidationErrors
from autofed.federation import metrics
from autofed.federation.run_folder import STUDENT, Run
from autofed.training.network import build, weights_of

DOUBTFUL = 0.5
"""A site that disagrees by more than this with what all sites together see is worth a look."""


def communication_summary(run: Run) -> list[str]:
    """Sentences about each fold; none for a run whose sites share weights."""
    plan = run.plan()
    if not _labels(plan):
        return []
    weights = sum(array.nbytes for array in weights_of(build(plan.local.network)).values())
    sentences = [line for fold in run.folds() for line in _fold_summary(run, fold, weights)]
    return [*sentences, _privacy_sentence(plan)]


def _labels(plan: plans.Plan) -> bool:
    try:
        return algorithms.find(plan.agreement.algorithm.name).shares_pseudo_labels
    except ValidationErrors:  # one from elsewhere, which only whoever trained had allowed
        return False


def _fold_summary(run: Run, fold: str, weights: int) -> list[str]:
    lines = metrics.read(run.fold_folder(fold))
    totals = {way: [sum(line["bytes"][way].values()) for line in lines] for way in ("up", "down")}
    sites, rounds = len(run.identity().sites), len(lines)
    sent, instead = sum(totals["up"]) + sum(totals["down"]), 2 * weights * sites * rounds
    found = [
        f"fold {fold}: {_megabytes(sent)} travelled in {rounds} rounds ({_megabytes(sum(totals['up']))} of them from "
        f"the sites), where weights would have been {_megabytes(instead)}"
    ]
    last = [line for line in lines if "kept_images" in line.get("notes", {})]
    if not last:
        return [*found, f"fold {fold}: no labels were agreed on; every site learned from its own patients alone"]
    notes = last[-1]["notes"]
    found.append(f"fold {fold}: labels of {100 * notes['kept_images']:.0f} % of the public images and "
                 f"{100 * notes['kept_voxels']:.0f} % of their voxels were agreed on"
                 + ("" if STUDENT in run.models() else "; there is no student"))  # fmt: skip
    if notes["kept_images"] and not notes.get("structured_images", 1.0):
        found.append(f"fold {fold}: no structure is in any of these labels, only background; do not use such models")
    if len(lines) == last[0]["round"]:
        found.append(f"fold {fold}: no round was left in which a site could learn from them; give more rounds")
    return [*found, *_disagreement(fold, last)]


def _disagreement(fold: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far each site's own labels were from the consensus: in its first response, and in its last."""
    by_site: dict[str, list[float]] = {}
    for line in lines:
        for site, site_metrics in line["sites"].items():
            if "disagreement" in site_metrics:
                by_site.setdefault(site, []).append(site_metrics["disagreement"])
    values = ", ".join(f"{site} {each[0]:.2f} at first, {each[-1]:.2f} in the end" for site, each in by_site.items())
    far = [site for site, each in by_site.items() if each[0] > DOUBTFUL]
    sentences = [f"fold {fold}: 1 - Dice of each site's labels against those of all: {values}"] if values else []
    return sentences + [f"fold {fold}: {site} sees something else than the others; look at its labels" for site in far]


def _privacy_sentence(plan: plans.Plan) -> str:
    if plan.agreement.privacy.is_private:
        return (
            "The labels that sites sent were made by models that the private mechanism trained, and cost nothing beyond"
            " its steps; each site's own model was trained without it, and is for that site alone"
        )
    return "No weights left a site, but pseudo-labels are no formal guarantee: they, too, can tell of patients"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
