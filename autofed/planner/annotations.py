"""Which structures each site annotated, where that is not all of them."""

from __future__ import annotations

from autofed.data.labels import Labels
from autofed.fingerprints import Fingerprint
from autofed.planner.reasons import Reasons


def partial_annotations(fingerprint: Fingerprint, reasons: Reasons) -> dict[str, tuple[str, ...]]:
    """The annotated structures of every site that annotated only some."""
    names, sites = Labels.of(fingerprint.declaration).names, fingerprint.sites
    partial = {site: counts.annotated for site, counts in sites.items() if 0 < len(counts.annotated) < len(names)}
    if partial:
        listed = "; ".join(f"{site}: {', '.join(annotated)}" for site, annotated in partial.items())
        labelled = sum(site.labelled for site in sites.values())
        counts_by_name = ", ".join(f"{name} by {fingerprint.labelled(name)}" for name in names)
        why = f"no absence is taught where nobody looked: of {labelled} labelled cases {counts_by_name} (marginal loss)"
        reasons.record("agreement.annotated", listed, why)
    return partial
