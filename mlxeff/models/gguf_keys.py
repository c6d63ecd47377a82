"""Typed access to the metadata of a GGUF file: the keys that begin with the name of the architecture, as in
"llama.block_count"."""

import numpy as np

from ..checkpoint import Source
from ..errors import MlxeffError, notices, some
from .config import LARGEST, fits

# Beginnings of keys that concern the file, the tokenizer or how the file was made.
NOT_THE_MODEL = ("general.", "tokenizer.", "split.", "quantize.", "imatrix.", "GGUF.")
# Keys of the model that change nothing: what is known from the tensors, or a remark.
NEUTRAL_KEYS = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "expert_used_count"}
NEUTRAL_KEYS |= {"rope.scaling.original_context_length"}  # without YaRN


class Keys:
    """The metadata of `source`, and which of its keys were asked for."""

    def __init__(self, source: Source):
        self.origin, self.metadata, self.tensors = source.path.name, source.metadata, source.tensors
        self.used: set[str] = set()  # keys that were asked for
        self.architecture = self.metadata.get("general.architecture")

    def get(self, key: str, default: object = None) -> object:
        """The value of "ARCHITECTURE.key"."""
        self.used.add(f"{self.architecture}.{key}")
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer, also from a list with one number for each layer, if all are equal. Raises MlxeffError."""
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = int(value[0])
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise self.wrong(key, "one positive number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive float, as the shortest decimal of its float32: 1e-05 rather than 9.9999997e-06. Raises
        MlxeffError."""
        value = self.get(key, default)
        if not fits(value, float) or value <= 0:
            raise self.wrong(key, "a positive number", value)
        return float(str(np.float32(value)))

    def flag(self, key: str, default: bool) -> bool:
        """A truth value. Raises MlxeffError."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.wrong(key, "true or false", value)
        return value

    def layers(self) -> int:
        """The number of layers. Raises MlxeffError unless there are tensors of as many."""
        found = {name.split(".")[1] for name in self.tensors if name.startswith("blk.")}
        if len(found) != self.integer("block_count"):
            raise MlxeffError(
                f"{self.origin}: block_count: wanted {self.get('block_count')} layers, got tensors of {len(found)}"
            )
        return len(found)

    def token_ids(self) -> dict[str, int]:
        """The entries `bos_token_id` and `eos_token_id` of a config.json, where the file has them."""
        found = {name: self.metadata.get(f"tokenizer.ggml.{name}") for name in ("bos_token_id", "eos_token_id")}
        return {name: token for name, token in found.items() if type(token) is int}

    def say_window(self) -> None:
        """A notice where the file has a sliding window, which is not used."""
        if type(window := self.get("attention.sliding_window")) is int and window:
            text = "%s: sliding window of %d tokens is not used: attention is full"
            notices.warning(text, self.origin, window)

    def wrong(self, key: str, wanted: str, got: object) -> MlxeffError:
        """The error to raise for the value of a key."""
        return MlxeffError(f"{self.origin}: {self.architecture}.{key}: wanted {wanted}, got {got!r:.60}")

    def say_unused(self) -> None:
        """A notice that names the keys of the model that nothing asked for, and those of no known kind."""
        own = f"{self.architecture}."
        unknown = [
            key
            for key in self.metadata
            if key not in self.used and not key.startswith(NOT_THE_MODEL) and key.removeprefix(own) not in NEUTRAL_KEYS
        ]
        if unknown:
            notices.warning("%s: metadata that is not used: %s", self.origin, some(unknown))
