"""Checkpoint files on disk ↔ named tensors, which are read and written one at a time.

Reads safetensors (one file, or shards with an index), GGUF versions 2 and 3, and PyTorch zip archives (without torch).
Writes folders of safetensors. Every header is checked against the size of its file before memory is allocated, and all
errors are `MlxeffError`s. This package knows nothing about models.
"""

from .files import choose_files, parts_of, read_json
from .source import Source, open_source
from .tensor import Tensor
from .work import WorkFolder
from .writer import FLOATS, Piece, cast, check_new, claim, plan_shards, save_arrays, temporary_beside, write_folder

__all__ = [
    "FLOATS",
    "Piece",
    "Source",
    "Tensor",
    "WorkFolder",
    "cast",
    "check_new",
    "choose_files",
    "claim",
    "open_source",
    "parts_of",
    "plan_shards",
    "read_json",
    "save_arrays",
    "temporary_beside",
    "write_folder",
]
