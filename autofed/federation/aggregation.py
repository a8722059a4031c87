"""How the coordinator averages a round's responses: the plan's rule, the sites' weights, and its own step after it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from autofed.federation.aggregation_rules import AggregationRule, rule_of
from autofed.messages import Response
from autofed.plans import Plan, ServerSettings


@dataclass(frozen=True)
class Aggregator:
    """How the responses of a training's sites are averaged.

    `rule` averages them, `site_weights` are the sites' weights in it, and `server` is the step that the coordinator
    then takes towards the average (`server_optimiser.step`).
    """

    rule: AggregationRule
    site_weights: Mapping[str, float]
    server: ServerSettings = field(default_factory=ServerSettings)

    @classmethod
    def of(cls, plan: Plan, sites: Collection[str]) -> Self:
        """The plan's, for the sites that take part; one that is not in the plan, which holds all data, has weight 1."""
        agreement, weights = plan.agreement, plan.agreement.site_weights
        return cls(rule_of(agreement.average), {site: weights.get(site, 1.0) for site in sites}, agreement.server)

    def average(self, responses: Sequence[Response], group: str) -> dict[str, np.ndarray]:
        """The average over sites of one named group of arrays."""
        return self.rule.average({response.site: response.arrays[group] for response in responses}, self.site_weights)
