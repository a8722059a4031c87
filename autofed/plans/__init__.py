"""The plan: what every site vets and follows. Records, their checks, and what a network costs, without torch."""

from autofed.plans.agreement import (
    Agreement,
    AlgorithmSettings,
    AverageSettings,
    FaultSettings,
    RoundSchedule,
    ServerSettings,
    spaced_snapshots,
)
from autofed.plans.budget import Budget, Speed
from autofed.plans.kinds import (
    ANISOTROPY,
    Configuration,
    Device,
    Millimetres,
    Positive,
    Precision,
    PresetName,
    Shape,
    WirePrecision,
)
from autofed.plans.local import Channel, Inference, Intensity, LocalPlan, PreprocessingPlan, TargetGrid, Training
from autofed.plans.memory import CHANNELS_LAST_BELOW, training_bytes
from autofed.plans.network import SPATIAL_KERNEL, Convolution, Network, Trained, squeezed
from autofed.plans.plan import VERSION, Plan, is_plan, load, unknown_fields
from autofed.plans.privacy import Privacy, mechanisms
from autofed.plans.reasons import Code, Reason

__all__ = [
    "ANISOTROPY",
    "CHANNELS_LAST_BELOW",
    "SPATIAL_KERNEL",
    "VERSION",
    "Agreement",
    "AlgorithmSettings",
    "AverageSettings",
    "Budget",
    "Channel",
    "Code",
    "Configuration",
    "Convolution",
    "Device",
    "FaultSettings",
    "Inference",
    "Intensity",
    "LocalPlan",
    "Millimetres",
    "Network",
    "Plan",
    "Positive",
    "Precision",
    "PreprocessingPlan",
    "PresetName",
    "Privacy",
    "Reason",
    "RoundSchedule",
    "ServerSettings",
    "Shape",
    "Speed",
    "TargetGrid",
    "Trained",
    "Training",
    "WirePrecision",
    "is_plan",
    "load",
    "mechanisms",
    "spaced_snapshots",
    "squeezed",
    "training_bytes",
    "unknown_fields",
]
