"""The six verbs as plain Python functions on paths and arrays; the command line only parses and calls them.

Each is read when it is first asked for, so that fingerprinting and preprocessing do without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autofed.verbs.auditing import audit, inversion
    from autofed.verbs.evaluating import evaluate
    from autofed.verbs.planning import change, fingerprint, noised_fingerprint, plan
    from autofed.verbs.predicting import predict
    from autofed.verbs.preparing import preprocess
    from autofed.verbs.running import run
    from autofed.verbs.training import train

__all__ = [
    "audit", "change", "evaluate", "fingerprint", "inversion", "noised_fingerprint", "plan", "predict", "preprocess",
    "run", "train",
]  # fmt: skip

_ROOMS = {
    "audit": "auditing",
    "inversion": "auditing",
    "fingerprint": "planning",
    "noised_fingerprint": "planning",
    "plan": "planning",
    "change": "planning",
    "preprocess": "preparing",
    "run": "running",
    "train": "training",
    "predict": "predicting",
    "evaluate": "evaluating",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(import_module(f"autofed.verbs.{_ROOMS[name]}"), name)
    raise AttributeError(f"autofed.verbs has no {name!r}; the verbs are {', '.join(_ROOMS)}")
