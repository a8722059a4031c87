"""FedNova: normalised averaging (Wang et al., NeurIPS 2020, equations 5 and 10, and section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autofed.algorithms import Average, Setup, SiteView, refuse_kept_momentum
from autofed.algorithms.fedavg import FedAvg
from autofed.exchange import Groups, Release, Request, ServerState


@dataclass(frozen=True)
class FedNova(FedAvg):
    """Every site sends the direction in which it went, and all go the average way: more steps do not weigh more.

    At equal steps it is federated averaging. With `mu` the sites' solver is proximal, as in FedProx.
    """

    mu: float = 0.0

    def start(self, setup: Setup) -> ServerState:
        """The common weights; `Problems` if momentum is kept, since a site's way is counted from rest."""
        refuse_kept_momentum("fednova", setup.plan)
        return super().start(setup)

    def local(self, site: SiteView, request: Request) -> Groups:
        """d = (w - w_global) / ||a||, and ||a||, which follows from the plan alone (`autofed.solver.reach`)."""
        before = request.shared["weights"]
        fitted = site.fit(before, proximal=self.mu)
        direction = {name: array / np.float32(fitted.reach) for name, array in fitted.update(before).items()}
        return {"update": direction, "reach": {"reach": np.array([fitted.reach])}, "metrics": {"loss": fitted.losses}}

    def merge(self, state: ServerState, releases: Sequence[Release], average: Average) -> ServerState:
        """w <- w + tau_eff * average of d, with tau_eff the average of ||a||."""
        direction, way = average(releases, "update"), average(releases, "reach")["reach"].astype(np.float32)
        weights = {name: array + way * direction[name] for name, array in state.shared["weights"].items()}
        return ServerState(state.round + 1, {"weights": weights})
