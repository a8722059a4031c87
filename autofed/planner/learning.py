"""How the sites learn together, where nobody asks for something else."""

from __future__ import annotations

from collections.abc import Collection

from autofed.planner.reasons import Reasons
from autofed.plans import Algorithm, Budget

BEGIN = 0.6
"""The share of dcfed's rounds in which sites learn from patients alone, unless the settings say `begin`."""


def passes(chosen: Algorithm, sites: Collection[str], budget: Budget, *, private: bool = False) -> dict[str, float]:
    """What a step computes for each site, in passes over its patches: 1, and more where public images teach, too.

    After `begin` a step of dcfed has as many public patches beside the patients'; with private teachers a site also
    trains a model of its own. The student takes as many steps as a site: beside those that take turns on this machine,
    and after those that work at the same time elsewhere. What labelling costs is not in it: how many public images
    there are is not known to the planner.
    """
    if chosen.name != "dcfed":
        return dict.fromkeys(sites, 1.0)
    begin = chosen.settings.get("begin", BEGIN)
    if not isinstance(begin, (int, float)) or not 0 <= begin <= 1:
        begin = BEGIN  # the algorithm itself refuses it, and says why
    own = (2 if private else 1) * (2 - begin)
    here = [site for site in sites if site not in budget.site_speeds]
    return {site: own + (1 / len(here) if site in here else 1) for site in sites}


def algorithm(wanted: str | None, sites: int, reasons: Reasons) -> Algorithm:
    """The algorithm asked for, or federated averaging, which no other beat at equal steps (docs/benchmarks).

    Who gives sites different numbers of steps by hand gets fednova (`plans.changes`).
    """
    if wanted is not None:
        counted = "; hours count its steps on public images and its student, too" if wanted == "dcfed" else ""
        reasons.say("agreement.algorithm.name", wanted, f"asked for{counted}")
        return Algorithm(name=wanted)
    why = "every site takes as many steps as the others: then nothing more elaborate was better beyond chance"
    reasons.say("agreement.algorithm.name", "fedavg", why if sites > 1 else "one site has nobody to drift from")
    return Algorithm(name="fedavg")
