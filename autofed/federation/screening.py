"""Which answers count in a round: whole, of this round, of the right shape, and no rubbish. All others are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from autofed.data.labels import Labels
from autofed.errors import ValidationErrors, raise_if_any
from autofed.inference.postprocessing import RULES
from autofed.messages import ArrayGroups, Arrays, Failure, Message, Request, Response, from_bytes
from autofed.privacy import ADAPTATION

LARGEST_GROWTH = 10.0
"""So many times the largest entry before (or 1, if that is larger) is what an entry may become in a round."""


LARGEST_RATIO = 100.0
"""So many times as long as the median of three or more sites' arrays may be those of one."""


@dataclass(frozen=True)
class Responses:
    """The releases that count, in the order of the sites' names, and why each other site was left out."""

    releases: tuple[Response, ...]
    left_out: Mapping[str, str]

    def merged_with(self, later: Responses) -> Responses:
        """These, and those of sites that were asked again."""
        releases = sorted((*self.releases, *later.releases), key=lambda release: release.site)
        return Responses(tuple(releases), later.left_out)

    def without_outliers(self, released: Mapping[str, str]) -> Responses:
        """These without the sites whose arrays are far longer than those of most."""
        far = _outliers(self.releases, released)
        return Responses(tuple(r for r in self.releases if r.site not in far), {**self.left_out, **far})


def screen_responses(
    answers: Mapping[str, bytes],
    sites: Sequence[str],
    request: Request,
    released: Mapping[str, str],
    labels: Labels,
    adapts: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    misfits: Callable[[ArrayGroups, ArrayGroups], list[str]] = lambda arrays, shared: [],
) -> Responses:
    """Part the answers to a request into those that count and those that do not; a silent site is left out, too.

    `released` are the groups that each must hold, and the shared group that each must look like
    (see `algorithms.released`); scores must be of structures among the `labels`. What the mechanism `adapts` to must be
    there in these shapes, since the next round's depends on it. `misfits` is what the algorithm itself has against an
    answer's arrays. What comes from nobody who was asked
    counts nowhere.
    """
    releases, left_out = [], {}
    for site in sorted(sites):
        try:
            release = _release(answers, site, request, released, labels)
            raise_if_any(site, _without_adaptation(release.arrays, adapts))
            raise_if_any(site, misfits(release.arrays, request.shared))
            releases.append(release)
        except ValidationErrors as error:
            left_out[site] = "; ".join(error.problems)
    return Responses(tuple(releases), left_out)


def _outliers(releases: Sequence[Response], released: Mapping[str, str]) -> dict[str, str]:
    """Whose arrays are far longer than is usual; of two sites nobody can say which of them is wrong."""
    left_out = {}
    for group in released if len(releases) > 2 else ():
        lengths = {release.site: _length(release.arrays[group]) for release in releases}
        usual = float(np.median(list(lengths.values())))
        for site, length in lengths.items():
            if length > LARGEST_RATIO * usual > 0:
                ratio = length / usual
                left_out[site] = f"answered with a {group} {ratio:.0f} times as long as is usual among the sites"
    return left_out


def _length(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values())))


def _release(
    answers: Mapping[str, bytes], site: str, request: Request, released: Mapping[str, str], labels: Labels
) -> Response:
    if site not in answers:
        raise ValidationErrors(site, ["did not answer"])
    try:
        message = from_bytes(answers[site])
    except ValidationErrors as error:
        raise ValidationErrors(site, [f"answered what is no message: {p}" for p in error.problems]) from None
    problems = _kind_problems(message, site, request)
    if problems or not isinstance(message, Response):
        raise ValidationErrors(site, problems)
    problems = _misfits(message.arrays, request.shared, released) or _strange_scores(message.arrays, labels)
    if problems:
        raise ValidationErrors(site, problems)
    return message


def _kind_problems(message: Message, site: str, request: Request) -> list[str]:
    if isinstance(message, Failure):
        return [f"failed with the code {message.code!r}; the details are in its site.log"]
    if not isinstance(message, Response):
        return ["answered with a question"]
    asked, found = (request.run, request.round, site), (message.run, message.round, message.site)
    return [] if found == asked else [f"answered another question than that of round {request.round}"]


def _misfits(arrays: ArrayGroups, shared: ArrayGroups, released: Mapping[str, str]) -> list[str]:
    """A group must look like the one that it is added to, and neither be NaN or infinite nor blow that up."""
    problems = [f"answered without {group}" for group in released if group not in arrays]
    problems += [
        f"answered with NaN or infinite values in {group}"
        for group, found in arrays.items()
        if not all(np.isfinite(array).all() for array in found.values())
    ]
    for group, like in released.items():
        if group in arrays and like in shared and not problems:
            problems += _unlike(group, arrays[group], shared[like])
    return problems


def _without_adaptation(arrays: ArrayGroups, adapts: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = {name: array.shape for name, array in arrays.get(ADAPTATION, {}).items()}
    return [] if found == dict(adapts) else [f"answered with {found} to adapt to, where {dict(adapts)} was expected"]


def _strange_scores(arrays: ArrayGroups, labels: Labels) -> list[str]:
    """What no site says of itself: training's numbers under a score's name, scores of nothing, or of another form."""
    problems = ["answered with dice among its metrics"] if "dice" in arrays.get("metrics", {}) else []
    for group, shape in (("dice", (1,)), ("sums", (2, len(RULES)))):
        for name, found in arrays.get(group, {}).items():
            if name not in labels.names or found.shape != shape or found.min() < 0 or (group == "dice" and found > 1):
                problems.append(f"answered with {group} of {name!r} in the shape {found.shape} that are none")
    return problems


def _unlike(group: str, found: Arrays, before: Arrays) -> list[str]:
    if _shapes(found) != _shapes(before):
        return [f"answered with other names, shapes or dtypes in {group} than in the weights it was sent"]
    limit = LARGEST_GROWTH * max(1.0, *(float(np.abs(array).max(initial=0)) for array in before.values()))
    largest = max(float(np.abs(before[name] + array).max(initial=0)) for name, array in found.items())
    return (
        [f"answered with a {group} that leads to a value of {largest:.2g}, where {limit:.2g} is the most"]
        if largest > limit
        else []
    )


def _shapes(arrays: Arrays) -> dict[str, tuple]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}
