"""Charges of ledgers, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autofed.privacy.events import PrivacyEvent
from autofed.privacy.ledger import LedgerEntry

STEP = PrivacyEvent(mechanism="dp-sgd", steps=20, noise_multiplier=1.9, sampling_rate=0.2)


def charge(round: int = 1, run: str = "r", events: Sequence[PrivacyEvent] = (STEP,), **more: Any) -> LedgerEntry:
    """What the training of a round costs, by default twenty private steps."""
    return LedgerEntry(run=run, round=round, question="train", agreement="a", events=tuple(events), **more)
