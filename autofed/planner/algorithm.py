"""The algorithm of a plan, and what a step of it computes."""

from __future__ import annotations

from collections.abc import Collection

from autofed import algorithms
from autofed.planner.reasons import Reasons
from autofed.plans import AlgorithmSettings, Budget


def passes_per_step(
    settings: AlgorithmSettings, sites: Collection[str], budget: Budget, *, private: bool = False
) -> dict[str, float]:
    """What a step computes for each site, in passes over its batch: 1, and more where it also trains on public images.

    The algorithm states what it computes at a site (`Algorithm.passes`). With pseudo-labels a student model is trained,
    too, for as many steps as a site: in turn with the sites on this machine, and after those that train at the same
    time elsewhere. The cost of labelling is not included: the planner does not know how many public images there are.
    """
    kind = algorithms.stated(settings.name)
    site_passes = kind.passes(settings.settings, private=private)
    if not kind.shares_pseudo_labels:
        return dict.fromkeys(sites, site_passes)
    local_sites = [site for site in sites if site not in budget.site_speeds]
    return {site: site_passes + (1 / len(local_sites) if site in local_sites else 1) for site in sites}


def algorithm_settings(name: str | None, sites: int, reasons: Reasons) -> AlgorithmSettings:
    """The algorithm `name`, by default federated averaging, which no other beat at equal steps (docs/benchmarks).

    Setting different numbers of steps by hand makes it fednova (`plans.changes`).
    """
    if name is not None:
        pseudo_labels = algorithms.stated(name).shares_pseudo_labels
        counted = "; hours count its steps on public images and its student, too" if pseudo_labels else ""
        reasons.record("agreement.algorithm.name", name, f"asked for{counted}")
        return AlgorithmSettings(name=name)
    why = "every site takes as many steps as the others: then nothing more elaborate was better beyond chance"
    reasons.record("agreement.algorithm.name", "fedavg", why if sites > 1 else "one site has nobody to drift from")
    return AlgorithmSettings(name="fedavg")
