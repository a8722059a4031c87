"""How the sites learn together, where nobody asks for something else."""

from __future__ import annotations

from autofed.planner.reasons import Reasons
from autofed.plans import Algorithm

_LESSONS = 0.4
"""Of dcfed's steps so many have public images beside the patients, which doubles them (`begin` leaves that share)."""


def work_of(algorithm: str, sites: int, *, private: bool) -> float:
    """What a step of a site computes in all, in steps on patients: more than 1 where public images teach, too.

    dcfed's student takes as many steps as one of the sites; with private teachers a site also trains a model of its
    own. What labelling costs is not in it: how many public images there are is not known to the planner.
    """
    if algorithm != "dcfed":
        return 1.0
    return (2 if private else 1) * (1 + _LESSONS) + 1 / sites


def algorithm(wanted: str | None, sites: int, reasons: Reasons) -> Algorithm:
    """The algorithm asked for, or federated averaging, which no other beat at equal steps (docs/benchmarks.md).

    Who gives sites different numbers of steps by hand gets fednova (`plans.changes`).
    """
    if wanted is not None:
        work = work_of(wanted, sites, private=False)
        beside = f"; with public images and a student a step computes {work:.2g} times as much" if work > 1 else ""
        reasons.say("agreement.algorithm.name", wanted, f"asked for{beside}")
        return Algorithm(name=wanted)
    why = "every site takes as many steps as the others: then nothing more elaborate was better beyond chance"
    reasons.say("agreement.algorithm.name", "fedavg", why if sites > 1 else "one site has nobody to drift from")
    return Algorithm(name="fedavg")
