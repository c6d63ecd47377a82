"""The compatibility test bed: tiny folders and GGUF files of every kind, whose right answer is known (tests/compat).

Every pair of values of two dimensions occurs in a case. Each case is loaded, generates and chats here and in stock
mlx-lm, and is converted. Some 45 s for about 180 cases; with MLXEFF_EXHAUSTIVE=1 those of five other seeds too, which
takes 5 minutes.
"""

import dataclasses
import json
import os
import shutil
from importlib.metadata import version

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from mlxeff.convert import convert

from compat import bed, cases
from compat.families import FAMILIES
from compat.folders import transformers_reads
from helpers import assert_close
from mlxeff import MlxeffError, kernels, load, stream_generate
from mlxeff.generation import Session

SEEDS = range(6 if os.environ.get("MLXEFF_EXHAUSTIVE") else 1)
CASES = list(dict.fromkeys(case for seed in SEEDS for case in cases.covering(seed)))
STEPS = 40  # tokens at most: more than an answer has
FORGETFUL = ("mamba", "gemma3_text")  # a recurrent model, and sliding windows: they cannot go back in the first prompt
HALF = 0.2  # what logits computed in 16 bits, as on GPUs, may differ by
FLOATS = (mx.float32, mx.float16, mx.bfloat16)
CONVERSIONS = {
    "as stored": {},
    "8 bits": {"quantize": (8, 32)},
    "float16": {"dtype": "float16"},
    "dequantised": {"dequantize": True},
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("case") / "files"
    yield bed.prepare(folder, request.param)
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def loaded(prepared):
    return load(str(prepared.path))


def answer_of(responses) -> tuple[list[int], str, str]:
    """(ids, text, why it ended)"""
    found = list(responses)
    return [each.token for each in found], "".join(each.text for each in found), found[-1].finish_reason


def check_stock(folder, prepared, chats: list[list[int]]) -> None:
    """Stock mlx-lm gives the same answer and end, the same ids of the prompt, and `chats` for the conversations.

    Its text is compared by its tokenizer's `decode`: where there is no tokenizer.json, it streams some characters of
    several tokens twice.
    """
    import mlx_lm

    case = prepared.case
    if case.tokenizer == "spm unigram" and case.end in ("tokenizer config", "special tokens map"):
        return  # transformers takes it for a BPE model, with other ids
    model, tokenizer = mlx_lm.load(str(folder))
    found = answer_of(mlx_lm.stream_generate(model, tokenizer, prepared.prompt_ids, max_tokens=STEPS))
    assert (found[0], found[2]) == (prepared.answer, "stop")
    if not transformers_reads(case):
        return
    assert tokenizer.decode(prepared.answer[:-1]) == prepared.text
    assert (folder / "tokenizer.model").exists() or found[1] == prepared.text
    assert tokenizer.encode(bed.PROMPT) == prepared.prompt_ids
    for (messages, _, _), ids in zip(prepared.chats, chats) if tokenizer.chat_template else ():
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


def right(prepared) -> tuple[list[int], str, str]:
    return prepared.answer, prepared.text, "stop"


def test_pytorch_files_of_a_foreign_family(tmp_path):
    """mlx-lm reads safetensors only."""
    case = next(case for case in CASES if case.container == "folder" and case.family == "phi3")
    case = dataclasses.replace(case, container="torch", sharding="one file")
    prepared = bed.prepare(tmp_path / "files", case)
    with pytest.raises(MlxeffError, match=r"model: wanted safetensors for 'phi3', .* got PyTorch's files"):
        load(str(prepared.path))


def test_experts_in_16_bits_are_said_to_be_widened(tmp_path, caplog):
    case = next(case for case in CASES if case.family == "qwen2_moe" and case.weights in ("float16", "bfloat16"))
    with caplog.at_level("INFO", logger="mlxeff"):
        load(str(bed.prepare(tmp_path / "files", case).path))
    said = [line for line in caplog.messages if "the experts' weights become float32" in line]
    assert len(said) == (1 if kernels.device() == "cpu" else 0)


def test_every_value_of_every_dimension_occurs():
    for name, values in cases.DIMENSIONS.items():
        assert {getattr(case, name) for case in CASES} == set(values), name
    assert set().union(*(case.pairs for case in CASES)) >= cases.all_pairs()


def test_ids_of_prompts(prepared, loaded):
    """Those of the libraries, with one BOS; of both turns of a chat."""
    _, tokenizer = loaded
    assert tokenizer.encode(bed.PROMPT) == prepared.prompt_ids
    if prepared.case.template == "none":
        with pytest.raises(MlxeffError, match="has no chat template"):
            tokenizer.apply_chat_template(bed.MESSAGES)
        return
    for messages, text, ids in prepared.chats:
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text
        assert tokenizer.apply_chat_template(messages) == ids


def test_answer(prepared, loaded):
    """Ids, text and end: after the prompt as text, and after both turns of a chat, of which the second goes on in the
    first one's cache."""
    model, tokenizer = loaded
    assert answer_of(stream_generate(model, tokenizer, bed.PROMPT, max_tokens=STEPS)) == right(prepared)
    session = Session(model, tokenizer)
    for _, _, ids in prepared.chats:
        assert answer_of(session.stream(ids, max_tokens=STEPS)) == right(prepared)
    if prepared.case.family not in FORGETFUL:
        assert session.reused >= len(prepared.chats[0][2]) - 2


def test_logits(prepared, loaded):
    """Those of stock mlx-lm on the same weights, at every token of a prompt and its answer: the answer alone does not
    show a wrong rotary embedding."""
    model, _ = loaded
    case, own = prepared.case, FAMILIES[prepared.case.family].own
    ids = mx.array([prepared.prompt_ids + prepared.answer])
    theirs, _ = load_model(prepared.twin)
    got = model(ids, model.new_cache())
    if own:
        theirs.set_dtype(got.dtype)
    else:
        types = {name: value.dtype for name, value in tree_flatten(model.parameters())}
        cast = {
            name: value.astype(types[name]) if types[name] in FLOATS else value
            for name, value in tree_flatten(theirs.parameters())
        }
        theirs.load_weights(list(cast.items()))
    tolerance = 1e-3 if own or case.container == "gguf" else 0
    if case.weights == "Q5_0":  # dequantised to float16
        tolerance = 0.05
    if own and got.dtype != mx.float32:
        tolerance = HALF
    assert_close(got, theirs(ids).astype(mx.float32), str(case), rtol=0, atol=tolerance)
    first, second = mx.topk(got[0, len(prepared.prompt_ids) - 1 : -1].astype(mx.float32), 2).T.tolist()
    assert min(abs(a - b) for a, b in zip(first, second)) > 1, "the right tokens lead by little: the bed's own fault"


def test_stock_mlx_lm(prepared):
    """It gives the same ids of prompts, the same answer and the same end."""
    if prepared.case.container in ("gguf", "torch"):
        return  # it reads no such files
    if prepared.case.family == "qwen2_moe" and prepared.case.weights in ("float16", "bfloat16"):
        return  # on a CPU, MLX has no such product of experts
    check_stock(prepared.path, prepared, [ids for _, _, ids in prepared.chats])


def test_conversion(prepared, tmp_path, caplog):
    """The converted folder gives the same answer and the same end here and in stock mlx-lm."""
    case, target = prepared.case, tmp_path / "converted"
    if case.conversion == "refused":
        with pytest.raises(MlxeffError, match="wanted one of"):
            convert(prepared.path, target)
        return
    convert(prepared.path, target, **CONVERSIONS[case.conversion])
    ordinary = case.container == "gguf" and case.control == "normal" and case.end == "eos key"
    assert any("ordinary tokens become control tokens" in line for line in caplog.messages) == ordinary
    model, tokenizer = load(str(target))
    ids = mx.array([prepared.prompt_ids + prepared.answer])
    theirs, _ = load_model(target)
    got = model(ids, model.new_cache())
    theirs.set_dtype(got.dtype)
    want = theirs(ids).astype(mx.float32)
    assert_close(got, want, f"converted: {case}", rtol=0, atol=2e-3 if got.dtype == mx.float32 else HALF)
    assert answer_of(stream_generate(model, tokenizer, prepared.prompt_ids, max_tokens=STEPS)) == right(prepared)
    assert tokenizer.encode(bed.PROMPT) == prepared.prompt_ids
    if case.template != "none":
        assert tokenizer.apply_chat_template(bed.MESSAGES) == prepared.converted[0]
    check_stock(target, prepared, prepared.converted)


# llama.cpp rounds activations too, to the type of the weights or to 8 bits, and has GELU in a table of half precision.
LOGIT_ERRORS = {"F32": 0.01, "F16": 0.01, "BF16": 0.1}
RECORDS = json.loads(bed.RECORDS.read_text())
AGAIN = "run benchmarks/compat_llama_cpp.py, which records llama.cpp's results"


def test_llama_cpp_was_asked_about_every_gguf_file():
    files = {str(case) for case in cases.covering() if case.container == "gguf"}
    assert set(RECORDS["cases"]) == files, AGAIN


def test_llama_cpp(prepared, loaded):
    """Its recorded ids of prompts, answers up to its own end tokens, and logits of the same file."""
    found = RECORDS["cases"].get(str(prepared.case))
    if found is None:
        return  # a folder
    if bed.digest(prepared.path) != found["sha256"]:
        here = {name: version(name) for name in RECORDS["writers"]}
        assert here != RECORDS["writers"], f"the generator has changed: {AGAIN}"
        pytest.skip(f"other libraries write other bytes: recorded with {RECORDS['writers']}, here {here}")
    assert found["prompt"] == prepared.prompt_ids
    assert found["chat"] == prepared.chats[1][2]
    assert found["answer"] == found["chat_answer"] == prepared.answer
    model, _ = loaded
    logits = model(mx.array([prepared.prompt_ids]), model.new_cache())[0, -1]
    got = logits[mx.array(RECORDS["logits_of"])].astype(mx.float32)
    tolerance = LOGIT_ERRORS.get(prepared.case.weights, 0.15) if logits.dtype == mx.float32 else HALF
    assert_close(got, mx.array(found["logits"]), str(prepared.case), rtol=0, atol=tolerance)
