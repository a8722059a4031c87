"""autofed: plan, train and ship a segmentation model over several hospitals, none of which shares a scan.

`autofed.plan(...)`, `autofed.predict(...)` and so on are imported when first used, so that `import autofed` is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_FUNCTIONS = ("fingerprint", "plan", "preprocess", "train", "run", "predict", "evaluate")
__all__ = ["__version__", "evaluate", "fingerprint", "plan", "predict", "preprocess", "run", "train"]

if TYPE_CHECKING:
    from autofed.api import evaluate, fingerprint, plan, predict, preprocess, run, train


def __dir__() -> list[str]:
    return sorted([*globals(), *_FUNCTIONS])


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        from autofed import api

        return getattr(api, name)
    raise AttributeError(f"autofed has no {name!r}; its functions are {', '.join(_FUNCTIONS)}")
