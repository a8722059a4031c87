"""FedNova: normalised averaging (Wang et al., NeurIPS 2020, equations 5 and 10, and section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from autofed.algorithms import ClientContext
from autofed.algorithms.fedprox import FedProx
from autofed.messages import ArrayGroups, Request


@dataclass(frozen=True)
class FedNova(FedProx):
    """Every site scales its update as if it had gone the average way: more steps do not weigh more.

    w <- w - tau_eff * average of d, with d = (w_global - w) / ||a|| and tau_eff the average of ||a||. These follow from
    the plan (`autofed.training.effective_steps.effective_steps`), which every site has, so each sends -tau_eff d, and
    no message says how far it went; in a round without some sites tau_eff is still that of all. At equal steps this is
    federated averaging. With `mu` the sites' solver is proximal, as in FedProx.
    """

    resets_momentum: ClassVar[bool] = True

    mu: float = 0.0

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """The update, scaled by the average way over the site's own."""
        before = request.shared["weights"]
        result = site.fit(before, proximal=self.mu)
        scale = np.float32(site.mean_effective_steps(self.mu) / result.effective_steps)
        update = {name: scale * array for name, array in result.update(before).items()}
        return {"update": update, "metrics": {"loss": result.losses}}
