"""How the sites learn together, where nobody asks for something else."""

from __future__ import annotations

from autofed.planner.reasons import Reasons
from autofed.plans import Algorithm


def algorithm(wanted: str | None, sites: int, reasons: Reasons) -> Algorithm:
    """The algorithm asked for, or federated averaging, which no other beat at equal steps (docs/benchmarks.md).

    Who gives sites different numbers of steps by hand gets fednova (`plans.changes`).
    """
    if wanted is not None:
        reasons.say("agreement.algorithm.name", wanted, "asked for")
        return Algorithm(name=wanted)
    why = "every site takes as many steps as the others: then nothing more elaborate was better beyond chance"
    reasons.say("agreement.algorithm.name", "fedavg", why if sites > 1 else "one site has nobody to drift from")
    return Algorithm(name="fedavg")
