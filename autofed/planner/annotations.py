"""Which structures each site annotated, where that is not all of them."""

from __future__ import annotations

from autofed.data.labels import Labels
from autofed.fingerprints import Fingerprint
from autofed.planner.reasons import Reasons


def annotated_at(fingerprint: Fingerprint, reasons: Reasons) -> dict[str, tuple[str, ...]]:
    """What was annotated at the sites that annotated some of the structures only."""
    names, sites = Labels.of(fingerprint.declaration).names, fingerprint.sites
    partial = {site: counts.annotated for site, counts in sites.items() if 0 < len(counts.annotated) < len(names)}
    if partial:
        shown = "; ".join(f"{site}: {', '.join(annotated)}" for site, annotated in partial.items())
        every = sum(site.labelled for site in sites.values())
        taught = ", ".join(f"{name} by {fingerprint.labelled(name)}" for name in names)
        why = f"no absence is taught where nobody looked: of {every} labelled cases {taught} (marginal loss)"
        reasons.say("agreement.annotated", shown, why)
    return partial
