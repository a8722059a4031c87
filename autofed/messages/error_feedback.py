"""Weights and updates as quantized differences, with error feedback: the next round corrects what rounding lost.

Down: the coordinator knows what the sites hold, and sends how the common state differs from it in the precision of
the plan; both sides add what arrives to what was held. What rounding lost is still a difference, and so is in the
next round's. A site whose response of the round before was not merged may hold something else, and gets the whole in
float32; so does one whose disk has lost it.

Up: a site adds to its update what rounding took from the last one that was merged, and stores what rounding takes from
this one. Both have passed the mechanism before: what is computed from protected numbers tells no more of a patient.

(Error feedback: Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019; in both directions: Tang et al., ICML
2019.) With float32 there are no differences, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from autofed.errors import ValidationErrors
from autofed.messages import quantization
from autofed.messages.messages import (
    ArrayGroups,
    Arrays,
    Failure,
    Request,
    ServerState,
    from_bytes,
    load_groups,
    save_groups,
)
from autofed.plans import WirePrecision

STATE_LOST = "forgotten"
"""The code of a site that no longer holds what a difference builds on."""

_LARGEST_FAILURE = 1 << 16
_HELD, _LOST = "held.", "lost."


class StateLost(Exception):
    """A difference builds on a round that is not on the site's disk any more."""


@dataclass(frozen=True)
class Broadcast:
    """A round's groups for the sites: as a `difference` for those that hold the last round's, and as a `whole`.

    `precisions` are those of the difference; `held` is what all sites hold once they have it, for the next broadcast.
    """

    whole: ArrayGroups
    difference: ArrayGroups
    precisions: Mapping[str, str] = field(default_factory=dict)
    held: ArrayGroups = field(default_factory=dict)

    def request(self, run: str, round: int, task: str, since: int, *, anew: bool = False) -> Request:
        """The request to a site whose response of round `since` was the last merged, `anew` if it lost its state."""
        if since == round - 1 and not anew:
            return Request(run, round, task, self.difference, since, self.precisions)
        return Request(run, round, task, self.whole, since)

    def keep(self, server_only: ArrayGroups) -> ArrayGroups:
        """The server-only groups, with what the sites hold of this broadcast."""
        return {**{group: arrays for group, arrays in server_only.items() if not group.startswith(_HELD)}, **self.held}


def make_broadcast(state: ServerState, names: Collection[str], precision: WirePrecision) -> Broadcast:
    """What to send of a state's shared groups, of which those of these `names` are made of weights.

    The state's server-only groups must include the `held` of the last broadcast.
    """
    whole, difference = dict(state.shared), dict(state.shared)
    quantized = _quantizable(state.shared, names, precision)
    for group, arrays in quantized.items():
        before = _or_zeros(state.server_only.get(_HELD + group), arrays)
        difference[group] = _differences(arrays, before)
        whole[group] = _sums(before, quantization.quantized(difference[group], precision))
    held = {_HELD + group: whole[group] for group in quantized}
    return Broadcast(whole, difference, dict.fromkeys(quantized, precision), held)


@dataclass(frozen=True)
class ErrorFeedbackBuffer:
    """What a site holds of the common state, and what rounding took from its updates, by round, on its own disk.

    `released` are the groups of its responses that are quantized, each with the shared group that it is added to.
    """

    folder: Path
    released: Mapping[str, str]
    precision: WirePrecision

    def received(self, request: Request) -> Request:
        """The request with whole groups; `StateLost` if they build on a round that is not here any more."""
        if not request.precisions:
            return request
        if request.since and not self._path(request.since).is_file():
            raise StateLost(f"what was held after round {request.since} is not in {self.folder} any more")
        held = self._recall(request.since)
        summed = {
            group: _sums(_or_zeros(held.get(_HELD + group), request.shared[group]), request.shared[group])
            for group in request.precisions
        }
        return replace(request, shared={**request.shared, **summed}, precisions={})

    def release(self, request: Request, arrays: ArrayGroups) -> tuple[ArrayGroups, Mapping[str, str]]:
        """What is sent of these arrays, and in which precisions: what rounding lost last time is added.

        What the site holds of a `received` request from now on, and what rounding takes, is stored for the next round.
        `ArithmeticError` if a number is not finite.
        """
        quantized = _quantizable(arrays, self.released, self.precision)
        if not quantized:
            return arrays, {}
        before = self._recall(request.since)
        sums = {group: _sums(a, _or_zeros(before.get(_LOST + group), a)) for group, a in quantized.items()}
        lost = {_LOST + group: _differences(a, self._rounded(a)) for group, a in sums.items()}
        held = _quantizable(request.shared, self.released.values(), self.precision)
        self._keep(request, {**{_HELD + group: a for group, a in held.items()}, **lost})
        return {**arrays, **sums}, dict.fromkeys(sums, self.precision)

    def _rounded(self, arrays: Arrays) -> Arrays:
        try:
            return quantization.quantized(arrays, self.precision)
        except ValidationErrors as error:  # of the site's own making, not of the request's
            raise ArithmeticError(str(error)) from None

    def _recall(self, round: int) -> ArrayGroups:
        path = self._path(round)
        return load_groups(path)[0] if path.is_file() else {}

    def _keep(self, request: Request, groups: ArrayGroups) -> None:
        save_groups(self._path(request.round), groups)
        for path in self.folder.glob("round_*.safetensors"):
            if path not in (self._path(request.round), self._path(request.since)):
                path.unlink()

    def _path(self, round: int) -> Path:
        return self.folder / f"round_{round:05d}.safetensors"


def is_state_lost(reply: bytes) -> bool:
    """Whether this is the reply of a site that needs the whole state."""
    if len(reply) > _LARGEST_FAILURE:
        return False  # it is not worth reading twice
    try:
        message = from_bytes(reply)
    except ValidationErrors:
        return False
    return isinstance(message, Failure) and message.code == STATE_LOST


def _quantizable(groups: ArrayGroups, names: Collection[str], precision: WirePrecision) -> ArrayGroups:
    """The groups, of these names, that travel in another precision than their own."""
    if precision == "float32":
        return {}
    return {
        group: arrays for group, arrays in groups.items() if group in names and quantization.is_worth_quantizing(arrays)
    }


def _or_zeros(arrays: Arrays | None, like: Arrays) -> Arrays:
    """The arrays, or zeros if there are none or they have other shapes."""
    if arrays is not None and quantization.shapes_of(arrays) == quantization.shapes_of(like):
        return arrays
    return {name: np.zeros_like(array) for name, array in like.items()}


def _sums(a: Arrays, b: Arrays) -> dict[str, np.ndarray]:
    return {name: array + b[name] for name, array in a.items()}


def _differences(a: Arrays, b: Arrays) -> dict[str, np.ndarray]:
    return {name: array - b[name] for name, array in a.items()}
