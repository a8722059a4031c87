"""What a site declares about its data, and whether several sites agree."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Protocol

from pydantic import field_validator

from autofed.data.labels import ClassOrder, HasLabels, Labels, Values, canonical, describe_values
from autofed.files import Record

RESERVED_SITES = ("pooled", "global", "public", "student")
"""What all sites' data together, models without a site, and public images are called; no site may take these names."""

DECLARED = ("channels", "labels", "dimension")
"""What sites can disagree on."""


class HasDeclaration(HasLabels, Protocol):
    """A declaration, or the agreement that was made of it."""

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""

    @property
    def dimension(self) -> int:
        """2 or 3."""


class Declaration(Record):
    """What every site of a federation must declare alike."""

    channels: tuple[str, ...]
    labels: dict[str, Values]
    regions_class_order: ClassOrder = ()
    dimension: int

    @field_validator("labels")
    @classmethod
    def _canonical(cls, labels: dict[str, Values]) -> dict[str, Values]:
        """In one order: two sites that list them in another order say the same."""
        return canonical(labels)


def site_name_problem(name: str) -> str | None:
    """What is wrong with the name of a site, or None. It names folders, so it must not lead out of them or hide."""
    if name.lower() in RESERVED_SITES:
        return f"no site may be called {name!r}, which stands for what no single site has; give its folder another name"
    if not re.fullmatch(r"\w(?:[\w .-]{0,62}\w)?", name):
        return (
            f"the site is called {name!r}; expected up to 64 letters, digits, underscores, hyphens, dots and spaces, "
            "with a letter or digit at both ends; give its folder such a name"
        )
    return None


def disagreements(declarations: Mapping[str, Declaration]) -> list[str]:
    """One sentence for each thing the sites declare differently, naming every site and what it says."""
    problems = []
    for what in DECLARED:
        sites_by_value: dict[str, list[str]] = {}
        for site, declaration in declarations.items():
            sites_by_value.setdefault(describe_regions(declaration, what), []).append(site)
        if len(sites_by_value) > 1:
            listed = "; ".join(f"{', '.join(sites)}: {value}" for value, sites in sites_by_value.items())
            hint = _annotated_hint(declarations) if what == "labels" else ""
            problems.append(f"the sites disagree on {what} ({listed}); make dataset.json the same at all sites{hint}")
    return problems


def _annotated_hint(declarations: Mapping[str, Declaration]) -> str:
    """What to write where sites leave out structures that they never annotated, as local datasets may well do."""
    all_structures = dict.fromkeys(
        name for declaration in declarations.values() for name in Labels.of(declaration).names
    )
    sites: dict[tuple[str, ...], list[str]] = {}
    for site, declaration in declarations.items():
        sites.setdefault(Labels.of(declaration).names, []).append(site)
    return "".join(
        f"; if {' and '.join(incomplete)} never annotated {' and '.join(missing)}, write the same labels there too and "
        f'"annotated": {json.dumps(structures)}'
        for structures, incomplete in sites.items()
        if (missing := [name for name in all_structures if name not in structures])
    )


def describe_regions(declaration: HasDeclaration, what: str) -> str:
    """What is declared of one thing, in words that are the same only if they mean the same."""
    match what:
        case "channels":
            return describe_channels(declaration.channels)
        case "labels":
            return describe_values(canonical(declaration.labels), declaration.regions_class_order)
        case _:
            return f"{declaration.dimension}D"


def describe_channels(channels: tuple[str, ...]) -> str:
    """How many there are, and their names."""
    return f"{len(channels)} ({', '.join(channels)})"
