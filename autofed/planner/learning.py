"""How the sites learn together, where nobody asks for something else."""

from __future__ import annotations

from collections.abc import Collection

from autofed import algorithms
from autofed.planner.reasons import Reasons
from autofed.plans import AlgorithmSettings, Budget


def passes(
    chosen: AlgorithmSettings, sites: Collection[str], budget: Budget, *, private: bool = False
) -> dict[str, float]:
    """What a step computes for each site, in passes over its patches: 1, and more where public images teach, too.

    The algorithm says what it is at a site (`AlgorithmSettings.passes`). Where public images are labelled there is a
    student, too, of as many steps as a site: beside those that take turns on this machine, and after those that work at
    the same time elsewhere. What labelling costs is not in it: how many public images there are is not known to the
    planner.
    """
    kind = algorithms.stated(chosen.name)
    own = kind.passes(chosen.settings, private=private)
    if not kind.shares_pseudo_labels:
        return dict.fromkeys(sites, own)
    here = [site for site in sites if site not in budget.site_speeds]
    return {site: own + (1 / len(here) if site in here else 1) for site in sites}


def algorithm(wanted: str | None, sites: int, reasons: Reasons) -> AlgorithmSettings:
    """The algorithm asked for, or federated averaging, which no other beat at equal steps (docs/benchmarks).

    Who gives sites different numbers of steps by hand gets fednova (`plans.changes`).
    """
    if wanted is not None:
        labelled = algorithms.stated(wanted).shares_pseudo_labels
        counted = "; hours count its steps on public images and its student, too" if labelled else ""
        reasons.say("agreement.algorithm.name", wanted, f"asked for{counted}")
        return AlgorithmSettings(name=wanted)
    why = "every site takes as many steps as the others: then nothing more elaborate was better beyond chance"
    reasons.say("agreement.algorithm.name", "fedavg", why if sites > 1 else "one site has nobody to drift from")
    return AlgorithmSettings(name="fedavg")
