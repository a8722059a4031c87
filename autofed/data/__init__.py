"""A site's dataset: what it declares, its cases, and whether several sites agree."""

from autofed.data.case_files import CaseFiles, find_images
from autofed.data.dataset import Case, Dataset, open_dataset, open_datasets, site_folders
from autofed.data.declaration import (
    DECLARED,
    RESERVED_SITES,
    Declaration,
    HasDeclaration,
    describe_regions,
    disagreements,
    site_name_problem,
)
from autofed.data.reading import read_channels

__all__ = [
    "DECLARED",
    "RESERVED_SITES",
    "Case",
    "CaseFiles",
    "Dataset",
    "Declaration",
    "HasDeclaration",
    "describe_regions",
    "disagreements",
    "find_images",
    "open_dataset",
    "open_datasets",
    "read_channels",
    "site_folders",
    "site_name_problem",
]  # fmt: skip
