"""What a training may start from: another run, or a file of weights."""

from __future__ import annotations

from pathlib import Path

from autofed.errors import ValidationErrors
from autofed.federation.client import SITE_ONLY_MARK
from autofed.federation.run_folder import Run
from autofed.messages import read_header
from autofed.plans import Plan

_EXPECTED = "expected a RUN, or a file of weights (.safetensors)"


def unreadable_problems(init: Path) -> list[str]:
    """Why this is neither a run nor a file of weights."""
    if init.is_file():
        try:
            read_header(init)
        except ValidationErrors as error:
            return [f"{problem}; {_EXPECTED}" for problem in error.problems]
    elif not Run(init).exists:
        found = "a folder without run.json" if init.is_dir() else "no such file or folder"
        return [f"{init}: found {found}; {_EXPECTED}"]
    return []


def site_only_problems(init: Path, plan: Plan) -> list[str]:
    """Why no training, or no private one, may begin with a file of weights that a site keeps for itself."""
    path = init.resolve()
    if not path.is_file():
        return []
    if read_header(path)[1].get(SITE_ONLY_MARK):
        return [f"{init} was trained without noise beside a private training, for its site alone, and whatever starts "
                "from it tells of that site's patients; start from other weights"]  # fmt: skip
    inside = any(folder.name == "sites" and Run(folder.parent).exists for folder in path.parents)
    if inside and plan.agreement.privacy.is_private:
        return [f"{init} is what a site remembers, and no ledger knows what a private training that starts from it "
                "tells; start from the common model of a run, or from weights of other patients"]  # fmt: skip
    return []


def random_start_problems(plan: Plan) -> list[str]:
    """Why a training of this plan cannot begin with random weights."""
    if plan.local.training.trained == "all":
        return []
    return [
        f'with "{plan.local.training.trained}" the way down stays as the training began, and random weights there '
        "know nothing; give --init a RUN or a file of weights, or plan with --set training.trained=all"
    ]
