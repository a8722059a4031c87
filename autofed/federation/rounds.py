"""What a round does: ask every site, check the answers, merge, save. The loop is written once and never subclassed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autofed.algorithms import Algorithm, Average, site_weights
from autofed.exchange import (
    Arrays,
    Failure,
    Groups,
    Message,
    Release,
    Request,
    ServerState,
    from_bytes,
    load_groups,
    save_groups,
    to_bytes,
)
from autofed.federation.site import QUESTIONS
from autofed.files import whole_folder, write_bytes, write_json
from autofed.plans import Plan
from autofed.privacy import ADAPTATION, Mechanism, adapted
from autofed.problems import Problems, refuse

Transport = Callable[[Mapping[str, bytes]], Mapping[str, bytes]]
"""From one request per site to one answer per site; bytes in, bytes out."""


def run(
    algorithm: Algorithm,
    mechanism: Mechanism,
    plan: Plan,
    transport: Transport,
    state: ServerState,
    folder: Path,
    run_id: str,
    sites: Sequence[str],
) -> ServerState:
    """Rounds from `state` until the plan's last; the state after each is saved in folder/round_<r>/.

    `Problems` names every site that failed or answered what cannot be merged; the rounds before are saved.
    """
    weights = site_weights(plan)
    while state.round < plan.agreement.training.rounds:
        begin = time.monotonic()
        request = Request(run_id, state.round + 1, QUESTIONS[0], state.shared)
        answers = transport(dict.fromkeys(sites, to_bytes(request)))
        releases = _check(answers, sites, request)
        current = adapted(mechanism, state.shared.get(ADAPTATION, {}))
        average = partial(_average, current, {site: weights.get(site, 1.0) for site in sites})
        merged = algorithm.merge(state, releases, average)
        state = replace(merged, shared=_with_history(merged.shared, state.shared, releases, average))
        _write_metrics(folder, state.round, releases, time.monotonic() - begin)
        save_state(folder, state, plan)  # last: a round whose state is there is whole
    return state


def save_state(folder: Path, state: ServerState, plan: Plan) -> None:
    """Save a state whole or not at all, then remove the states that neither resuming nor the ensemble needs."""
    with whole_folder(_round_folder(folder, state.round)) as part:
        save_groups(part / "shared.safetensors", state.shared)
        save_groups(part / "kept.safetensors", state.kept)
        write_json(part / "state.json", {"round": state.round})
    keep = {state.round, *plan.agreement.training.snapshots}
    for round in saved_rounds(folder):
        if round not in keep:
            shutil.rmtree(_round_folder(folder, round))


def load_state(folder: Path, round: int) -> ServerState:
    """The state after a round."""
    at = _round_folder(folder, round)
    return ServerState(round, load_groups(at / "shared.safetensors")[0], load_groups(at / "kept.safetensors")[0])


def saved_rounds(folder: Path) -> list[int]:
    """The rounds whose state is saved, in order."""
    found = (p.parent.name.removeprefix("round_") for p in Path(folder).glob("round_*/state.json"))
    return sorted(int(name) for name in found)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """What is known of each finished round, in order."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shared_path(folder: Path, round: int) -> Path:
    """The file with the common arrays of a round."""
    return _round_folder(folder, round) / "shared.safetensors"


def _round_folder(folder: Path, round: int) -> Path:
    return Path(folder) / f"round_{round:05d}"


def _average(
    mechanism: Mechanism, weights: Mapping[str, float], releases: Sequence[Release], group: str
) -> dict[str, np.ndarray]:
    return mechanism.average({r.site: r.arrays[group] for r in releases}, weights)


def _with_history(shared: Groups, before: Groups, releases: Sequence[Release], average: Average) -> Groups:
    """`shared` with the averaged adaptation groups of all rounds so far, if the sites' mechanism releases any."""
    if not all(ADAPTATION in release.arrays for release in releases):
        return shared
    past, now = before.get(ADAPTATION, {}), average(releases, ADAPTATION)
    stacked = {name: np.concatenate([*([past[name]] if name in past else []), now[name][None]]) for name in now}
    return {**shared, ADAPTATION: stacked}


def _check(answers: Mapping[str, bytes], sites: Sequence[str], request: Request) -> list[Release]:
    """The releases, in the order of the sites' names; a site that is silent is as much a problem as one that errs."""
    problems = [f"the site {site} did not answer" for site in sites if site not in answers]
    problems += [f"{site} answered, which is not a site of this run" for site in answers if site not in sites]
    messages: dict[str, Message] = {}
    for site, data in sorted(answers.items()):
        try:
            messages[site] = from_bytes(data)
        except Problems as error:
            problems += [f"the site {site} answered what is no message: {p}" for p in error.problems]
    for site, message in messages.items():
        if isinstance(message, Failure):
            problems.append(f"the site {site} failed with the code {message.code!r}; the details are in its site.log")
        elif not isinstance(message, Release) or (message.run, message.round, message.site) != (
            request.run,
            request.round,
            site,
        ):
            problems.append(f"the site {site} answered another question than that of round {request.round}")
        else:
            problems += [f"the site {site}: {p}" for p in _misfits(message.arrays, request.shared)]
    refuse(f"round {request.round}", problems)
    return [message for message in messages.values() if isinstance(message, Release)]


def _misfits(arrays: Groups, shared: Groups) -> list[str]:
    """An update must look like the weights it updates, and no number may be NaN or infinite."""
    problems = []
    if "update" in arrays and "weights" in shared and _shapes(arrays["update"]) != _shapes(shared["weights"]):
        problems.append("its update has other names, shapes or dtypes than the weights it was sent")
    for group, found in arrays.items():
        if not all(np.isfinite(array).all() for array in found.values()):
            problems.append(f"{group} holds NaN or infinite values")
    return problems


def _shapes(arrays: Arrays) -> dict[str, tuple]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def _write_metrics(folder: Path, round: int, releases: Sequence[Release], seconds: float) -> None:
    """Append a line for this round; one that a run left which was cut off in this very round is dropped."""
    sites = {
        r.site: {name: float(np.mean(values)) for name, values in r.arrays.get("metrics", {}).items() if values.size}
        for r in releases
    }
    lines = [line for line in read_metrics(folder) if line["round"] < round]
    lines.append({"round": round, "seconds": float(f"{seconds:.2f}"), "sites": sites})
    write_bytes(Path(folder) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
