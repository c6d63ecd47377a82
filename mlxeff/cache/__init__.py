"""The KV cache: the keys and values of the tokens that a model has processed.

`protocols` what a cache has to offer, `layer` the plain cache of one layer and the table of kinds, `model` the cache of
a whole model, `file` the cache on disk. Attention is computed here: a model passes rotated queries, keys and values and
gets the attention output, so the causal mask and the storage format are private to the cache. Knows nothing about
models or text.
"""

from .file import GIVEN, OtherPrecisionError
from .layer import FLOAT_KINDS, KINDS, LayerCache, LayerShape
from .model import KVCache, common_prefix
from .protocols import Cache, Layer, NativeLayer

__all__ = [
    "FLOAT_KINDS",
    "GIVEN",
    "KINDS",
    "Cache",
    "KVCache",
    "Layer",
    "LayerCache",
    "LayerShape",
    "NativeLayer",
    "OtherPrecisionError",
    "common_prefix",
]
