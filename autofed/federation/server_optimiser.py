"""The coordinator's own step (`agreement.server`): it treats the merged weights less those before as a gradient.

Pure functions of the state before and the state merged, so any algorithm that shares weights can have it; its momentum
is in the state (`ServerState.server_only`) and saved with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from autofed.algorithms import Algorithm
from autofed.errors import raise_if_any
from autofed.messages import ServerState
from autofed.plans import ServerSettings

VELOCITY, FIRST, SECOND = MOMENTS = ("server_velocity", "server_first", "server_second")
"""Groups of `ServerState.server_only`: momentum's sum of updates, and Adam's averages of updates and their squares."""

Moments = Mapping[str, np.ndarray]
Rule = Callable[[ServerSettings, np.ndarray, Moments], tuple[np.ndarray, dict[str, np.ndarray]]]
"""From an update, the merged weights less those before, and the moments before to the direction and the moments."""


def step(server: ServerSettings, before: ServerState, merged: ServerState) -> ServerState:
    """The merged state with the coordinator's step taken: w <- w_before + rate * direction, in float64.

    A plain step of rate 1, and a state without common weights, are returned untouched.
    """
    if _is_merge_itself(server) or "weights" not in merged.shared:
        return merged
    weights: dict[str, np.ndarray] = {}
    moments: dict[str, dict[str, np.ndarray]] = {}
    for name, array in merged.shared["weights"].items():
        start = before.shared["weights"][name].astype(np.float64)
        past = {
            group: before.server_only[group][name].astype(np.float64)
            for group in MOMENTS
            if group in before.server_only
        }
        direction, new_moments = _RULES[server.optimiser](server, array - start, past)
        weights[name] = (start + server.rate * direction).astype(array.dtype)
        for (
            group,
            moment,
        ) in new_moments.items():  # in the saved dtype, so that a resumed run is the same
            moments.setdefault(group, {})[name] = moment.astype(array.dtype)
    return replace(merged, shared={**merged.shared, "weights": weights}, server_only={**merged.server_only, **moments})


def raise_if_idle(server: ServerSettings, algorithm: Algorithm, name: str) -> None:
    """`Problems` if the coordinator is to step in its own way, but the algorithm leaves it no weights to step with."""
    idle = not _is_merge_itself(server) and not algorithm.shares_weights()
    raise_if_any("agreement.server", [
        f"{name} shares no weights, so the coordinator cannot step with {server.optimiser} and rate {server.rate:g}; "
        "expected plain and 1, or another algorithm"
    ] if idle else [])  # fmt: skip


def _is_merge_itself(server: ServerSettings) -> bool:
    return server.optimiser == "plain" and server.rate == 1


def _plain(server: ServerSettings, update: np.ndarray, past: Moments) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    return update, {}


def _momentum(server: ServerSettings, update: np.ndarray, past: Moments) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """FedAvgM (Hsu et al. 2019, arXiv:1909.06335): v <- momentum * v + update; the direction is v.

    An update that stays the same is taken 1 / (1 - momentum) times in the end.
    """
    velocity = server.momentum * past.get(VELOCITY, 0.0) + update
    return velocity, {VELOCITY: velocity}


def _adam(server: ServerSettings, update: np.ndarray, past: Moments) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """FedAdam (Reddi et al., ICLR 2021, algorithm 2), with their tau as `epsilon` and v starting at tau^2.

    As there, without Adam's correction of the bias: rates are then those of the paper. With the defaults a coordinate
    of a steady update moves by `rate` in the first round, by up to 2.1 times that around the 13th, and by `rate` again
    in the long run; the correction would make it `rate` throughout.
    """
    first = server.momentum * past.get(FIRST, 0.0) + (1 - server.momentum) * update
    start = server.epsilon**2
    second = server.second_momentum * past.get(SECOND, start) + (1 - server.second_momentum) * np.square(update)
    return first / (np.sqrt(second) + server.epsilon), {FIRST: first, SECOND: second}


_RULES: dict[str, Rule] = {"plain": _plain, "momentum": _momentum, "adam": _adam}
