"""The text that an activation-aware conversion runs the model on, and its windows of tokens."""

import hashlib
import importlib.resources
from pathlib import Path

import numpy as np

from ..checkpoint import Source
from ..errors import MlxeffError, notices
from ..tokenizer import Tokenizer, from_folder, from_gguf
from .folder import TokenizerFiles

TOKENS = 32768  # by default
WINDOW = 256  # tokens that attend to each other
DEFAULT = "calibration.txt"


def read_text(path: Path | None) -> tuple[str, str]:
    """(text, name and hash) of a UTF-8 file, or of the text that comes with the package."""
    place = importlib.resources.files(__package__).joinpath(DEFAULT) if path is None else Path(path)
    try:
        raw = place.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise MlxeffError(f"{place}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MlxeffError(f"{place}: wanted UTF-8 text, got {error.reason} at byte {error.start}") from error
    name = "the package's text" if path is None else place.name
    return text, f"{name} (sha256 {hashlib.sha256(raw).hexdigest()[:12]})"


def windows(text: str, tokenizer: Tokenizer, tokens: int, origin: str) -> np.ndarray:
    """Token ids (W, T): W · T ≤ `tokens`, in windows spread evenly over the text."""
    ids = np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)
    length = min(WINDOW, tokens)
    count, most = max(1, tokens // length), len(ids) // length
    if most == 0:
        raise MlxeffError(f"{origin}: calibration text: wanted at least {length} tokens, got {len(ids)}")
    if count > most:
        notices.warning(f"{origin}: calibration on {most * length} tokens and not {tokens}: the text has no more")
    starts = np.linspace(0, len(ids) - length, min(count, most)).astype(int)
    return np.stack([ids[start : start + length] for start in starts])


def tokenizer_of(source: Source, files: TokenizerFiles, config: dict) -> Tokenizer:
    """The tokenizer that the converted folder will have."""
    if files.metadata:
        return from_gguf(source.metadata, str(source.path))
    if not files.files:
        raise MlxeffError(f"{source.path}: calibration needs a tokenizer: name it with --tokenizer, or --data-free")
    return from_folder(files.files[0].parent, config.get("model_type"), config.get("eos_token_id"))
