"""FedProx (Li et al., MLSys 2020, equation 2 and algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

from autofed.algorithms import ClientContext
from autofed.algorithms.fedavg import FedAvg
from autofed.messages import ArrayGroups, Request


@dataclass(frozen=True)
class FedProx(FedAvg):
    """Federated averaging whose sites also minimise mu/2 ||w - w_global||^2, so that they do not drift apart.

    With mu = 0 it is federated averaging.
    """

    mu: float = 0.01

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """The update of a training that is pulled back to where it started."""
        before = request.shared["weights"]
        result = site.fit(before, proximal=self.mu)
        return {"update": result.update(before), "metrics": {"loss": result.losses}}
