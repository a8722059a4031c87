"""A site's raw files changed by hand, and what is then said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autofed.data import images
from autofed.data.images import Geometry
from autofed.errors import ValidationErrors


def declare(folder: Path, **changed: Any) -> None:
    """Change keys of a site's dataset.json; ... removes one."""
    path = folder / "dataset.json"
    description = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not ...}))


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], **geometry: Any) -> None:
    """Write a volume or a label picture again with `change` of its (Z, Y, X) array, perhaps in another geometry."""
    image = images.read(path)
    images.write(path, change(image.array[0]), Geometry(**{**vars(image.geometry), **geometry}))


def problems_of(verb: Callable[..., object], *arguments: object) -> tuple[str, ...]:
    """The problems that a call refuses with."""
    with pytest.raises(ValidationErrors) as caught:
        verb(*arguments)
    return caught.value.problems
