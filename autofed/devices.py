"""What a device is asked to do: which one, in which precision and memory layout, and how long it takes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar, cast

import torch
from torch import nn

from autofed.plans import Device, Network, Precision
from autofed.problems import refuse

T = TypeVar("T", nn.Module, torch.Tensor)

_NARROW = 16
"""Below so many features in the first stage a CPU is faster with channels last (1.5 times at 8), above it is not."""


def pick_device(wanted: str = "auto") -> Device:
    """cpu, cuda or mps; "auto" is the fastest there is. `Problems` if the wanted one is not there."""
    found: list[Device] = ["cuda"] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    found += ["cpu"]
    if wanted == "auto":
        return found[0]
    refuse("--device", [] if wanted in found else [f"{wanted} is not here; this machine has {', '.join(found)}"])
    return cast("Device", wanted)


def arithmetic(precision: Precision, device: str) -> AbstractContextManager:
    """Within it, convolutions compute in the plan's precision; weights, gradients and losses stay float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.bfloat16)


def place(what: T, network: Network, device: str) -> T:
    """A network or its input on the device, in the memory layout that is faster there (the result is the same)."""
    if device != "cpu" or network.features[0] >= _NARROW:
        return what.to(device)
    layout = torch.channels_last if len(network.strides[0]) == 2 else torch.channels_last_3d
    return what.to(device).to(memory_format=layout)  # type: ignore[call-overload]


def seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """The shortest of several runs after one to warm up: others may be using the machine just now."""
    work()
    return min(_once(work, device) for _ in range(repeats))


def _once(work: Callable[[], object], device: str) -> float:
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def wait(device: str) -> None:
    """Until an accelerator has done all that it was told: calls to it return at once."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def machine_memory_bytes() -> int:
    """The memory of this machine, where the system says it; without limit where it does not."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize
