"""What the coordinator makes of a round's answers: the average by the plan's rule and weights, and its own step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from autofed.algorithms import Algorithm
from autofed.federation import server_optimiser
from autofed.federation.aggregation_rules import AggregationRule, rule_of
from autofed.messages import Response, ServerState
from autofed.plans import Plan, ServerSettings


@dataclass(frozen=True)
class Aggregator:
    """How the answers of a training's sites become one state.

    `rule` averages them, `site_weights` are the sites' weights in it, and `server_optimiser` is the step that the
    coordinator then takes along the way to the average.
    """

    rule: AggregationRule
    site_weights: Mapping[str, float]
    server: ServerSettings = field(default_factory=ServerSettings)

    @classmethod
    def of(cls, plan: Plan, sites: Collection[str]) -> Self:
        """The plan's, for the sites that take part; one that is not in the plan, which holds all data, has weight 1."""
        agreement, weights = plan.agreement, plan.agreement.site_weights
        return cls(rule_of(agreement.average), {site: weights.get(site, 1.0) for site in sites}, agreement.server)

    def average(self, releases: Sequence[Response], group: str) -> dict[str, np.ndarray]:
        """The average over sites of one named group of arrays."""
        return self.rule.average({release.site: release.arrays[group] for release in releases}, self.site_weights)

    def merge(self, algorithm: Algorithm, state: ServerState, releases: Sequence[Response]) -> ServerState:
        """The state after a round: what the algorithm makes of the releases, and the coordinator's step towards it."""
        return server_optimiser.step(self.server, state, algorithm.merge(state, releases, self.average))
