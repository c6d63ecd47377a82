"""What mlx-lm's users pass to `load`, `generate`, `stream_generate` and the functions for prompt caches: it works, or
is refused in one line. On tiny models: some 4 s.
"""

import importlib
import inspect

import mlx.core as mx
import pytest

from mlxeff import MlxeffError, generate, load, make_prompt_cache, stream_generate
from tiny_model import GEMMA, MAMBA, write_foreign, write_tiny_model


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load(str(tiny_folder))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    return load(str(write_foreign(tmp_path_factory.mktemp("models") / "gemma", GEMMA)))


def tokens(*arguments, **more):
    return [response.token for response in stream_generate(*arguments, **more)]


def test_every_argument_of_mlx_lm_is_known():
    """But for what Python itself refuses in mlx-lm too."""
    mlx_lm_generate = importlib.import_module("mlx_lm.generate")  # mlx_lm.generate itself is its function
    mlx_lm_utils = importlib.import_module("mlx_lm.utils")
    ours = inspect.signature(stream_generate).parameters
    theirs = dict(inspect.signature(mlx_lm_generate.stream_generate).parameters)
    assert list(ours)[:6] == list(theirs)[:6], "these may be given by position"
    for function in (mlx_lm_generate.generate_step, mlx_lm_generate.speculative_generate_step):
        theirs |= inspect.signature(function).parameters
    assert set(theirs) - {"kwargs"} - set(ours) == set()
    assert set(inspect.signature(mlx_lm_utils.load).parameters) <= set(inspect.signature(load).parameters)


@pytest.mark.parametrize("which", ["tiny", "gemma"])
def test_a_cache_made_by_mlx_lm(which, request):
    from mlx_lm.models import cache as theirs

    model, tokenizer = request.getfixturevalue(which)
    whole = tokens(model, tokenizer, [256, 72, 101, 108, 108], max_tokens=6)
    for make in (theirs.make_prompt_cache, make_prompt_cache):
        cache = make(model)
        assert isinstance(cache, list)
        tokens(model, tokenizer, [256, 72, 101, 33], max_tokens=1, prompt_cache=cache)
        assert theirs.can_trim_prompt_cache(cache)
        assert theirs.trim_prompt_cache(cache, 1) == 1
        assert tokens(model, tokenizer, [108, 108], max_tokens=6, prompt_cache=cache) == whole
        assert cache[0].length == 5 + 5
        with pytest.raises(MlxeffError):
            theirs.save_prompt_cache("never.safetensors", cache)
    text = generate(model, tokenizer, [256, 72], max_tokens=4, prompt_cache=make_prompt_cache(model))
    assert text == generate(model, tokenizer, [256, 72], max_tokens=4)


def test_a_list_of_mlx_lms_own_caches(tiny, gemma):
    from mlx_lm.models.cache import KVCache
    from mlx_lm.models.cache import make_prompt_cache as theirs

    model, tokenizer = gemma
    whole = tokens(model, tokenizer, [256, 72, 101, 108], max_tokens=6)
    layers = theirs(model.model)
    tokens(model, tokenizer, [256, 72], max_tokens=1, prompt_cache=layers)
    assert tokens(model, tokenizer, [101, 108], max_tokens=6, prompt_cache=layers) == whole
    with pytest.raises(MlxeffError, match=r"prompt_cache: wanted one of mlxeff.make_prompt_cache\(model\)"):
        tokens(*gemma, [256], prompt_cache=layers[:1])
    for wrong in ([KVCache(), KVCache()], [], KVCache(), "cache"):
        with pytest.raises(MlxeffError, match=r"prompt_cache: wanted one of mlxeff.make_prompt_cache\(model\)"):
            tokens(*tiny, [256], prompt_cache=wrong)


def test_a_recurrent_model_does_not_tell_its_length(tmp_path):
    from mlx_lm.models.cache import make_prompt_cache as theirs

    model, tokenizer = load(str(write_foreign(tmp_path / "mamba", MAMBA)))
    with pytest.raises(MlxeffError, match="got a list of other caches"):
        tokens(model, tokenizer, [256, 72], prompt_cache=theirs(model.model))
    assert tokens(model, tokenizer, [256, 72], max_tokens=3, prompt_cache=theirs(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft_model": "x"}, "draft_model: wanted one of mlxeff.load, got builtins.str"),
        ({"max_kv_size": 512}, "max_kv_size is not supported"),
        ({"kv_bits": 3, "kv_group_size": 64}, "kv_bits: wanted 4 or 8, and no other kind of KV cache, got 3"),
        ({"input_embeddings": mx.zeros((1, 4))}, "input_embeddings is not supported"),
        ({"prefill_step_size": 0}, "prefill_step_size: wanted 1 or more, got 0"),
        ({"max_tokens": 0}, "max_tokens: wanted 1 or more"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_one_line(tiny, arguments, message):
    with pytest.raises(MlxeffError, match=message):
        tokens(*tiny, [256, 72], **arguments)


def test_what_changes_nothing_is_accepted(tiny):
    want = tokens(*tiny, [256, 72], max_tokens=5)
    more = {
        "kv_bits": None,
        "kv_group_size": 32,
        "quantized_kv_start": 5000,
        "num_draft_tokens": 3,
        "max_kv_size": None,
    }
    assert tokens(*tiny, [256, 72], 5, None, mx.default_stream(mx.default_device()), **more) == want
    assert tokens(*tiny, mx.array([256, 72]), max_tokens=5) == want


def test_kv_bits_with_a_cache(tiny_folder_64):
    """An empty cache in a list becomes one of that kind; others are refused with what to do."""
    model, tokenizer = load(str(tiny_folder_64))
    want = tokens(model, tokenizer, [256, 72], max_tokens=5, kv_bits=8)
    caches = make_prompt_cache(model)
    assert tokens(model, tokenizer, [256, 72], max_tokens=5, kv_bits=8, prompt_cache=caches) == want
    assert (caches[0].kind, caches[0].length) == ("int8", 6)
    assert tokens(model, tokenizer, [72], max_tokens=5, kv_bits=8, prompt_cache=caches)
    for given in (model.new_cache(), model.make_cache()):
        if isinstance(given, list):
            tokens(model, tokenizer, [256, 72], max_tokens=1, prompt_cache=given)
        message = r"wanted a KV cache of the kind int8, got one of .*: an empty list .*\(\"int8\"\) makes"
        with pytest.raises(MlxeffError, match=message):
            tokens(model, tokenizer, [72], kv_bits=8, prompt_cache=given)


@pytest.fixture
def tiny_folder_64(tmp_path):
    """A tiny model whose heads have a size that the small caches take."""
    return write_tiny_model(tmp_path / "tiny", {"head_dim": 64})


def test_models_and_tokenizers_of_others_are_one_line(tiny, tiny_folder):
    import mlx_lm
    from transformers import AutoTokenizer

    theirs, wrapper = mlx_lm.load(str(tiny_folder))
    with pytest.raises(MlxeffError, match=r"model: wanted one of mlxeff.load, got mlx_lm.models.llama.Model"):
        tokens(theirs, tiny[1], [256])
    assert tokens(tiny[0], wrapper, [256, 72], max_tokens=5) == tokens(*tiny, [256, 72], max_tokens=5)
    with pytest.raises(MlxeffError, match=r"tokenizer: wanted one of mlxeff.load or mlx-lm's wrapper"):
        tokens(tiny[0], AutoTokenizer.from_pretrained(str(tiny_folder)), [256])


def test_make_prompt_cache_keeps_every_token(tiny):
    with pytest.raises(MlxeffError, match="make_prompt_cache: max_kv_size is not supported"):
        make_prompt_cache(tiny[0], max_kv_size=512)


def test_load(tiny_folder):
    config = {"eos_token": "<|user|>", "chat_template": "{{ messages[0].content }}", "trust_remote_code": True}
    _, tokenizer = load(str(tiny_folder), tokenizer_config=config)
    assert tokenizer.eos_token_ids == {257, 258}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
