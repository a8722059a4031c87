"""The six verbs as plain Python functions on paths and arrays; the command line only parses and calls them.

Each is read when it is first asked for, so that fingerprinting and preprocessing do without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autofed.api.auditing import audit, inversion
    from autofed.api.evaluation import evaluate
    from autofed.api.planning import change, fingerprint, plan, private_fingerprint
    from autofed.api.prediction import predict
    from autofed.api.preprocessing import preprocess
    from autofed.api.running import run
    from autofed.api.training import train

__all__ = [
    "audit",
    "change",
    "evaluate",
    "fingerprint",
    "inversion",
    "plan",
    "predict",
    "preprocess",
    "private_fingerprint",
    "run",
    "train",
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
        return getattr(import_module(f"autofed.api.{_ROOMS[name]}"), name)
    raise AttributeError(f"autofed.api has no {name!r}; the verbs are {', '.join(_ROOMS)}")
