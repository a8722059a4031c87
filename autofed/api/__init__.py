"""The API: plain Python functions on paths and arrays. The command line only parses arguments and calls them.

Each is imported when it is first used, so that fingerprinting and preprocessing do not import torch.
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

_MODULES = {
    "audit": "auditing",
    "inversion": "auditing",
    "fingerprint": "planning",
    "private_fingerprint": "planning",
    "plan": "planning",
    "change": "planning",
    "preprocess": "preprocessing",
    "run": "running",
    "train": "training",
    "predict": "prediction",
    "evaluate": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"autofed.api.{_MODULES[name]}"), name)
    raise AttributeError(f"autofed.api has no {name!r}; its functions are {', '.join(_MODULES)}")
