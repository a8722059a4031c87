"""Initial weights of a training: from another run or a file, if that tells nothing that it must not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autofed.api.coordinator import Coordinator
from autofed.data.splits import ALL
from autofed.errors import ValidationErrors, raise_if_any
from autofed.federation.client import SITE_ONLY_MARK
from autofed.federation.node import ledger_path, run_id_of
from autofed.federation.run_folder import Run, read_weights
from autofed.messages import Arrays, read_header
from autofed.plans import Plan
from autofed.privacy.ledger import PrivacyLedger
from autofed.training.network import build, load_weights

_EXPECTED = "expected a RUN, or a file of weights (.safetensors)"


def load(init: Path, coordinator: Coordinator, folds: Sequence[str], work: Path | None) -> Arrays:
    """The weights of a run or file, for the network of the coordinator's plan.

    Args:
        init: A run's folder, or a file of weights.
        coordinator: That of the training that starts from them.
        folds: The folds that will be trained, whose held-out patients the weights must not have seen.
        work: WORK, with the sites' ledgers; None if the sites are on machines of their own.

    Raises:
        ValidationErrors: If there are no such weights, they do not fit the network, would make scores worthless, or
            carry what no ledger has recorded into a private training.
    """
    plan = coordinator.plan
    raise_if_any("--init", _unreadable_problems(init))
    site_only = _site_only_problems(init, plan)
    raise_if_any(
        "--init", [*_held_out_problems(init, folds), *_unrecorded_problems(coordinator, init, work), *site_only]
    )
    weights = read_weights(init)
    load_weights(build(plan.local.network), weights, f"--init {init}")
    return weights


def _unreadable_problems(init: Path) -> list[str]:
    """Why this is neither a run nor a file of weights."""
    if init.is_file():
        try:
            read_header(init)
        except ValidationErrors as error:
            return [f"{problem}; {_EXPECTED}" for problem in error.problems]
    elif not Run(init).exists:
        kind = "a folder without run.json" if init.is_dir() else "no such file or folder"
        return [f"{init}: found {kind}; {_EXPECTED}"]
    return []


def _site_only_problems(init: Path, plan: Plan) -> list[str]:
    """Why a training, or a private one, must not start from a file that is for one site alone."""
    path = init.resolve()
    if not path.is_file():
        return []
    if read_header(path)[1].get(SITE_ONLY_MARK):
        return [f"{init} was trained without noise next to a private training, for its site alone, and whatever starts "
                "from it reveals that site's patients; start from other weights"]  # fmt: skip
    is_inside_run = any(folder.name == "sites" and Run(folder.parent).exists for folder in path.parents)
    if is_inside_run and plan.agreement.privacy.is_private:
        return [f"{init} is the stored state of a site, and no ledger records what a private training that starts "
                "from it reveals; start from the global model of a run, or from weights of other patients"]  # fmt: skip
    return []


def random_start_problems(plan: Plan) -> list[str]:
    """Why a training of this plan cannot start from random weights."""
    if plan.local.training.trained == "all":
        return []
    return [
        f'with "{plan.local.training.trained}" the encoder keeps its initial weights, and random ones there are '
        "useless; give --init a RUN or a file of weights, or plan with --set training.trained=all"
    ]


def _held_out_problems(init: Path, folds: Sequence[str]) -> list[str]:
    """A run has trained on patients that a fold of this one would hold out."""
    held_out = [fold for fold in folds if fold != ALL]
    if not held_out or not init.is_dir():
        return []
    return [
        f"the run {init} has trained on patients that fold {', '.join(held_out)} holds out, so its scores would be "
        "worth nothing; train with --fold all, or name a file with weights of other patients"
    ]


def _unrecorded_problems(coordinator: Coordinator, init: Path, work: Path | None) -> list[str]:
    """What the run to start from has revealed of the same patients, and the sites' ledgers have not recorded."""
    if not coordinator.plan.agreement.privacy.is_private or coordinator.identity.simulation or not init.is_dir():
        return []
    run = Run(init)
    shared_sites = sorted(set(run.plan().agreement.patients) & set(coordinator.plan.agreement.patients))
    if run.identity().simulation and shared_sites:
        return [f"{init} is a simulation on patients of {', '.join(shared_sites)}, and no ledger records what it "
                "reveals of them; start from another run, or simulate this one too"]  # fmt: skip
    paths = [ledger_path(work, site) for site in shared_sites] if work else []
    unrecorded = [p for p in paths if not p.is_file() or not _records(PrivacyLedger.existing(p), run.identity().id)]
    return [f"{init} was trained on patients of {path.parent.name}, but {path} has no record of it; start from another "
            "run, or train it again from this WORK" for path in unrecorded]  # fmt: skip


def _records(ledger: PrivacyLedger, run_id: str) -> bool:
    return any(run_id_of(charge.run) == run_id for charge in ledger.charges())
