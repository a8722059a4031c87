"""All data in one place: the upper reference that federated learning is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from autofed.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class Pooled(FedAvg):
    """Plain training on the union of the sites' data, in the same rounds and with the same total number of steps.

    It exists for comparison: it runs only where one machine holds every site's data anyway.
    """

    centralised: ClassVar[bool] = True
