"""Each site alone: the baseline that learning together must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from autofed.algorithms import Algorithm, AverageGroup, ClientContext, RunSetup
from autofed.messages import ArrayGroups, Request, Response, ServerState


@dataclass(frozen=True)
class LocalOnly(Algorithm):
    """Every site trains its own model from the common start, for as many steps as in fedavg; no weights leave."""

    personalised: ClassVar[bool] = True
    released: ClassVar[Mapping[str, str]] = {}

    def start(self, setup: RunSetup) -> ServerState:
        """The common start."""
        return ServerState(0, {"start": setup.weights})

    def local(self, site: ClientContext, request: Request) -> ArrayGroups:
        """Go on from the site's own weights of the last round."""
        result = site.fit((site.memory() or {"weights": request.shared["start"]})["weights"])
        site.remember({"weights": result.weights})
        return {"metrics": {"loss": result.losses}}

    def merge(self, state: ServerState, responses: Sequence[Response], average: AverageGroup) -> ServerState:
        """Nothing to merge: there is no common model. A site that missed its first round still needs the start."""
        return replace(state, round=state.round + 1)
