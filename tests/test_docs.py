"""README.md and docs/ agree with the project: links, commands, options, make targets, JSON keys, Python examples.

Runs the command on a tiny model for the JSON documents, in this process: some 3 s. Each Python example runs on the
built-in model in a process of its own: some 20 s in all.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bench_results
from mlxeff import cli
from mlxeff.cli.parsers import build
from test_packaging import commands, make_targets
from tiny_model import write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "benchmarks").glob("*.md")), ROOT / "cpu/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
MAX_README, MAX_COLUMNS = 150, 120


def named(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    """Those that GitHub gives the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_every_relative_link_leads_somewhere(page):
    links = [first or second for first, second in LINK.findall(page.read_text(encoding="utf-8"))]
    for link in links:
        if "://" in link:
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{named(page)}: {link}"


def test_every_page_is_in_both_indexes():
    pages = {page.name for page in PAGES[1:]} - {"README.md"}
    readme, index = (path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "docs/README.md"))
    assert set(re.findall(r"\(docs/([\w-]+\.md)\)", readme)) == pages
    assert set(re.findall(r"^\| \[[\w-]+\.md\]\(([\w-]+\.md)\)", index, re.MULTILINE)) == pages


def test_the_readme_can_be_read_to_its_end():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=named)
def test_lines_are_short_but_for_tables(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|")] == []


def parsers(parser, path=()):
    """(words of the command) → its parser, of every verb."""
    found = {path: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= parsers(sub, (*path, name))
    return found


PARSERS = parsers(build())


def options(parser):
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


ALL_OPTIONS = set().union(*map(options, PARSERS.values())) - {"--help", "--version"}


def calls(text):
    """Each `mlxeff …` of a page as its words: in backquotes, or a line of a console block, with its continuations."""
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = re.findall(r"`(mlxeff [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            found += re.findall(r"(?:^|[|;] |\$ )(mlxeff [^|>#]*)", line.partition("  # ")[0])
    return [call.split() for call in found]


@pytest.mark.parametrize("page", LINKED, ids=named)
def test_every_command_that_is_named_exists(page):
    for _, *words in calls(page.read_text(encoding="utf-8")):
        path = ()
        while words and (*path, words[0]) in PARSERS:
            path = (*path, words.pop(0))
        assert path or words[0] in ("VERB", "--version"), f"{named(page)}: mlxeff {' '.join(words)}"
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        below = set().union(*(options(each) for name, each in PARSERS.items() if name[: len(path)] == path))
        assert given <= below, f"{named(page)}: mlxeff {' '.join((*path, *words))}"


def test_every_option_is_explained_in_docs():
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {option for option in ALL_OPTIONS if not re.search(rf"`{option}(?![\w-])", pages)} == set()


def test_every_option_in_a_table_of_docs_exists():
    for page in PAGES:
        cells = re.findall(r"^\| (`--[^|]+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
        for option in re.findall(r"--[\w-]+", " ".join(cells)):
            assert option in ALL_OPTIONS, f"{named(page)}: {option}"


def test_make_targets_in_docs_exist():
    found = set().union(*(commands(page.read_text(encoding="utf-8")) for page in LINKED))
    assert {"demo", "test", "lint"} <= found <= make_targets()


def tables(heading):
    """The keys in the first cells of the tables of docs/json.md below `heading`, up to the next of its level."""
    text = (ROOT / "docs/json.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+) \|([^|]+)\|$", section, re.MULTILINE)
    return {key for first, _ in rows for key in re.findall(r"`(\w+)`", first)}, section


def run(*arguments):
    """The document that the command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main([*map(str, arguments), "--json"])
    return json.loads(out.getvalue()), code


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("docs") / "base", {"num_hidden_layers": 4})


@pytest.fixture(scope="module")
def fitted(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("docs-pair")
    (place / "text").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    fit = ["fit", "kv-predictor", folder, "--aux", "lp:0.5", "--out", place / "pair", "--text", place / "text"]
    found, code = run(*fit, "--tokens", 300, "--length", 100)
    assert code == 0
    return place / "pair", found


@pytest.fixture(scope="module")
def dynamoe(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("docs-dynamoe")
    (place / "text").write_text("The quick brown fox jumps over the lazy dog. " * 16)
    options = ["--text", place / "text", "--tokens", 300, "--tune", 256]
    found, code = run("fit", "dynamoe", folder, "--out", place / "dyn", *options)
    assert code == 0
    wide = write_tiny_model(place / "wide", {"intermediate_size": 128})
    by_inputs, code = run("fit", "dynamoe", wide, "--out", place / "sparse", "--by", "inputs", *options[:4])
    assert code == 0
    return place / "dyn", found, place / "sparse", by_inputs


def test_every_key_of_an_error_is_explained():
    found, code = run("generate", "--model", "/no/such/model", "Hi")
    assert code == 1
    assert set(found) == tables("Errors")[0]


def test_every_key_of_generate_is_explained(folder, fitted, dynamoe, tmp_path):
    found, _ = run("generate", "--model", folder, "--max-tokens", 4, "--kv-predict", fitted[0], "--auto", "Hi")
    wide = write_tiny_model(tmp_path / "wide", {"head_dim": 64})
    drafting, _ = run("generate", "--model", wide, "--max-tokens", 4, "--quantspec", "Hi")
    keys, section = tables("`mlxeff generate --json`")
    dynamic, _ = run("generate", "--model", dynamoe[0], "--max-tokens", 9, "--sensitivity", 0.7, "Hi")
    draft = ("--draft", "dynamoe:0", "--num-draft-tokens", 2)
    drafted, _ = run("generate", "--model", dynamoe[0], "--max-tokens", 9, *draft, "Hi")
    sparse, _ = run("generate", "--model", dynamoe[2], "--max-tokens", 9, "--sensitivity", 0.7, "Hi")
    dynamic["timings"]["dynamoe"] |= sparse["timings"]["dynamoe"]
    inner = set(found["timings"]["kv_prediction"]) | set(drafting["timings"]["quantspec"])
    inner |= set(found["auto"]) | set(dynamic["timings"]["dynamoe"]) | set(drafted["timings"]["dynamoe_draft"])
    assert set(found) | set(found["timings"]) | inner == keys
    assert all(f"`{name}`" in section for name in found["versions"])


def test_every_key_of_bench_is_explained(folder, fitted):
    few = ["-r", 1, "--warmup", 0, "-p", 8]
    found, _ = run("bench", "ttft", folder, "--vs", f"--kv-predict {fitted[0]}", *few)
    drafting, _ = run("bench", "decode", folder, "-n", 2, "--vs", "--prompt-lookup --num-draft-tokens 1", *few)
    suite, _ = run("bench", "suite", "kvp-paper", "--memory", 0.001, "--only", "arm=OE1.1B")
    kernels, _ = run("bench", "kernels", folder, "--rows", 1, "-r", 1)
    quality, _ = run("bench", "quality", folder, "--tokens", 50, "--context", 20, "--vs", "--kv-cache float16")
    keys, section = tables("`mlxeff bench --json`")
    all_of_them = found, drafting, suite, kernels, quality
    parts = [*all_of_them, *(each["settings"] for each in all_of_them)]
    for each in all_of_them:
        parts += [row for name in ("results", "samples", "ratios", "published") for row in each[name]]
        parts += [each["card"], each["settings"].get("prompt", {}), *each["arms"].values(), *each["ceilings"].values()]
        parts += [each["card"][name] for name in ("power", "thermal")]
        parts += [sample["values"] for sample in each["samples"]]
    got = set().union(*parts)
    assert {name for name in got if f"`{name}`" not in section} == set()
    assert keys - got <= {"acceptance", "suites"}


def test_every_key_of_results_in_files_is_explained(tmp_path):
    pytest.importorskip("matplotlib")
    source = bench_results.write(tmp_path / "a.json", bench_results.realistic())
    found, _ = run("bench", "compare", source, source)
    one = found["comparisons"][0]
    keys = tables("`mlxeff bench compare --json`")[0]
    assert set(found) | set(one) | set(one["rows"][0]) == keys | {"arm", "device", "test", "metric", "unit", "better"}
    assert set(run("bench", "page", source, "--png", tmp_path / "png")[0]) == tables("`mlxeff bench page --json`")[0]


def test_every_key_of_eval_is_explained(folder, fitted):
    reading = ["--context", 32, "--tokens", 64, "--prompt", 8, "--kv-predict", fitted[0]]
    found, _ = run("eval", "ppl", folder, *reading)
    keys = tables("`mlxeff eval ppl --json`")[0]
    assert set(found) == keys
    found, _ = run("eval", "kl", folder, *reading)
    assert set(found) == keys | tables("`mlxeff eval kl --json`")[0]
    assert set(found["against"]) <= keys


def test_every_key_of_eval_of_tasks_is_explained(tmp_path):
    folder = write_tiny_model(tmp_path / "long", {"max_position_embeddings": 512})
    of_ppl = tables("`mlxeff eval ppl --json`")[0]
    found, _ = run("eval", "retrieval", folder, "--lengths", 300, "--depths", 50, "--needles", 1)
    keys, section = tables("`mlxeff eval retrieval --json`")
    assert set(found) - of_ppl <= keys <= set(found)
    assert {key for each in ("cells", "answers") for key in found[each][0] if f"`{key}`" not in section} == set()
    (tmp_path / "questions").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}')
    found, _ = run("eval", "choices", folder, tmp_path / "questions")
    keys, section = tables("`mlxeff eval choices --json`")
    assert set(found) - of_ppl <= keys <= set(found)
    assert {key for key in found["answers"][0] if f"`{key}`" not in section} == set()


def test_every_key_of_plan_is_explained(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXEFF_CACHE", str(tmp_path))
    wide = write_tiny_model(tmp_path / "wide", {"head_dim": 64})
    found, _ = run("plan", wide, "--chip", "m2", "--explain", "--prompt-lengths", "64", "--depths", "0,64")
    result, _ = run("bench", "ttft", folder, "-p", "8,16", "-r", 1, "--device", "cpu")
    (tmp_path / "result.json").write_text(json.dumps(result))
    fitted, _ = run("plan", folder, "--calibrate", tmp_path / "result.json")
    scored, _ = run("plan", folder, "--score", tmp_path / "result.json", "--chip", "m2")
    keys, section = tables("`mlxeff plan --json`")
    one = found["combinations"][0]
    parts = [found, found["machine"], found["constants"], found["shape"], one, one["ttft"][0], one["decode"][0]]
    parts += [found["memory"][0], found["quantspec"][0], found["layers"][0], fitted, fitted["calibrated"], scored]
    parts += [scored["score"], scored["score"]["points"][0], scored["score"]["mape"]]
    assert {name for part in parts for name in part if f"`{name}`" not in section} == set()
    assert keys == keys & {name for part in parts for name in part}


def test_every_key_of_fit_is_explained(fitted):
    keys, section = tables("`mlxeff fit kv-predictor --json`")
    assert set(fitted[1]) == keys
    inner = [set(fitted[1][key]) for key in ("base", "auxiliary", "parameters")]
    assert {name for name in set().union(*inner) if f"`{name}`" not in section} == set()


def test_every_key_of_a_fit_of_dynamoe_is_explained(dynamoe):
    keys = tables("`mlxeff fit dynamoe --json`")[0]
    assert set(dynamoe[1]) | set(dynamoe[1]["tuning"]) == keys
    assert set(dynamoe[3]) <= keys


def test_every_key_of_convert_is_explained(folder, tmp_path):
    found, _ = run("convert", folder, tmp_path / "out", "--seedlm", "4", "--dry-run")
    keys, section = tables("`mlxeff convert --json`")
    assert set(found) | set(found["encoding"]) == keys
    assert {name for name in found["options"] if f"`{name}`" not in section} == set()


@pytest.mark.parametrize("verb", ["models", "doctor"])
def test_every_key_of_what_is_here_is_explained(verb, tmp_path):
    bundle = ("--bundle", tmp_path / "report.txt") if verb == "doctor" else ()
    found, _ = run(verb, *bundle)
    keys, section = tables(f"`mlxeff {verb} --json`")
    assert set(found) == keys
    inner = [found["models"][0]] if verb == "models" else [found["metal"], found["native"], found["bundle"]]
    assert {name for each in inner for name in each if f"`{name}`" not in section} == set()


@pytest.mark.slow
def test_the_python_examples_run(smollm2_gguf, tmp_path):
    sentence = "The quick brown fox jumps over the lazy dog. "
    (tmp_path / "long.txt").write_text(sentence * 20)
    (tmp_path / "notes.txt").write_text(sentence * 120)
    for page in (ROOT / "README.md", ROOT / "docs/python.md"):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            command = [sys.executable, "-c", block]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{named(page)}:\n{block}\n{done.stderr}"
