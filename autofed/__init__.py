"""autofed: plan, train and ship a segmentation model over several hospitals, none of which shares a scan.

The verbs are handed on lazily, so that `import autofed` costs nothing: `autofed.plan(...)`, `autofed.predict(...)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_VERBS = ("fingerprint", "plan", "preprocess", "train", "run", "predict", "evaluate")
__all__ = ["__version__", "evaluate", "fingerprint", "plan", "predict", "preprocess", "run", "train"]

if TYPE_CHECKING:
    from autofed.api import evaluate, fingerprint, plan, predict, preprocess, run, train


def __dir__() -> list[str]:
    return sorted([*globals(), *_VERBS])


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        from autofed import api

        return getattr(api, name)
    raise AttributeError(f"autofed has no {name!r}; its verbs are {', '.join(_VERBS)}")
