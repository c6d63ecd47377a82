"""The eleven published configurations: layer maps by the paper's formulas, shapes, FLOPs to the first token."""

import pytest

from mlxeff.assembly.model import build_model
from mlxeff.errors import MlxeffError
from mlxeff.kvprediction import Predictor
from mlxeff.kvprediction.flops import parameters, ttft_flops
from mlxeff.kvprediction.layers import PUBLISHED, candidates, kept_layers, pruned_map, published_name, spread_map
from mlxeff.kvprediction.predictor import quantization, quantize
from mlxeff.models.openelm import published_config
from seedlm_models import with_seeds

ROWS = 32128  # of CoreNet's vocabulary
# name: (base layers, the layer map's formula, predictor parameters, first key map, last key map, FLOPs reduction), as
# printed in the paper and in the shapes of CoreNet's models.
TABLE = {
    "OE1.1B-KVP-C-450M": (28, lambda i: i // 2 if i < 16 else i - 8, 6_206_592, (256, 192), (512, 384), 2.36),
    "OE1.1B-KVP-C-270M": (28, lambda i: i // 2 if i < 24 else i - 12, 5_436_544, (256, 192), (512, 320), 3.98),
    "OE1.1B-KVP-LP-0.75": (28, lambda i: 3 * (i // 4) + min(i % 4, 2), 8_672_384, (256, 256), (512, 512), 1.34),
    "OE1.1B-KVP-LP-0.50": (28, lambda i: i // 2, 8_672_384, (256, 256), (512, 512), 1.93),
    "OE1.1B-KVP-LP-0.25": (28, lambda i: i // 4, 8_459_392, (256, 256), (512, 512), 3.60),
    "OE3B-KVP-C-1.1B": (36, lambda i: i // 2 if i < 16 else i - 8, 16_032_768, (384, 256), (768, 512), 2.81),
    "OE3B-KVP-C-450M": (36, lambda i: i // 2 if i < 32 else i - 16, 12_264_448, (384, 192), (768, 384), 6.64),
    "OE3B-KVP-C-270M": (36, lambda i: i // 3 if i < 12 else i // 2 - 2, 10_691_584, (384, 192), (768, 320), 11.18),
    "OE3B-KVP-LP-0.75": (36, lambda i: 3 * (i // 4) + min(i % 4, 2), 25_469_952, (384, 384), (768, 768), 1.34),
    "OE3B-KVP-LP-0.50": (36, lambda i: i // 2, 25_469_952, (384, 384), (768, 768), 1.97),
    "OE3B-KVP-LP-0.25": (36, lambda i: i // 4, 24_749_056, (384, 384), (768, 768), 3.84),
}  # fmt: skip
PRUNED = {  # parameters of the pruned models
    ("1_1B", "0.25"): 300_448_640,
    ("1_1B", "0.50"): 559_738_624,
    ("1_1B", "0.75"): 806_969_984,
    ("3B", "0.25"): 791_604_480,
    ("3B", "0.50"): 1_541_918_208,
    ("3B", "0.75"): 2_260_774_656,
}


def models(name):
    """(base, auxiliary), never evaluated: only their shapes matter."""
    configuration = PUBLISHED[name]
    base = build_model(published_config(configuration.base, ROWS))
    if configuration.keep:
        return base, base.pruned(kept_layers(configuration.keep, len(base.layers)))
    return base, build_model(published_config(configuration.auxiliary, ROWS))


def test_the_table_has_all_published_configurations():
    assert PUBLISHED.keys() == TABLE.keys()


@pytest.mark.parametrize("name", TABLE)
def test_published_configuration(name):
    layers, formula, count, first, last, reduction = TABLE[name]
    base, auxiliary = models(name)
    keep = PUBLISHED[name].keep
    layer_map = pruned_map(kept_layers(keep, layers), layers) if keep else spread_map(len(auxiliary.layers), layers)
    assert layer_map == [formula(i) for i in range(layers)]
    predictor = Predictor(auxiliary.kv_shapes, base.kv_shapes, layer_map)
    assert parameters(predictor) == count
    assert predictor.key_maps[0].weight.shape == predictor.value_maps[0].weight.shape == first
    assert predictor.key_maps[-1].weight.shape == last
    sizes = parameters(base), parameters(auxiliary)
    assert round(sizes[0] / sizes[1], 2) == reduction  # the paper's "FLOPs reduction"
    if keep:
        assert sizes[1] == PRUNED[PUBLISHED[name].base, keep]


def test_flops_to_the_first_token():
    assert ttft_flops(100, 40, 5, 1) == 2 * 100
    assert ttft_flops(100, 40, 5, 512) == 2 * (511 * 45 + 100)
    assert ttft_flops(100, 40, 5, 512, kept=12) == 2 * (500 * 45 + 12 * 100)
    assert ttft_flops(100, 40, 5, 512, kept=600) == 2 * 512 * 100


def test_packed_matrices_count_as_what_they_stand_for():
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 96,
        "num_attention_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": True,
    }  # fmt: skip
    dense, packed = build_model(config), build_model(config | {"quantization": {"group_size": 32, "bits": 4}})
    layer = 4 * (64 * 64 + 64) + 3 * 64 * 128 + 2 * 64
    assert parameters(dense) == parameters(packed) == 96 * 64 + 2 * layer + 64
    for bits in ("3", "4", "4.5"):
        assert parameters(build_model(with_seeds(config, bits))) == parameters(dense)
    predictor = Predictor([(2, 32)], [(3, 16)] * 2, [0, 0])
    for bits in (4, 8):
        quantize(rounded := Predictor([(2, 32)], [(3, 16)] * 2, [0, 0]), quantization(bits, [64]))
        assert parameters(rounded) == parameters(predictor) == 4 * (48 * 64 + 48)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("OpenELM1.1B-KVP-C-450M", "OE1.1B-KVP-C-450M"),
        ("openelm_1_1B_kvp_lp_0_50.yaml", "OE1.1B-KVP-LP-0.50"),
        ("openelm_base_3B_aux_0_25l", "OE3B-KVP-LP-0.25"),
        ("smollm2-135m", None),
    ],
)
def test_names(given, name):
    assert published_name(given) == name


@pytest.mark.parametrize("given", ["openelm_3B_kvp_lp_0_50.yaml", "openelm_1_1B_0_25"])
def test_files_of_baselines_are_not_configurations(given):
    with pytest.raises(MlxeffError, match="got a layer-pruned baseline without prediction"):
        published_name(given)


@pytest.mark.parametrize(
    ("fraction", "layers", "kept"),
    [
        ("0.5", 6, [0, 2, 4]),
        ("0.75", 8, [0, 1, 2, 4, 5, 6]),
        ("1/3", 9, [0, 3, 6]),
        ("1", 3, [0, 1, 2]),
        ("0.9", 30, [i for i in range(30) if i % 10 != 9]),
    ],
)
def test_kept_layers(fraction, layers, kept):
    assert kept_layers(fraction, layers) == kept


@pytest.mark.parametrize("fraction", ["0", "-0.5", "1.5", "half", "", "0.01", "1/0", "nan"])
def test_fractions_that_keep_nothing_sensible(fraction):
    with pytest.raises(MlxeffError, match="layers to keep: wanted a fraction of 30 layers"):
        kept_layers(fraction, 30)


def test_maps_of_other_sizes():
    assert pruned_map([2, 5], 7) == [0, 0, 0, 0, 0, 1, 1]
    assert spread_map(3, 3) == [0, 1, 2]
    with pytest.raises(MlxeffError, match="wanted an auxiliary of 1 to 3 layers, got 4"):
        spread_map(4, 3)


def test_candidates_go_from_spread_to_first():
    assert candidates("0.5", 8) == [[0, 2, 4, 6], [0, 1, 3, 5], [0, 1, 2, 5], [0, 1, 2, 3]]
    for layers in candidates("0.75", 30):
        assert sorted(set(layers)) == layers
        assert layers[-1] < 30
        assert len(layers) == len(kept_layers("0.75", 30))
