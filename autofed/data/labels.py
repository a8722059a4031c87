"""What the values of a label map mean: one value per structure, or regions that share values; and `ignore`.

As nnU-Net has it. `{"background": 0, "organ": 1, "tumour": 2}` are classes, of which every voxel has one. As soon as an
entry is a list of values, all of them are regions, which may overlap: `{"background": 0, "whole": [1, 2], "core": 2}`.
`regions_class_order` then holds a value for each region: a prediction is painted with them one after the other, later
ones on top. Voxels of `"ignore"`, one above all other values, were not annotated, and nothing is learned from them.

A site that never annotated some of the structures declares the same labels, and names those that it did: `annotated`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from autofed.errors import ValidationErrors, raise_if_any
from autofed.files import read_json

BACKGROUND, IGNORE = "background", "ignore"

Values = int | tuple[int, ...]
"""The value of a structure, or the values of a region."""

ClassOrder = Annotated[tuple[int, ...], Field(exclude_if=lambda order: not order)]
"""`regions_class_order` in a record: without regions it is empty, and not written."""

Structures = Annotated[tuple[str, ...], Field(exclude_if=lambda names: not names)]
"""Names of the structures that were annotated, in a record: none stand for all, and are not written."""

_MOST_VALUES = 1 << 16


class HasLabels(Protocol):
    """Whatever declares labels: a dataset, what it declares, and the agreement of a plan."""

    @property
    def labels(self) -> Mapping[str, Values]:
        """Names to values, background and ignore among them."""

    @property
    def regions_class_order(self) -> tuple[int, ...]:
        """The values that regions are painted with; empty without regions."""


@dataclass(frozen=True)
class Labels:
    """The structures in the order of the network's outputs, each a name with its values; and what else there is.

    `order` holds the value that each region is painted with; it is empty without regions, and where nothing is painted.
    `annotated` are the names of the structures that were annotated, where some were not; empty: all were.
    """

    structures: tuple[tuple[str, tuple[int, ...]], ...]
    is_regions: bool = False
    order: tuple[int, ...] = ()
    ignore: int | None = None
    annotated: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: HasLabels) -> Labels:
        """The labels that something declares, which must be in order (see `labels_problems`)."""
        return cls.declared(source.labels, source.regions_class_order)

    @classmethod
    def declared(cls, labels: Mapping[str, Any], order: Iterable[int] = ()) -> Labels:
        """The labels of a mapping as dataset.json has it, background included or not."""
        ordered = canonical(labels)
        structures = tuple((name, _listed(values)) for name, values in ordered.items() if _is_structure(name, values))
        return cls(structures, _has_regions(ordered), tuple(order), ordered.get(IGNORE))  # type: ignore[arg-type]

    def with_annotated(self, names: Iterable[str]) -> Labels:
        """The same labels where only these structures were annotated; no names stand for all of them."""
        requested = set(names)
        annotated_names = tuple(name for name in self.names if name in requested)
        return replace(self, annotated=() if annotated_names == self.names else annotated_names)

    def is_annotated(self, name: str) -> bool:
        """Whether what a label map does not show of a structure is not there."""
        return not self.annotated or name in self.annotated

    @property
    def names(self) -> tuple[str, ...]:
        """The structures' names: neither background nor ignore."""
        return tuple(name for name, _ in self.structures)

    @property
    def values(self) -> set[int]:
        """What a prediction may hold: 0, and every value of a structure."""
        return {0, *(value for _, values in self.structures for value in values)}

    @property
    def highest_value(self) -> int:
        """The highest value that a label map may hold."""
        return max(*self.values, self.ignore or 0)

    @property
    def channels(self) -> int:
        """Outputs of the network: one per region, or one per class with the background."""
        return len(self.structures) + (not self.is_regions)

    @property
    def unannotated_channels(self) -> tuple[int, ...]:
        """The outputs for structures that were not annotated."""
        named = enumerate(self.names, start=int(not self.is_regions))
        return tuple(channel for channel, name in named if not self.is_annotated(name))

    def is_foreground(self, label: np.ndarray) -> np.ndarray:
        """Where a label map holds some structure."""
        return label > 0 if self.ignore is None else (label > 0) & (label != self.ignore)

    def targets(self) -> np.ndarray:
        """The network's target for each value: float32 (values, channels) of 0 and 1; all 0 for ignore."""
        table = np.zeros((self.highest_value + 1, self.channels), np.float32)
        if not self.is_regions:
            table[0, 0] = 1
        for channel, (_, values) in enumerate(self.structures, start=int(not self.is_regions)):
            table[list(values), channel] = 1
        return table

    def paint(self, probabilities: np.ndarray) -> np.ndarray:
        """The label map (*grid), int64, of probabilities (channels, *grid).

        Of classes the most probable; of regions all that are more probable than not, one on top of the other.
        """
        if not self.is_regions:
            return np.asarray(probabilities.argmax(0))
        painted = np.zeros(probabilities.shape[1:], np.int64)
        for probability, value in zip(probabilities, self.order, strict=True):
            painted[probability > 0.5] = value
        return painted

    def names_of_values(self) -> dict[int, str]:
        """What to call the voxels of each value: the structure, or the smallest region that holds them."""
        by_size = sorted(self.structures, key=lambda structure: -len(structure[1]))
        names = {value: name for name, values in by_size for value in values}
        return dict(sorted(names.items()))


def mask(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Where a label map holds one of the values."""
    return label == values[0] if len(values) == 1 else np.isin(label, values)


def canonical(labels: Mapping[str, Any]) -> dict[str, Values]:
    """Labels as all sites write them: the background first and ignore last, values in ascending order.

    Classes are sorted, regions are left in their order, which is that of `regions_class_order`. A list of one value
    stands for the value.
    """
    plain = {name: _plain(values) for name, values in labels.items()}
    if not _has_regions(plain):
        return dict(sorted(plain.items(), key=lambda label: label[1]))
    return dict(sorted(plain.items(), key=lambda label: (label[0] == IGNORE) - (label[0] == BACKGROUND)))


def declared_order(description: Mapping[str, Any]) -> Any:
    """The `regions_class_order` of a dataset.json or prediction.json as it stands there; () without regions."""
    labels = description.get("labels")
    return description.get("regions_class_order") if isinstance(labels, dict) and _has_regions(labels) else ()


def declared_structures(description: Mapping[str, Any]) -> tuple[str, ...]:
    """The `annotated` of a dataset.json that is in order, as its labels are ordered; () without it."""
    annotated = description.get("annotated", ())
    return tuple(name for name in Labels.declared(description["labels"]).names if name in annotated)


def declared_labels(path: Path) -> dict[str, Values]:
    """The `labels` of a dataset.json or of a prediction.json; `ValidationErrors` if they are not in order."""
    description = read_json(path)
    if not isinstance(description, dict):
        raise ValidationErrors(str(path), [f"expected an object with `labels`, found {type(description).__name__}"])
    raise_if_any(str(path), labels_problems(description.get("labels"), declared_order(description)))
    return canonical(description["labels"])


def describe_values(labels: Mapping[str, Any], order: Iterable[int] = ()) -> str:
    """Labels in a sentence: `background=0, whole=[1, 2], core=2, painted 1, 2`."""
    parts = [f"{name}={list(v) if isinstance(v, list | tuple) else v}" for name, v in labels.items()]
    painted = ", ".join(map(str, order))
    return ", ".join(parts) + (f", painted {painted}" if painted else "")


# What may be declared


def labels_problems(labels: Any, order: Any = ()) -> list[str]:
    """What is wrong with labels and `regions_class_order`, as dataset.json and plans declare them."""
    if not isinstance(labels, dict) or not labels:
        return ['`labels` must map names to values, for example {"background": 0, "kidney": 1}']
    plain = {name: _plain(values) for name, values in labels.items()}
    structures = {name: values for name, values in plain.items() if name != IGNORE}
    problems = _region_problems(structures) if _has_regions(plain) else _class_problems(structures)
    if problems:
        return problems
    if IGNORE in plain:
        problems += _ignore_problems(plain[IGNORE], structures)
    if _has_regions(plain):
        del structures[BACKGROUND]
        problems += _order_problems({name: _listed(v) for name, v in structures.items()}, order)
    return problems


def annotated_problems(annotated: Any, labels: Mapping[str, Any]) -> list[str]:
    """What is wrong with the structures that a dataset.json says were annotated; its labels are in order."""
    names = Labels.declared(labels).names
    if not isinstance(annotated, list | tuple) or not annotated or not all(isinstance(n, str) for n in annotated):
        expectation = f'must list some of the structures {", ".join(names)}, for example ["{names[0]}"]'
        return [f"`annotated` {expectation}; found {annotated!r}; leave it out if all were annotated"]
    hint = f"the structures are {', '.join(names)}"
    problems = [f"`annotated` names {n!r}, which is no structure; {hint}" for n in annotated if n not in names]
    repeated = sorted({name for name in annotated if annotated.count(name) > 1})
    return problems + [f"`annotated` names {name} {annotated.count(name)} times; keep one" for name in repeated]


def _class_problems(labels: Mapping[str, Any]) -> list[str]:
    values = list(labels.values())
    are_whole = all(_is_whole(v) for v in values)
    if are_whole and labels.get(BACKGROUND) == 0 and sorted(values) == list(range(len(values))) and len(values) > 1:
        return []
    return [f"`labels` must be background 0 and then 1, 2, ... without a gap; found {describe_values(labels)}"]


def _region_problems(labels: Mapping[str, Any]) -> list[str]:
    problems = []
    if not _is_whole(labels.get(BACKGROUND)) or labels[BACKGROUND] != 0:
        problems.append(f"`labels` with regions need a background of 0; found {describe_values(labels)}")
    regions = {name: v if isinstance(v, tuple) else (v,) for name, v in labels.items() if name != BACKGROUND}
    for name, values in regions.items():
        if not values or not all(_is_whole(v) and v > 0 for v in values) or len(set(values)) < len(values):
            problems.append(f"`labels` gives {name} the values {list(values)}; write whole numbers above 0, each once")
    if problems:
        return problems
    used_values = sorted({value for values in regions.values() for value in values})
    if used_values != list(range(1, len(used_values) + 1)):
        problems.append(f"the values of all regions must be 1, 2, ... without a gap; found {describe_values(labels)}")
    for name, values in regions.items():
        equal_regions = [other_name for other_name, other_values in regions.items() if other_values == values]
        if len(equal_regions) > 1 and equal_regions[0] == name:
            problems.append(
                f"`labels` gives {' and '.join(equal_regions)} the same values {list(values)}; keep one of them"
            )
    return problems


def _ignore_problems(ignore: Any, structures: Mapping[str, Values]) -> list[str]:
    expected = max(max(_listed(values)) for values in structures.values()) + 1
    if _is_whole(ignore) and ignore == expected:
        return []
    return [f"`ignore` is {ignore!r}; write {expected}, one more than the highest of all other values"]


def _order_problems(regions: Mapping[str, tuple[int, ...]], order: Any) -> list[str]:
    """What is wrong with the values that regions are painted with; regions may be hidden by no other."""
    names = list(regions)
    if (
        not isinstance(order, list | tuple)
        or len(order) != len(names)
        or not all(_is_whole(v) for v in order)
        or len(set(order)) < len(order)
    ):
        expectation = f"one value for each of the regions {', '.join(names)}, in this order and each once"
        return [f"`regions_class_order` must be {expectation}; found {order!r}{_suggestion(regions)}"]
    problems = [
        f"`regions_class_order` paints {name} with {value}, which is none of its values {list(regions[name])}"
        for name, value in zip(names, order, strict=True)
        if value not in regions[name]
    ]
    if problems:
        return [problem + _suggestion(regions) for problem in problems]
    return [
        f"{name} would be painted over by {later}, which holds all of it; put {later} before {name} in `labels` and in "
        "`regions_class_order`"
        for number, name in enumerate(names)
        for later in names[number + 1 :]
        if set(regions[name]) < set(regions[later])
    ]


def _suggestion(regions: Mapping[str, tuple[int, ...]]) -> str:
    """What to write: of each region a value that no region inside of it has."""
    order = []
    for values in regions.values():
        inner = {v for others in regions.values() if set(others) < set(values) for v in others}
        order += sorted(set(values) - inner)[:1]
    return f"; write {order}" if len(set(order)) == len(regions) else ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(values: Any) -> Any:
    """A list as a tuple in ascending order, or as its only value; all else, and what cannot be sorted, as it is."""
    if not isinstance(values, list | tuple):
        return values
    are_whole = all(_is_whole(v) for v in values)
    return values[0] if are_whole and len(values) == 1 else tuple(sorted(values) if are_whole else values)


def _listed(values: Values) -> tuple[int, ...]:
    return values if isinstance(values, tuple) else (values,)


def _has_regions(labels: Mapping[str, Any]) -> bool:
    return any(isinstance(_plain(values), tuple) for values in labels.values())


def _is_structure(name: str, values: Values) -> bool:
    return name != IGNORE and values != 0


# What a map holds


def voxel_counts(label: np.ndarray, values: int = 0) -> np.ndarray:
    """How many voxels have each value from 0 up, at least `values` of them; slice by slice, so memory stays small."""
    most = max(values, int(label.max(initial=0)) + 1)
    counts = np.zeros(most, np.int64)
    for plane in label:
        counts += np.bincount(plane.ravel(), minlength=most)
    return counts


def value_problems(label: np.ndarray, labels: Mapping[str, Values], annotated: Iterable[str] = ()) -> Iterator[str]:
    """What is wrong with the values of a site's label map; `annotated` as in `Labels.with_annotated`."""
    declared = {value for values in labels.values() for value in _listed(values)}
    present = _values(label)
    unknown = sorted(present - declared)
    if unknown:
        listed = f"{unknown[:10]}" + (f" and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        yield f"the label holds the values {listed}, but dataset.json declares only {describe_values(labels)}"
    site_labels = Labels.declared(labels).with_annotated(annotated)
    annotated_values = {
        value for name, values in site_labels.structures if site_labels.is_annotated(name) for value in values
    }
    unannotated = sorted(present & (site_labels.values - annotated_values - {0}))
    if unannotated:
        names = ", ".join(dict.fromkeys(site_labels.names_of_values()[value] for value in unannotated))
        yield (
            f"the label holds the values {unannotated} ({names}), but `annotated` in dataset.json names only "
            f"{', '.join(site_labels.annotated)}; add what was annotated to it, or write 0 there"
        )


def _values(label: np.ndarray) -> set[int]:
    if label.min(initial=0) < 0 or label.max(initial=0) > _MOST_VALUES:
        return {int(v) for v in np.unique(label)}
    return {int(v) for v in np.flatnonzero(voxel_counts(label))}
