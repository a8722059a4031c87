"""Federated averaging (McMahan et al., AISTATS 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autofed.algorithms import Algorithm, AverageGroup, ClientContext, RunSetup
from autofed.messages import ArrayGroups, Request, Response, ServerState


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Every site trains from the common weights; their updates are averaged, weighted by number of patients."""

    def start(self, setup: RunSetup) -> ServerState:
        """The common weights."""
        return ServerState(0, {"weights": setup.weights})

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """The update: weights after local training less weights before."""
        before = request.shared["weights"]
        result = site.fit(before)
        return {"update": result.update(before), "metrics": {"loss": result.losses}}

    def merge(self, state: ServerState, responses: Sequence[Response], average: AverageGroup) -> ServerState:
        """w <- w + average of the updates."""
        update = average(responses, "update")
        weights = {name: array + update[name] for name, array in state.shared["weights"].items()}
        return ServerState(state.round + 1, {"weights": weights})
