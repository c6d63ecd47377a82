"""Every technique with every other one, by the command's own assembly: rows that cover each pair of values of the
dimensions in `together.DIMENSIONS`, on tiny models, and the whole stack on the built-in model. Some 30 s."""

import contextlib
import functools
import io
import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlxeff.convert import convert

import together
from mlxeff import MlxeffError, cli
from mlxeff.assembly import model as assembled
from mlxeff.cli.chat import Chat
from mlxeff.cli.parsers import build
from mlxeff.cli.runner import Answer, start
from mlxeff.dynamoe.feed_forward import Router
from mlxeff.seedlm.encode import encode
from mlxeff.seedlm.format import FORMATS
from mlxeff.seedlm.install import entry, metadata
from test_models import OPENELM
from tiny_model import PHI, quantise_folder, write_foreign, write_random_model, write_tiny_model, write_words

LINES = ("the auxiliary reads the prompt, the base answers: ", "and once more, the base answers")
TOKENS, SENSITIVE = 16, {"experts": (), "inputs": ("--by", "inputs")}
HEADS = {"head_dim": 64, "intermediate_size": 192, "num_hidden_layers": 3, "eos_token_id": []}
OF_OPENELM = {"vocab_size": 261, "head_dim": 64, "num_query_heads": [2, 2, 2], "num_kv_heads": [1, 1, 1],
              "ffn_dim_divisor": 64, "ffn_multipliers": [2.0, 4.0, 3.0], "eos_token_id": []}  # fmt: skip
WORKING, REFUSED = together.cover()


def name(row):
    return ", ".join(value for key, value in row.items() if value != together.PLAIN[key]) or "plain"


def run(*arguments):
    """The command in this process; raises MlxeffError with the line of an error."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main([*map(str, arguments)])
    if code:
        raise MlxeffError(err.getvalue().partition("mlxeff: error: ")[2].strip())
    return out.getvalue()


class Models:
    """Tiny models of each kind with a pair for each, made when they are asked for."""

    def __init__(self, place):
        self.place, self.text = place, write_words(place / "text.txt", 900)
        self.draft = write_tiny_model(place / "draft", {"num_hidden_layers": 1, "eos_token_id": []}, seed=3)

    @functools.cache  # noqa: B019 - one object for all tests
    def folder(self, family, weights, ffn):
        out = self.place / f"{family} {weights} {ffn}"
        if family == "phi3":
            folder = write_foreign(out, PHI | {"eos_token_id": [], "max_position_embeddings": 256})
            change_phi3(folder, weights, ffn)
        elif weights == "dense" and ffn == "dense":
            write_tiny_model(out, HEADS) if family == "llama" else write_random_model(out, OPENELM | OF_OPENELM)
        elif weights == "seeds" or ffn == "dense":
            how = {"quantize": (4, 32)} if weights == "affine" else {"seedlm": "4", "data_free": True}
            convert(self.folder(family, "dense", ffn), out, **how)
        else:
            source, fit = self.folder(family, weights, "dense"), ("fit", "dynamoe")
            run(*fit, source, "--out", out, "--text", self.text, "--tokens", 256, *SENSITIVE[ffn])
        return out

    @functools.cache  # noqa: B019
    def pair(self, folder):
        out = folder.with_name(f"{folder.name} pair")
        options = ("--aux", "layers:0-1", "--text", self.text, "--tokens", 400, "--length", 100)
        run("fit", "kv-predictor", folder, "--out", out, *options)
        return out

    def words(self, row):
        """The model and the options of a row as words of the command line."""
        folder = self.folder(row["family"], row["weights"], row["ffn"])
        for word in together.options(row):
            if word.startswith("PAIR"):
                own = folder if row["family"] != "phi3" else self.folder("llama", "dense", "dense")
                word = f"{self.pair(own)}{word.removeprefix('PAIR')}"
            yield self.draft if word == "DRAFT" else word


def change_phi3(folder, weights, ffn):
    """Store the weights of a model of mlx-lm otherwise; name a technique in its config that it cannot have."""
    config, file = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    if weights == "affine":
        quantise_folder(folder)
    elif weights == "seeds":
        tensors, modules = mx.load(str(file)), {}
        for key in [key for key in tensors if "_proj" in key]:
            module, matrix = key.removesuffix(".weight"), np.array(tensors.pop(key))
            modules[module] = (FORMATS["4"], *matrix.shape)
            found = encode(FORMATS["4"], matrix).arrays
            tensors |= {f"{module}.{part}": mx.array(array) for part, array in found.items()}
        mx.save_safetensors(str(file), tensors, {"format": "mlx"} | metadata())
        (folder / "config.json").write_text(json.dumps(config | {"seedlm": entry(modules)}))
    if ffn != "dense":
        (folder / "config.json").write_text(json.dumps(config | {"dynamoe": {"version": 1}}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("together"))


def started(models, row, verb):
    folder = models.folder(row["family"], row["weights"], row["ffn"])
    words = ["--model", folder, "--device", "cpu", "--max-tokens", TOKENS, *models.words(row)]
    extra = ["--raw", LINES[0]] if verb == "generate" else []
    return start(build().parse_args([verb, *map(str, words), *extra]))


def generated(models, row):
    """(Token ids of the answer, `timings`)."""
    runner, answer = started(models, row, "generate"), Answer()
    list(runner.stream(runner.loaded.tokenizer.encode(LINES[0]), answer))
    return answer.token_ids, runner.stats(answer)


def talked(models, row):
    """(Token ids of two answers, `timings` of the first)."""
    chat, found = Chat(started(models, row, "chat"), []), []
    for line in LINES:
        with contextlib.redirect_stdout(io.StringIO()):
            chat.answer(line)
        found.append((chat.runner.session.tokens[-TOKENS + 1 :], chat.last))
    return [token for tokens, _ in found for token in tokens], found[0][1]


def scored(models, row):
    """(Perplexity, the report with the names of `timings`)."""
    folder = models.folder(row["family"], row["weights"], row["ffn"])
    how = ("--text", models.text, "--tokens", 160, "--context", 160, "--prompt", 148, "--step", 1, "--device", "cpu")
    report = json.loads(run("eval", "ppl", folder, *how, *models.words(row), "--json"))
    assert report["not_finite"] == 0
    return report["perplexity"], report | report["statistics"]


RUN = {"generate": generated, "chat": talked, "eval": scored}


@pytest.fixture(scope="module")
def answer(models):
    """A row → what it answers; computed once."""
    known = {}

    def find(row):
        key = tuple(row.items())
        if key not in known:
            known[key] = RUN[row["verb"]](models, row)
        return known[key]

    return find


def test_the_rows_cover_every_pair():
    assert set().union(*(together.pairs(row) for row in [*WORKING, *REFUSED])) == together.all_pairs()
    assert all(together.refusal(row) is None for row in WORKING)
    assert all(together.refusal(row) for row in REFUSED)


@pytest.mark.parametrize("row", WORKING, ids=name)
def test_techniques_together(row, models, answer):
    """Drafts do not change the answer on the same weights and cache; what changes it is there, and gives the same
    words again."""
    found, report = answer(row)
    if row["drafts"] != "none":
        cache = "int8" if "quantspec" in row["drafts"] else row["cache"]
        assert found == answer(row | {"drafts": "none", "cache": cache})[0]
    assert found == RUN[row["verb"]](models, row)[0]
    check_report(row, report)


def check_report(row, report):
    """Every technique of the row took part."""
    if row["reading"] != "computed":
        assert report["kv_prediction"]["predicted_tokens"] > 0
        assert (report["kv_prediction"]["refined_tokens"] > 0) == (row["reading"] == "refined")
    if row["ffn"] != "dense":
        assert report["dynamoe"]["mean_fraction"] < 1
    if row["drafts"] != "none":
        drafter = {"quantspec": "quantspec", "model": "draft_model", "lookup": "prompt_lookup"}
        drafted = report[drafter.get(row["drafts"].split()[0], "dynamoe_draft")]
        assert drafted["rounds"] > 0
    if row["family"] != "phi3":
        kinds = {"default": "int8" if "quantspec" in row["drafts"] else "float32"}
        assert report["kv_dtype"] == kinds.get(row["cache"], row["cache"])
        assert report["compute"] == row["compute"]


def test_what_is_lossy_changes_predictions(answer):
    """Were a technique passed over, the measure would be that of the plain model."""
    plain = together.PLAIN | {"verb": "eval", "ffn": "experts"}
    changes = [{"reading": "kept"}, {"cache": "float16"}, {"cache": "int8"}, {"cache": "k8v4"}, {"cache": "int4"}]
    measures = [answer(plain | change)[0] for change in [{}, *changes, {"compute": "int8", "weights": "affine"}]]
    assert len(set(measures)) == len(measures)


@pytest.mark.parametrize("row", REFUSED, ids=name)
def test_what_cannot_work_says_why_before_weights_are_read(row, models, monkeypatch):
    read = []

    def answered():
        list(models.words(row))  # refuses what cannot be made
        monkeypatch.setattr(assembled, "fill", lambda *_: read.append("weights"))
        monkeypatch.setattr("mlxeff.models.adapter.load_adapter", lambda *_: read.append("weights"))
        RUN[row["verb"]](models, row)

    with pytest.raises(MlxeffError) as error:
        answered()
    assert together.refusal(row) in str(error.value)
    assert "\n" not in str(error.value)
    assert read == []


def dynamic_built_in(built_in, out):
    """The built-in model as a DynaMoE whose routers are random: its own weights, no fit, which takes minutes."""
    convert(built_in, out)
    config = json.loads((out / "config.json").read_text())
    size, width, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    mx.random.seed(4)
    router = tree_flatten(Router(size, "lagrangian", [0.5, 1.0]).parameters())
    places = [f"model.layers.{layer}.mlp.router" for layer in range(layers)]
    added = {f"{place}.{key}": mx.random.normal(value.shape) for place in places for key, value in router}
    mx.save_safetensors(str(out / "model.safetensors"), mx.load(str(out / "model.safetensors")) | added)
    about = {"version": 1, "widths": [[width // 2, width]] * layers, "down": "shared", "rule": "lagrangian"}
    (out / "config.json").write_text(json.dumps(config | {"dynamoe": about | {"table": [[0.5, 9], [0.9, 1]]}}))
    return out


def test_the_whole_stack_on_the_built_in_model(tmp_path, models, smollm2_gguf):
    """Seeds in two layers, a predicted prompt, a hierarchical cache with drafts of words that occurred before, and a
    sensitivity: the answer is that without drafts."""
    seeds, pair = tmp_path / "seeds", tmp_path / "pair"
    dynamic = dynamic_built_in(smollm2_gguf, tmp_path / "dynamic")
    as_they_are = ("embed", "mlp", *(f"layers.{number}" for number in range(1, 9)))
    convert(dynamic, seeds, seedlm="4", data_free=True, keep=tuple((part, 16) for part in as_they_are))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(models.text.read_text()[:500] + " One and one is two. One and one is")
    fit = ("--aux", "layers:0-24", "--text", models.text, "--tokens", 128, "--length", 64)
    run("fit", "kv-predictor", seeds, "--out", pair, *fit)
    stack = ("--model", seeds, "--kv-predict", f"{pair}:keep=16", "--sensitivity", "0.9", "--device", "cpu")
    asked = ("generate", "--raw", "--file", prompt, "--max-tokens", 8, "--json", *stack)
    drafts = ("--quantspec", "--prompt-lookup", "--draft", "dynamoe:0.5", "--num-draft-tokens", 3)
    plain, drafted = (json.loads(run(*asked, *more)) for more in (("--kv-cache", "int8"), drafts))
    assert drafted["token_ids"] == plain["token_ids"]
    timings = drafted["timings"]
    assert timings["kv_prediction"]["predicted_tokens"] > 100
    assert timings["quantspec"]["rounds"] > 0
    assert 0.4 < timings["dynamoe"]["mean_fraction"] < 1
    assert timings["kv_dtype"] == "int8"
    assert '"seedlm"' in (seeds / "config.json").read_text()
