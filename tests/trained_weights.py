"""Weights that small trainings end with, as digests: on one kind of machine they stay the same to the bit."""

from __future__ import annotations

import hashlib
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autofed import algorithms
from autofed.files import write_json
from autofed.messages import Message
from autofed.plans import Plan
from autofed.preprocessing import Store
from tests import small_federation as small

SEEDED = {"noise_seed": 1, "simulation": True}
UNEVEN = {"training.steps_per_round": 2, "training.steps_at": {"bravo": 3}}
MORE = {"wire": "int8", "training.ema": 0.5, "server.optimiser": "momentum"}


def trainings() -> dict[str, tuple[str, str, dict[str, object]]]:
    """By name: the algorithm, the mechanism, and what else the plan says."""
    chosen: dict[str, tuple[str, str, dict[str, object]]] = {name: (name, "none", {}) for name in algorithms.names()}
    chosen["fedavg in 8 bits"] = ("fedavg", "none", MORE)
    chosen |= {f"{name} under {mechanism}": (name, mechanism, {}) for name, mechanism in (
        ("fedavg", "dp-sgd"), ("fedavg", "adp"), ("fedavg", "feddp"), ("scaffold", "dp-sgd"), ("dcfed", "dp-sgd"),
    )}  # fmt: skip
    return chosen


def train(name: str, ground: tuple[Plan, Mapping[str, Store]], folder: Path) -> str:
    """The digest of all that a training of `small_federation.make` ends with."""
    algorithm, mechanism, settings = trainings()[name]
    plan, stores = ground
    settings = UNEVEN | settings
    plan = small.private(plan, mechanism, **settings) if mechanism != "none" else plan.change(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small.train((plan, stores), folder, algorithm, **SEEDED)
    finally:
        torch.set_num_threads(threads)
    return digest(small.final_arrays(folder, plan))


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays, by name."""
    digest_of_all = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest_of_all.update(
            f"{name} {array.dtype.str} {array.shape}\n".encode() + np.ascontiguousarray(array).tobytes()
        )
    return digest_of_all.hexdigest()


def in_words(message: Message) -> dict[str, Any]:
    """What a message holds, as JSON: every array by its kind, its shape and a digest."""
    kind = type(message).__name__
    words: dict[str, Any] = {"kind": "Release" if kind == "Response" else kind}  # as in what was written before
    for field in fields(message):
        value = getattr(message, field.name)
        is_groups = field.name in ("shared", "arrays")
        words[field.name] = {g: _described(arrays) for g, arrays in value.items()} if is_groups else value
    return words


def _described(arrays: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    return {name: [array.dtype.str, list(array.shape), digest({name: array})] for name, array in arrays.items()}


def measured(folder: Path) -> dict[str, Any]:
    """This machine, and the digest of every training here."""
    ground = small.make(folder / "data")
    digests = {name: train(name, ground, folder / name.replace(" ", "_")) for name in trainings()}
    return {"machine": machine(), "weights": digests}


def machine() -> dict[str, str]:
    """All that sums of floats depend on, beside the code: another of these may round another way."""
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _processor() -> str:
    """What the processor calls itself and what it can do, as a digest."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor()
    lines = information.read_text().splitlines()
    named = {key: next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags")}
    return hashlib.sha256(repr(sorted(named["flags"].split())).encode()).hexdigest()[:16] + named["model name"][12:]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(sys.argv[1]), measured(Path(scratch)))
