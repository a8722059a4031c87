"""Devices: which one, in which precision and memory layout, and how long a computation takes on it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn

from autofed.errors import raise_if_any
from autofed.plans import CHANNELS_LAST_BELOW, Device, Network, Precision

T = TypeVar("T", nn.Module, torch.Tensor)


def pick_device(device: str = "auto") -> Device:
    """cpu, cuda or mps; "auto" is the fastest there is. `ValidationErrors` if the device is not available."""
    available: list[Device] = ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    if device == "auto":
        return available[0]
    raise_if_any(
        "--device", [] if device in available else [f"{device} is not here; this machine has {', '.join(available)}"]
    )
    return cast("Device", device)


def prepare_device(device: str, precision: Precision) -> None:
    """Set torch up for training on a device; `ValidationErrors` if it cannot compute in the precision.

    On CUDA matrices multiply in TF32 (convolutions do by themselves), which is float32 with a mantissa of 10 bits, and
    cuDNN tries its algorithms on the first patches, since all further ones have their shape.
    """
    raise_if_any("local.training.precision", _precision_problems(device, precision))
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def _precision_problems(device: str, precision: Precision) -> list[str]:
    if device == "cpu" and precision == "float16":
        return ["float16 is for GPUs that lack bfloat16, and this is a CPU; write --set training.precision=bfloat16"]
    return []


def autocast(precision: Precision, device: str) -> AbstractContextManager[object]:
    """Within it, convolutions compute in the plan's precision; weights, gradients and losses stay float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=getattr(torch, precision))


def loss_scales(precision: Precision) -> tuple[float, ...]:
    """What to multiply the loss by before the backward pass: the next one if gradients overflow with the one before.

    Only float16 needs any. Nothing is carried from one pass to the next, unlike in torch's GradScaler: a resumed run
    equals an unbroken one, and how one patient's gradient is rounded does not depend on another patient's.
    """
    return (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0) if precision == "float16" else (1.0,)


def compiled(module: nn.Module, enabled: bool, device: str) -> Callable[..., Any]:
    """What to call in place of the module: compiled if `enabled` on CUDA, else itself; weights keep their names."""
    if enabled and device == "cuda" and sys.platform != "win32":
        return torch.compile(module)
    return module


def to_device(array: np.ndarray, device: str) -> torch.Tensor:
    """An array on the device. To CUDA it is copied from pinned memory, without waiting for the copy."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor.to(device)


def place(module_or_tensor: T, network: Network, device: str) -> T:
    """A network or its input on the device, in the memory layout that is faster there (the result is the same)."""
    if device != "cpu" or network.features[0] >= CHANNELS_LAST_BELOW:
        return module_or_tensor.to(device)
    layout = torch.channels_last if len(network.strides[0]) == 2 else torch.channels_last_3d
    placed: T = module_or_tensor.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    return placed


def shortest_seconds(work: Callable[[], object], device: str, repeats: int = 3) -> float:
    """The shortest of several runs after one to warm up: others may be using the machine just now."""
    work()
    return min(_run_seconds(work, device) for _ in range(repeats))


def _run_seconds(work: Callable[[], object], device: str) -> float:
    synchronise(device)
    begin = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begin


def synchronise(device: str) -> None:
    """Wait until an accelerator has finished its work, since calls to it return at once."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def machine_memory_bytes() -> int:
    """The memory of this machine; without limit where the system does not tell it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize
