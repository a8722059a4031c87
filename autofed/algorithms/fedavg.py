"""Federated averaging (McMahan et al., AISTATS 2017, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autofed.algorithms import Algorithm, Average, Setup, SiteView
from autofed.exchange import Arrays, Groups, Release, Request, ServerState

if TYPE_CHECKING:
    from autofed.fit import Fitted


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Every site trains from the common weights; their updates are averaged, weighted by number of patients."""

    def start(self, setup: Setup) -> ServerState:
        """The common weights."""
        return ServerState(0, {"weights": setup.weights})

    def local(self, site: SiteView, request: Request) -> Groups:
        """The update: weights after local training less weights before."""
        before = request.shared["weights"]
        fitted = self.train(site, before)
        return {"update": fitted.update(before), "metrics": {"loss": fitted.losses}}

    def train(self, site: SiteView, weights: Arrays) -> Fitted:
        """The site's training, from these weights."""
        return site.fit(weights)

    def merge(self, state: ServerState, releases: Sequence[Release], average: Average) -> ServerState:
        """w <- w + average of the updates."""
        update = average(releases, "update")
        weights = {name: array + update[name] for name, array in state.shared["weights"].items()}
        return ServerState(state.round + 1, {"weights": weights})
