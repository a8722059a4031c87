"""FedProx (Li et al., MLSys 2020, equation 2 and algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autofed.algorithms import ClientContext
from autofed.algorithms.fedavg import FedAvg
from autofed.messages import Arrays

if TYPE_CHECKING:
    from autofed.training.fit import LocalResult


@dataclass(frozen=True)
class FedProx(FedAvg):
    """Federated averaging whose sites also minimise mu/2 ||w - w_global||^2, so that they do not drift apart.

    With mu = 0 it is federated averaging.
    """

    mu: float = 0.01

    def train(self, site: ClientContext, weights: Arrays) -> LocalResult:
        """A training that is pulled back to where it started."""
        return site.fit(weights, proximal=self.mu)
