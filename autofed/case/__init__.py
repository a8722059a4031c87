"""A hospital's dataset: what it declares, its cases, and whether several hospitals agree."""

from autofed.case.datasets import Case, Dataset, open_dataset, open_datasets, site_folders
from autofed.case.declarations import (
    DECLARED,
    RESERVED_SITES,
    Declaration,
    Declares,
    disagreements,
    in_words,
    site_name_problem,
)
from autofed.case.files import Files, find_images
from autofed.case.reading import read_channels

__all__ = [
    "DECLARED", "RESERVED_SITES", "Case", "Dataset", "Declaration", "Declares", "Files", "disagreements", "find_images",
    "in_words", "open_dataset", "open_datasets", "read_channels", "site_folders",
    "site_name_problem",
]  # fmt: skip
