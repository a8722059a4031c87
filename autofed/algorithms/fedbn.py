"""FedBN (Li et al., ICLR 2021, algorithm 1): what normalises the images stays a site's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autofed.algorithms import ClientContext
from autofed.algorithms.fedavg import FedAvg
from autofed.messages import ArrayGroups, Request


@dataclass(frozen=True)
class FedBN(FedAvg):
    """Federated averaging in which every site goes on from its own normalisation layers, and so has its own model.

    A hospital that was not in the training takes the common model: the averaged layers, with the average of the sites'
    normalisation layers. For that alone these are released, too; no site of the training uses another's.
    """

    personalised: ClassVar[bool] = True

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """The update of the common model to the site's own."""
        common = request.shared["weights"]
        own = (site.memory() or {"weights": common})["weights"]
        result = site.fit({name: own[name] if name in site.normalisation else common[name] for name in common})
        site.remember({"weights": result.weights})
        return {"update": result.update(common), "metrics": {"loss": result.losses}}
