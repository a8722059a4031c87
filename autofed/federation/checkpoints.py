"""The states of a training on the coordinator's disk: after each round, for the ensemble, and the best so far."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autofed.federation.model_selection import BestRound
from autofed.files import read_json, whole_folder, write_json
from autofed.messages import Arrays, ServerState, load_groups, read_header, save_groups
from autofed.plans import Plan


def save(folder: Path, state: ServerState, plan: Plan, line: Mapping[str, Any] | None = None) -> None:
    """Save a state whole or not at all, then remove the states that neither resuming nor the ensemble needs.

    `line` has the metrics of its round before it is scored (`metrics.append_line`).
    """
    with whole_folder(_round_folder(folder, state.round)) as part:
        save_groups(part / "shared.safetensors", state.shared)
        save_groups(part / "kept.safetensors", state.server_only)
        write_json(part / "state.json", {"round": state.round, "line": dict(line or {})})
    keep = {state.round, *plan.agreement.training.snapshots}
    for round in saved_rounds(folder):
        if round not in keep:
            shutil.rmtree(_round_folder(folder, round))


def load(folder: Path, round: int) -> ServerState:
    """The state after a round."""
    at = _round_folder(folder, round)
    return ServerState(round, load_groups(at / "shared.safetensors")[0], load_groups(at / "kept.safetensors")[0])


def line(folder: Path, round: int) -> dict[str, Any]:
    """The metrics of a saved round before it was scored."""
    return dict(read_json(_round_folder(folder, round) / "state.json")["line"])


def saved_rounds(folder: Path) -> list[int]:
    """The rounds whose state is saved, in order."""
    numbers = (p.parent.name.removeprefix("round_") for p in Path(folder).glob("round_*/state.json"))
    return sorted(int(number) for number in numbers)


def model_of(state: ServerState) -> Arrays:
    """The weights of the common model: their moving average if there is one; empty if there is no common model."""
    return state.server_only.get("mean") or state.shared.get("weights", {})


def has_model(folder: Path, round: int) -> bool:
    """Whether a round left a common model: without reading it."""
    return "weights" in read_header(_round_folder(folder, round) / "shared.safetensors")[0]


def save_best(folder: Path, model: Arrays, choice: BestRound) -> None:
    """Keep the best model so far, and how it was chosen."""
    save_groups(best_path(folder), {"weights": model}, choice.words())


def best_path(folder: Path) -> Path:
    """Where the best model of a training is."""
    return Path(folder) / "best.safetensors"


def best_weights(folder: Path) -> Arrays:
    """The best model of a training; nothing if none was chosen by scores."""
    path = best_path(folder)
    return load_groups(path)[0]["weights"] if path.is_file() else {}


def _round_folder(folder: Path, round: int) -> Path:
    return Path(folder) / f"round_{round:05d}"
