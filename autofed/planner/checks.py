"""Why no plan can be made for a fingerprint and a budget."""

from __future__ import annotations

from autofed.data.labels import Labels
from autofed.fingerprints import Fingerprint
from autofed.plans import Budget


def data_problems(fingerprint: Fingerprint, budget: Budget) -> list[str]:
    """Why the sites' data cannot be learned from, or not within this budget."""
    problems = [] if fingerprint.sites else ["the fingerprint names no site; merge those that the sites handed over"]
    if budget.delta is not None and budget.epsilon is None:
        problems.append("a delta belongs to an epsilon; write both, such as --epsilon 8 --delta 1e-5")
    for name, site in fingerprint.sites.items():
        if site.labelled == 0:
            problems.append(f"the site {name} has no labelled case; leave it out")
    if budget.hours is not None and not budget.is_measured(fingerprint.sites):
        problems.append(f"{budget.hours:g} hours were given, but no speed to divide them by; measure it, or give none")
    if fingerprint.declaration.dimension == 2 and budget.configuration not in ("auto", "2d"):
        problems.append(f"{budget.configuration} was asked for, but the data are pictures; expected --configuration 2d")
    return problems


def structure_problems(fingerprint: Fingerprint) -> list[str]:
    """Structures that cannot be learned, since no site annotated them or no case has them."""
    problems = []
    for name in Labels.of(fingerprint.declaration).names:
        if fingerprint.sites and all(name not in (s.annotated or (name,)) for s in fingerprint.sites.values()):
            problems.append(f"no site annotated the structure {name}; remove it from `labels` and from `annotated`")
        elif fingerprint.classes[name].cases == 0:
            problems.append(f"no case of any site has the structure {name}; remove it from `labels`")
    return problems
