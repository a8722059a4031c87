"""The student: a model that the coordinator trains on the agreed labels alone, so that no weight ever left a site."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from autofed.algorithms import PSEUDO_LABELS
from autofed.data.labels import Labels
from autofed.messages import Arrays, ServerState, read_header, save_groups
from autofed.plans import Plan
from autofed.preprocessing import PublicImages, Store
from autofed.privacy.none import NoPrivacy
from autofed.training.fit import Compute, Schedule, fit
from autofed.training.network import build, weights_of

_log = logging.getLogger(__name__)


def train_student(plan: Plan, state: ServerState, public: PublicImages, path: Path, device: str) -> bool:
    """Train a student on the labels that a state agrees on, for as many steps as a site, unless it is there already.

    Returns whether there is one: not if no label passed the thresholds. It learns from what was released, so it adds
    no privacy cost.
    """
    if path.is_file() and read_header(path)[1]["round"] == state.round:
        return True
    store = public.labelled(state.shared[PSEUDO_LABELS], path.parent / "public")
    if not store.patients:
        path.unlink(missing_ok=True)
        _log.warning("no label of a public image passed the thresholds, so there is no student")
        return False
    weights = train_on_labels(plan, store, public.labels, (plan.local.training.seed, 0, state.round), device)
    save_groups(path, {"weights": weights}, {"round": state.round})
    return True


def train_on_labels(
    plan: Plan,
    store: Store,
    labels: Labels,
    seed: Sequence[int],
    device: str,
    on_step: Callable[[], None] = lambda: None,
) -> Arrays:
    """The weights of a network of the plan that learned from labelled public images, for as many steps as a site.

    It starts where the plan says; the seed names its draws.

    Args:
        plan: Whose network and training are used.
        store: The public images with their label maps, on the plan's grid.
        labels: What the values of the maps mean.
        seed: Names the random draws.
        device: What trains.
        on_step: Is called after every step.
    """
    local = plan.local
    result = fit(
        weights_of(build(local.network, seed=local.training.seed)),
        store,
        local,
        NoPrivacy(local.training.batch_size, plan.batches_at("")),
        Schedule(student_steps(plan), lambda done: (1 - done) ** 0.9, seed),
        labels=labels,
        compute=Compute(device, on_step=on_step),
    )
    return result.weights


def student_steps(plan: Plan) -> int:
    """For how many steps a student learns."""
    return plan.agreement.training.rounds * plan.local.training.steps_per_round
