"""SCAFFOLD: stochastic controlled averaging (Karimireddy et al., ICML 2020, algorithm 1 with option II)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autofed.algorithms import Algorithm, AverageGroup, ClientContext, RunSetup
from autofed.messages import ArrayGroups, Arrays, Request, Response, ServerState


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """Every site corrects its steps by how its gradients differ from everyone's, so that it does not drift to its own.

    The site's control variate c_i stays in its memory, the common one c is the average of them all.
    """

    resets_momentum: ClassVar[bool] = True
    released: ClassVar[Mapping[str, str]] = {"update": "weights", "control": "control"}

    def start(self, setup: RunSetup) -> ServerState:
        """The common weights and c = 0."""
        patients = {site: np.array([share]) for site, share in setup.plan.agreement.site_weights.items()}
        return ServerState(0, {"weights": setup.weights, "control": _zeros(setup.weights)}, {"patients": patients})

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """The update, and by how much c_i changed: c_i <- c_i - c + (w_global - w) / (learning rates times steps)."""
        before, common = request.shared["weights"], request.shared["control"]
        own = (site.memory() or {"control": _zeros(before)})["control"]
        result = site.fit(before, correction={name: common[name] - own[name] for name in before})
        update, way = result.update(before), np.float32(result.effective_steps)
        change = {name: -common[name] - update[name] / way for name in before}
        site.remember({"control": {name: own[name] + change[name] for name in before}})
        return {"update": update, "control": change, "metrics": {"loss": result.losses}}

    def merge(self, state: ServerState, responses: Sequence[Response], average: AverageGroup) -> ServerState:
        """w <- w + average of the updates; c <- c + the same of the changes, of the sites that answered."""
        patients = state.server_only["patients"]
        answered = sum(patients[response.site] for response in responses if response.site in patients)
        share = np.float32(answered / sum(patients.values()) if np.any(answered) else 1)
        update, change = average(responses, "update"), average(responses, "control")
        weights = {name: array + update[name] for name, array in state.shared["weights"].items()}
        control = {name: array + share * change[name] for name, array in state.shared["control"].items()}
        return ServerState(state.round + 1, {"weights": weights, "control": control}, {"patients": patients})


def _zeros(weights: Arrays) -> dict[str, np.ndarray]:
    return {name: np.zeros_like(array) for name, array in weights.items()}
