"""`dense`: the matrix of a layer in float32, whatever form it is stored in."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import seedlm_models
from helpers import assert_close, to_numpy
from mlxeff.modules import Embedding, Linear, dense, is_matrix
from mlxeff.ops import BITS, GROUPS
from mlxeff.seedlm.format import block_format
from mlxeff.seedlm.linear import SeedLinear


@pytest.mark.parametrize("layer", [Linear(256, 24), Embedding(24, 256), nn.Linear(256, 24)])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_affine_codes_times_scales_plus_biases_in_float32(layer, bits, dtype):
    """The codes are unpacked with scales of 1. Scales and biases of half precision do not round the product."""
    for group in GROUPS:
        module = layer.to_quantized(group, bits)
        module.scales, module.biases = module.scales.astype(dtype), module.biases.astype(dtype)
        ones = mx.ones(module.scales.shape)
        codes = np.array(mx.dequantize(module.weight, ones, mx.zeros_like(ones), group, bits), np.float64)
        scales, biases = (to_numpy(part).repeat(group, axis=1) for part in (module.scales, module.biases))
        got = dense(module)
        assert got.dtype == mx.float32
        assert_close(got, codes * scales + biases, f"{bits} bits, groups of {group}", rtol=2.0**-22)  # two roundings


def test_other_forms():
    rng = np.random.default_rng(0)
    layer = Linear(64, 8)
    layer.weight = layer.weight.astype(mx.float16)
    assert_close(dense(layer), layer.weight.astype(mx.float32), "dense", rtol=0, atol=0)
    embedding = nn.Embedding(8, 64)
    assert_close(dense(embedding), embedding.weight, "embedding", rtol=0, atol=0)
    small = nn.QuantizedLinear(64, 8, bias=False, group_size=32, bits=4, mode="mxfp4")
    want = mx.dequantize(small.weight, small.scales, None, 32, 4, "mxfp4")
    assert_close(dense(small), want.astype(mx.float32), "mxfp4", rtol=0, atol=0)
    seeded = SeedLinear(block_format("4"), 8, 64)
    seedlm_models.randomise(seeded, rng)
    assert_close(dense(seeded), seeded.dense(mx.float32), "seeds", rtol=0, atol=0)
    assert dense(seeded).dtype == mx.float32
    assert [is_matrix(each) for each in (layer, small, seeded, embedding, nn.RMSNorm(8))] == [True] * 3 + [False] * 2
