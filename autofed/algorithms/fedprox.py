"""FedProx (Li et al., MLSys 2020, equation 2 and algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autofed.algorithms import SiteView
from autofed.algorithms.fedavg import FedAvg
from autofed.exchange import Arrays

if TYPE_CHECKING:
    from autofed.fit import Fitted


@dataclass(frozen=True)
class FedProx(FedAvg):
    """Federated averaging whose sites also minimise mu/2 ||w - w_global||^2, so that they do not drift apart.

    With mu = 0 it is federated averaging.
    """

    mu: float = 0.01

    def train(self, site: SiteView, weights: Arrays) -> Fitted:
        """A training that is pulled back to where it started."""
        return site.fit(weights, proximal=self.mu)
