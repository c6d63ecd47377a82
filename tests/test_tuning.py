"""Low-rank terms and trained copies in the layers of a model: what is trained, what is not, and what folding leaves."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import seedlm_models
from helpers import assert_close
from mlxeff.assembly.model import build_model
from mlxeff.errors import MlxeffError
from mlxeff.modules import Linear, QuantizedLinear
from mlxeff.seedlm.linear import SeedModule
from mlxeff.tuning import FOLDED_BITS, METHODS, LoraLinear, Tuned, stored_like
from seedlm_models import with_seeds
from test_kvprediction import FAMILIES, PROMPT, random_model, randomise

TOKENS = mx.array([PROMPT[:13]])


def model_of(family, form):
    """A random model with dense, 4-bit or seed-encoded linear layers."""
    if form == "seeds":
        base = randomise(build_model(with_seeds(FAMILIES[family], "4")), 0)
        for _, module in base.named_modules():
            if isinstance(module, SeedModule):
                seedlm_models.randomise(module, np.random.default_rng(1))
        return base
    base = random_model(FAMILIES[family])
    if form == "4 bit":
        nn.quantize(
            base, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[1] % 32 == 0
        )
    return base


def logits(model):
    return model(TOKENS, model.new_cache())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["dense", "4 bit", "seeds"])
def test_folding_changes_nothing_but_the_form(method, form):
    base = model_of("llama", form)
    auxiliary = base.pruned([0, 2])
    tuned = Tuned(auxiliary, method, rank=3)
    randomise(tuned.modules, 4)
    before = logits(auxiliary)
    assert mx.abs(before - logits(base.pruned([0, 2]))).max() > 0.1
    tuned.fold()
    got = logits(auxiliary)
    # Dense: one product for two. Else 8 bits of a range of six sigma: 1/40 sigma a weight, over two layers.
    assert_close(got, before, "folded", rtol=2.0**-15 if form == "dense" else 0.1)
    assert not any(isinstance(module, LoraLinear) for _, module in auxiliary.named_modules())
    wanted = Linear if form == "dense" else QuantizedLinear
    assert [type(layer.mlp.up_proj) for layer in auxiliary.layers] == [wanted] * 2
    assert auxiliary.model.embed_tokens is base.model.embed_tokens


@pytest.mark.parametrize(("method", "rank"), [("all", 4), ("lora", 0), ("lora", "4")])
def test_tuning_that_is_not(method, rank):
    with pytest.raises(MlxeffError, match="tuning: wanted one of lora, full and a rank ≥ 1, got "):
        Tuned(random_model(FAMILIES["llama"]), method, rank)


@pytest.mark.parametrize("form", ["dense", "4 bit", "seeds"])
def test_low_rank_terms_change_nothing_at_first_and_never_another_model_of_the_same_layers(form):
    base = model_of("llama", form)
    model = base.pruned([0, 1, 2])
    want = logits(base)
    tuned = Tuned(model, "lora", 2, seed=1)
    assert_close(logits(model), want, "at first", rtol=0, atol=0)
    randomise(tuned.modules, 4)
    assert mx.abs(logits(model) - want).max() > 0.1
    assert_close(logits(base), want, "the other model", rtol=0, atol=0)
    tuned.fold()
    assert_close(logits(base), want, "the other model, after folding", rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_only_what_is_chosen_is_trained(method):
    """Of layers 0 and 2 the feed-forward and the norm before it: all else stays the very arrays of the other model."""
    base = random_model(FAMILIES["llama"])
    model = base.pruned([0, 1, 2])
    tuned = Tuned(model, method, 2, chosen=lambda path: path[0] != "1" and ("mlp" in path or "post" in path))
    matrices = [f"{i}.mlp.{name}_proj" for i in (0, 2) for name in ("gate", "up", "down")]
    norms = [f"{i}.post_attention_layernorm" for i in (0, 2)] if method == "full" else []
    assert {place.path for place in tuned.places} == {*matrices, *norms}
    parts = ("a", "b") if method == "lora" else ("weight",)
    names = {f"layers.{path}.{part}" for path in (*matrices, *norms) for part in parts}
    assert {name for name, _ in tree_flatten(tuned.modules.trainable_parameters())} == names
    untouched = dict(tree_flatten(base.parameters()))
    same = {name for name, value in tree_flatten(model.parameters()) if untouched.get(name) is value}
    assert set(untouched) - same == {f"model.layers.{path}.weight" for path in (*matrices, *norms)}
    tuned.fold()
    assert dict(tree_flatten(model.parameters())).keys() == untouched.keys()


@pytest.mark.parametrize(
    ("columns", "own", "want"), [(128, 128, 128), (96, 128, 32), (128, None, 32), (40, None, None)]
)
def test_a_folded_matrix_has_the_groups_of_the_one_before_where_they_fit(columns, own, want):
    """`own`: the group size of the module before; None for one that has none, as a seed-encoded one."""
    whole = nn.Module()
    if own:
        whole = QuantizedLinear(own, 8, bias=False, group_size=own, bits=4)
    merged = Linear(columns, 8)
    got = stored_like(whole, merged)
    if want is None:
        assert got is merged
        return
    assert (type(got), got.group_size, got.bits) == (QuantizedLinear, want, FOLDED_BITS)
    assert_close(got.bias, merged.bias, "bias", rtol=0, atol=0)
    packed = mx.quantize(merged.weight, want, FOLDED_BITS)
    assert all(mx.array_equal(mine, theirs) for mine, theirs in zip((got.weight, got.scales, got.biases), packed))
