"""What commands have in common: choices, options, and how many processes."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Configuration(StrEnum):
    """On which grid to learn."""

    auto = "auto"
    flat = "2d"
    full = "3d_fullres"
    low = "3d_lowres"


class Preset(StrEnum):
    """nnU-Net's networks, and that of DCFed."""

    plain = "plain"
    medium = "resenc-m"
    large = "resenc-l"
    largest = "resenc-xl"
    dcfed = "dcfed"


class Canary(StrEnum):
    """What an audit plants."""

    gradient = "gradient"
    image = "image"
    labels = "labels"


class Task(StrEnum):
    """Which of the two shipped federations the demo runs on."""

    volumes = "3d"
    pictures = "2d"


Processes = Annotated[int, typer.Option(help="Processes for reading and preparing; 0: one per processor.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute; auto takes the fastest there is.")]
CensusOption = Annotated[
    bool,
    typer.Option("--private-census", help="Counts with noise, charged to the site's ledger; needs --epsilon, --work."),
]
WorkOption = Annotated[
    Path | None, typer.Option(help="With --private-census: WORK, where the prepared data will be and ledgers are.")
]
SimulatedCensus = Annotated[
    bool, typer.Option("--simulation", help="With --private-census: ledgers that count for nobody.")
]


def count(processes: int) -> int:
    """So many, or one per processor."""
    return processes if processes > 0 else os.cpu_count() or 1
