"""What a site tells of its data under noise: bounded numbers of each patient, whose noised sums merge by addition.

Each patient has one row of numbers. A row is made of parts (which bin, which angle, whether), each at most 1 long, and
its parts are weighted so that the whole row is at most 1 long too: what a patient can change, counted as one vector.
Which parts there are follows from what is declared alone.
"""

from autofed.census.parts import AXES, EXTENTS, KEPT_BELOW, PERIODS, SPACINGS_MM, STDS, Part, ladder, layout, shares
from autofed.census.patients import Facts, Values, declared, facts_of, labelled, patients_rows, row, rows, values_of
from autofed.census.reading import Distribution, Estimate, angle, distribution, kept, spacings
from autofed.census.records import Census, Noised, assembled, census, merge

__all__ = [
    "AXES", "EXTENTS", "KEPT_BELOW", "PERIODS", "SPACINGS_MM", "STDS", "Census", "Distribution", "Estimate", "Facts",
    "Noised", "Part", "Values", "angle", "assembled", "census", "declared", "distribution", "facts_of", "kept",
    "labelled", "ladder", "layout", "merge", "patients_rows", "row", "rows", "shares", "spacings", "values_of",
]  # fmt: skip
