"""Which responses count in a round: whole, of this round, of the right shape, and finite. All others are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from autofed.data.labels import Labels
from autofed.errors import ValidationErrors
from autofed.inference.postprocessing import RULES
from autofed.messages import ArrayGroups, Arrays, Failure, Message, Request, Response, from_bytes
from autofed.privacy import ADAPTATION

LARGEST_GROWTH = 10.0
"""So many times the largest entry before (or 1, if that is larger) is what an entry may become in a round."""


LARGEST_RATIO = 100.0
"""So many times as long as the median of three or more sites' arrays may be those of one."""


@dataclass(frozen=True)
class Responses:
    """The responses that count, in the order of the sites' names, and why each other site was left out."""

    accepted: tuple[Response, ...]
    left_out: Mapping[str, str]

    @classmethod
    def none_from(cls, sites: Iterable[str]) -> Self:
        """Before the first request: none of these sites has responded."""
        return cls((), dict.fromkeys(sites, ""))


def screen_responses(
    earlier: Responses,
    replies: Mapping[str, bytes],
    request: Request,
    released: Mapping[str, str],
    labels: Labels,
    adapts: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    mismatches: Callable[[ArrayGroups, ArrayGroups], list[str]] = lambda arrays, shared: [],
) -> Responses:
    """The responses accepted so far and those of the sites that were left out, which got the request again.

    A site that did not reply stays left out, and a reply of a site that got no request counts nowhere. Outliers are
    looked for among all that are accepted.

    Args:
        earlier: The responses of earlier attempts, and the sites that got the request this time: all left out.
        replies: What these sites sent back, by site.
        request: What was requested, with whole groups.
        released: The groups that each response must hold, and the shared group that each must look like
            (`Algorithm.released`).
        labels: The structures that there may be scores of.
        adapts: The arrays, with their shapes, that the next round's mechanism depends on.
        mismatches: What the algorithm itself finds wrong with a response's arrays, given the shared groups.
    """
    accepted, left_out = list(earlier.accepted), dict[str, str]()
    for site in sorted(earlier.left_out):
        try:
            message = from_bytes(replies[site]) if site in replies else None
        except ValidationErrors as error:
            left_out[site] = "; ".join(f"answered what is no message: {problem}" for problem in error.problems)
            continue
        problems = _message_problems(message, site, request)
        if isinstance(message, Response) and not problems:
            arrays = message.arrays
            problems = _mismatches(arrays, request.shared, released) or _score_problems(arrays, labels)
            problems = problems or _adaptation_problems(arrays, adapts) or mismatches(arrays, request.shared)
            if not problems:
                accepted.append(message)
                continue
        left_out[site] = "; ".join(problems)
    outliers = _outliers(accepted, released)
    accepted = [response for response in accepted if response.site not in outliers]
    return Responses(tuple(sorted(accepted, key=lambda response: response.site)), {**left_out, **outliers})


def _outliers(responses: Sequence[Response], released: Mapping[str, str]) -> dict[str, str]:
    """Whose arrays are far longer than is usual; of two sites nobody can say which of them is wrong."""
    left_out = {}
    for group in released if len(responses) > 2 else ():
        lengths = {response.site: _length(response.arrays[group]) for response in responses}
        usual = float(np.median(list(lengths.values())))
        for site, length in lengths.items():
            if length > LARGEST_RATIO * usual > 0:
                ratio = length / usual
                left_out[site] = f"answered with a {group} {ratio:.0f} times as long as is usual among the sites"
    return left_out


def _length(arrays: Arrays) -> float:
    return float(np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays.values())))


def _message_problems(message: Message | None, site: str, request: Request) -> list[str]:
    if message is None:
        return ["did not answer"]
    if isinstance(message, Failure):
        return [f"failed with the code {message.code!r}; the details are in its site.log"]
    if not isinstance(message, Response):
        return ["answered with a question"]
    expected, found = (request.run, request.round, site), (message.run, message.round, message.site)
    return [] if found == expected else [f"answered another question than that of round {request.round}"]


def _mismatches(arrays: ArrayGroups, shared: ArrayGroups, released: Mapping[str, str]) -> list[str]:
    """A group must look like the one that it is added to, and neither be NaN or infinite nor blow that up."""
    problems = [f"answered without {group}" for group in released if group not in arrays]
    problems += [
        f"answered with NaN or infinite values in {group}"
        for group, group_arrays in arrays.items()
        if not all(np.isfinite(array).all() for array in group_arrays.values())
    ]
    for group, like in released.items():
        if group in arrays and like in shared and not problems:
            problems += _unlike(group, arrays[group], shared[like])
    return problems


def _adaptation_problems(arrays: ArrayGroups, adapts: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = {name: array.shape for name, array in arrays.get(ADAPTATION, {}).items()}
    return [] if found == dict(adapts) else [f"answered with {found} to adapt to, where {dict(adapts)} was expected"]


def _score_problems(arrays: ArrayGroups, labels: Labels) -> list[str]:
    """What no site says of itself: training's numbers under a score's name, scores of nothing, or of another form."""
    problems = ["answered with dice among its metrics"] if "dice" in arrays.get("metrics", {}) else []
    for group, shape in (("dice", (1,)), ("sums", (2, len(RULES)))):
        for name, scores in arrays.get(group, {}).items():
            is_known = name in labels.names and scores.shape == shape
            if not is_known or scores.min() < 0 or (group == "dice" and scores > 1):
                problems.append(f"answered with {group} of {name!r} in the shape {scores.shape} that are none")
    return problems


def _unlike(group: str, update: Arrays, before: Arrays) -> list[str]:
    if _shapes(update) != _shapes(before):
        return [f"answered with other names, shapes or dtypes in {group} than in the weights it was sent"]
    limit = LARGEST_GROWTH * max(1.0, *(float(np.abs(array).max(initial=0)) for array in before.values()))
    largest = max(float(np.abs(before[name] + array).max(initial=0)) for name, array in update.items())
    return (
        [f"answered with a {group} that leads to a value of {largest:.2g}, where {limit:.2g} is the most"]
        if largest > limit
        else []
    )


def _shapes(arrays: Arrays) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}
