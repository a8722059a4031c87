"""What a mechanism states as the cost of a release: the terms that the ledger and the accountants share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from autofed.files import Record

Unit = Literal["patient", "site"]


class PrivacyEvent(Record):
    """So many uses, one after the other, of one mechanism on a site's data.

    Each adds Gaussian noise of `noise_multiplier` times what one `unit` can change in what is released, counted as one
    vector: a patient's records are replaced by nothing (zero-out), or all that a site holds by anything else. With a
    `sampling_rate` below 1 every patient takes part with that probability, by a coin of their own (Poisson sampling).
    Without a noise multiplier nothing is protected: after that no finite epsilon is true for the site.
    """

    mechanism: str
    steps: int = Field(ge=0)
    noise_multiplier: float | None = Field(None, gt=0)
    sampling_rate: float = Field(1.0, gt=0, le=1)
    unit: Unit = "patient"
