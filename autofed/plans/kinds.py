"""What may stand in a plan: words of a closed list, and numbers within bounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16", "float16"]
Configuration = Literal["2d", "3d_fullres", "3d_lowres"]
WirePrecision = Literal["float32", "bfloat16", "int8"]
PresetName = Literal["plain", "resenc-m", "resenc-l", "resenc-xl", "dcfed"]

Positive = Annotated[int, Field(ge=1)]
Shape = tuple[Positive, ...]
Millimetres = Annotated[float, Field(gt=0)]

ANISOTROPY = 3.0
"""An axis this many times coarser than the others is treated apart (nnU-Net)."""
