"""The student: a model that the coordinator trains on the agreed labels alone, so that no weight ever left a site."""

from __future__ import annotations

import logging
from pathlib import Path

from autofed.algorithms import AGREED
from autofed.exchange import Arrays, ServerState, peek, save_groups
from autofed.fit import fit
from autofed.network import build, weights_of
from autofed.plans import Plan
from autofed.prepared import PublicImages
from autofed.privacy.none import NoPrivacy

_log = logging.getLogger(__name__)


def train_student(plan: Plan, state: ServerState, public: PublicImages, path: Path, device: str) -> bool:
    """Train a student on the labels that a state agrees on, for as many steps as a site, unless it is there already.

    Whether there is one: not if the gates let no label through. What it learns from was released, so it costs nothing.
    """
    if path.is_file() and peek(path)[1]["round"] == state.round:
        return True
    store = public.labelled(state.shared[AGREED], path.parent / "public")
    if not store.patients:
        path.unlink(missing_ok=True)
        _log.warning("no label of a public image passed the gates, so there is no student")
        return False
    training, local = plan.agreement.training, plan.local
    seed = local.training.seed
    start: Arrays = weights_of(build(local.network, seed=seed))
    fitted = fit(
        start,
        store,
        local,
        NoPrivacy(local.training.batch_size),
        steps=training.rounds * local.training.steps_per_round,
        rate=lambda done: (1 - done) ** 0.9,
        seed=(seed, 0, state.round),
        labels=public.labels,
        device=device,
    )
    save_groups(path, {"weights": fitted.weights}, {"round": state.round})
    return True
