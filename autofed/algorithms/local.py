"""Each site alone: the baseline that learning together must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autofed.algorithms import Average, Setup, SiteView
from autofed.exchange import Groups, Release, Request, ServerState


@dataclass(frozen=True)
class LocalOnly:
    """Every site trains its own model from the common start, for as many steps as in fedavg; no weights leave."""

    def start(self, setup: Setup) -> ServerState:
        """The common start, sent once."""
        return ServerState(0, {"weights": setup.weights})

    def local(self, site: SiteView, request: Request) -> Groups:
        """Go on from the site's own weights of the last round."""
        remembered = site.memory(request.round - 1)
        fitted = site.fit(remembered["weights"] if remembered else request.shared["weights"])
        site.remember({"weights": fitted.weights})
        return {"metrics": {"loss": fitted.losses}}

    def merge(self, state: ServerState, releases: Sequence[Release], average: Average) -> ServerState:
        """Nothing to merge: there is no common model."""
        return ServerState(state.round + 1, {})
