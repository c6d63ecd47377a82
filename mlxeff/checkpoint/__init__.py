"""Checkpoint files on disk <-> named tensors that are read one at a time; knows no model.

Read: safetensors (one file or shards with an index), GGUF v2/v3, PyTorch zip archives (without torch). Write:
safetensors folders. Every header is checked against the file's size before anything is allocated, and every complaint
is an `MlxeffError`.
"""

from .source import Source, open_source, read_json
from .tensor import Tensor
from .writer import FLOATS, Piece, cast, check_new, plan_shards, save_arrays, write_folder

__all__ = [
    "FLOATS",
    "Piece",
    "Source",
    "Tensor",
    "cast",
    "check_new",
    "open_source",
    "plan_shards",
    "read_json",
    "save_arrays",
    "write_folder",
]
