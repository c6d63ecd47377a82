"""`mlxeff bench compare`: made-up results with known answers, a real one, and files that are none. Some 8 s."""

import json
import random
import re

import pytest

from bench_results import ARMS, NOISE, document, measured, realistic, row, write
from mlxeff import cli
from mlxeff.bench import compare, reader
from mlxeff.bench.page import sections
from mlxeff.bench.page.plots import plots
from mlxeff.bench.tables import aligned, table
from mlxeff.bench.words import digits, scale, shown
from mlxeff.errors import MlxeffError
from test_cli import fails, mlxeff
from tiny_model import write_tiny_model


@pytest.fixture
def run(tmp_path, capsys):
    """Compares documents; returns (exit code, the document of --json, or the text with other options)."""

    def call(*documents, options=("--json",)):
        files = [write(tmp_path / f"{index}.json", each) for index, each in enumerate(documents)]
        code = cli.main(["bench", "compare", *map(str, files), *map(str, options)])
        out = capsys.readouterr().out
        return code, json.loads(out) if "--json" in options else out

    return call


def one(metric, median, noise=NOISE):
    """A result of one row whose median is `median`."""
    rows, samples = measured("a", "pp512", noise, **{metric: median})
    return document(rows, samples)


def verdict(before, after, threshold=0.03):
    return compare.compare(before, after, threshold, ("A", "B")).changes[0].verdict


@pytest.mark.parametrize(
    ("metric", "factor", "want"),
    [
        ("ttft_s", 1.1, compare.REGRESSION),
        ("ttft_s", 0.9, compare.IMPROVEMENT),
        ("decode_tps", 1.1, compare.IMPROVEMENT),
        ("decode_tps", 0.9, compare.REGRESSION),
        ("ttft_s", 1.02, compare.NOISE),
        ("ttft_s", 1.0, compare.NOISE),
    ],
)
def test_a_change_counts_in_the_direction_that_is_worse(metric, factor, want):
    assert verdict(one(metric, 2.0), one(metric, 2.0 * factor)) == want


def test_a_change_within_the_spread_of_the_samples_is_noise():
    wild = (1.0, 0.7, 1.4, 1.2, 0.8)
    assert verdict(one("ttft_s", 2.0, wild), one("ttft_s", 2.2, wild)) == compare.NOISE
    assert verdict(one("ttft_s", 2.0, wild), one("ttft_s", 4.5, wild)) == compare.REGRESSION


def test_the_threshold_is_the_least_change_that_counts():
    steady = (1.0,) * 5
    before, after = one("ttft_s", 2.0, steady), one("ttft_s", 2.08, steady)
    assert verdict(before, after, 0.05) == compare.NOISE
    assert verdict(before, after, 0.03) == compare.REGRESSION


def test_the_whole_interval_has_to_be_beyond_the_threshold():
    before, after = one("ttft_s", 2.0), one("ttft_s", 2.0 * 1.04)  # an interval from about 2 to 6 %
    assert verdict(before, after, 0.03) == compare.NOISE
    assert verdict(before, after, 0.01) == compare.REGRESSION
    assert verdict(after, before, 0.03) == compare.NOISE
    assert verdict(after, before, 0.01) == compare.IMPROVEMENT


def test_the_interval_of_steady_samples_is_the_change():
    (found,) = compare.compare(one("ttft_s", 2, (1,) * 5), one("ttft_s", 2.2, (1,) * 5), 0, ("A", "B")).changes
    assert (found.change, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_a_result_beside_itself_is_noise_with_the_width_of_both():
    (found,) = compare.compare(one("ttft_s", 2), one("ttft_s", 2), 0, ("A", "B")).changes
    assert found.verdict == compare.NOISE
    low, high = min(NOISE), max(NOISE)
    assert low / high - 1 <= found.low < -0.005 < 0.005 < found.high <= high / low - 1


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """300 pairs of 15 samples of one distribution: 95 % of the intervals should hold 0. The seed is fixed."""
    chosen, held = random.Random(1), 0
    for _ in range(300):
        noise = [[chosen.gauss(1, 0.05) for _ in range(15)] for _ in range(2)]
        (found,) = compare.compare(one("ttft_s", 1, noise[0]), one("ttft_s", 1, noise[1]), 0, ("A", "B")).changes
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 300 <= 0.99


def test_two_samples_decide_nothing_about_times_but_perplexity_needs_one():
    assert verdict(one("ttft_s", 2, (1, 1)), one("ttft_s", 4, (1, 1))) == compare.UNDECIDED
    assert verdict(one("ppl", 15, (1,)), one("ppl", 16, (1,))) == compare.REGRESSION
    assert verdict(one("ppl", 15, (1,)), one("ppl", 15.1, (1,))) == compare.NOISE
    assert verdict(one("kl", 0, (1,)), one("kl", 0.1, (1,))) == compare.REGRESSION
    assert verdict(one("kl", 0, (1,)), one("kl", 0, (1,))) == compare.NOISE
    assert verdict(one("peak_bytes", 2e9, (1,)), one("peak_bytes", 1e9, (1,))) == compare.IMPROVEMENT


def test_the_exit_code_tells_of_regressions(run):
    slower = realistic(speed=1 / 1.1)
    code, found = run(realistic(), slower)
    assert code == 1
    assert found["regressions"] == 4
    (one_file,) = found["comparisons"]
    worse = {(row["arm"], row["test"]) for row in one_file["rows"] if row["verdict"] == "regression"}
    assert worse == {(ARMS[1], "pp512"), (ARMS[1], "pp2048")}, "the samples of pp128 are too wild"
    ttft = next(row for row in one_file["rows"] if row["arm"] == ARMS[1] and row["metric"] == "ttft_s")
    assert ttft["change"] == pytest.approx(0.1)
    assert run(realistic(), slower, options=("--json", "--no-fail"))[0] == 0
    assert run(realistic(), slower, options=("--json", "--threshold", 12))[0] == 0
    code, found = run(slower, realistic(), realistic())
    assert code == 0
    assert [each["improvements"] for each in found["comparisons"]] == [4, 4]


def test_what_differs_is_said(run):
    other = realistic((ARMS[0], "quantspec"))
    other["card"] |= {"threads": 8, "mlx": "0.33.0"}
    other["settings"] |= {"fingerprint": "ffff0000", "rounds": 7, "prefill_step": {"cpu": 256}}
    for sample in other["samples"]:
        sample["load_average"] += 3
    other["results"] = [each for each in other["results"] if each["test"] != "pp128"]
    code, found = run(realistic(), other)
    (one_file,) = found["comparisons"]
    assert code == 0
    assert one_file["differences"] == [
        "different models: smollm2-135m (fingerprint 1f2e3d4c) → smollm2-135m (fingerprint ffff0000)",
        "card: mlx: 0.32.4 → 0.33.0",
        "card: threads: 2 → 8",
        "settings: rounds: 5 → 7",
        "settings: prefill_step.cpu: 512 → 256",
        "samples: median load average before a pass: 0.40 → 3.40",
    ]
    assert f"{ARMS[0]}, pp128, ttft_s on cpu" in one_file["only_before"]
    assert "quantspec, pp512, ttft_s on cpu" in one_file["only_after"]
    assert {each["arm"] for each in one_file["rows"]} == {ARMS[0]}


def test_text_and_markdown_have_every_row(run):
    _, text = run(realistic(), realistic(speed=1 / 1.1), options=())
    assert text.startswith("A: ")
    line = next(line for line in text.splitlines() if line.startswith(ARMS[1]) and "pp512" in line)
    assert re.search(r" pp512 +ttft_s +273 ms +300 ms +\+10\.0 % +\+\d.* regression$", line)
    assert "24 rows: 4 regressions, 20 within noise" in text
    _, text = run(realistic(), realistic(), realistic(), options=("-o", "md"))
    assert text.count("| arm | test | metric | A |") == 2
    assert "## C beside A" in text
    _, text = run(one("ttft_s", 1, (1, 1)), one("ttft_s", 2, (1, 1)), options=())
    assert "1 rows: 1 with too few samples\na row needs 3 samples in both files for an interval" in text


def test_a_name_on_several_lines_is_one_row(run):
    odd = document(*measured("a\n\x1bb", "pp8", ttft_s=1))
    _, text = run(odd, odd, options=())
    assert [line for line in text.splitlines() if line.startswith("a \\x1bb  pp8 ")]


def test_results_without_a_common_row_are_an_error(tmp_path):
    first = write(tmp_path / "a.json", one("ttft_s", 1))
    second = write(tmp_path / "b.json", one("decode_tps", 1))
    line = fails("bench", "compare", first, second)
    assert "wanted results with a row in common" in line
    assert "a, pp512, decode_tps on cpu" in line


def test_a_row_in_two_units_is_an_error():
    other = one("ttft_s", 1)
    other["results"][0]["unit"] = "ms"
    with pytest.raises(MlxeffError, match=r"wanted one unit, got s .* and ms"):
        compare.compare(one("ttft_s", 1), other, 0, ("A", "B"))


def damaged(**parts):
    return lambda whole: json.dumps(whole | parts)


def without(key):
    return lambda whole: json.dumps({name: value for name, value in whole.items() if name != key})


def in_row(**parts):
    return lambda whole: json.dumps(whole | {"results": [whole["results"][0] | parts]})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged(version=2), "wanted version 1 of the format, got 2"),
        (damaged(format="mlxeff-plan"), 'wanted a result of mlxeff bench (format "mlxeff-bench"), got format'),
        (without("format"), "got format None"),
        (without("samples"), 'the document: wanted a key "samples"'),
        (damaged(card=[]), 'the document: "card": wanted an object, got []'),
        (lambda whole: json.dumps(whole)[:400], "got no complete JSON"),
        (lambda whole: "", "got no complete JSON"),
        (lambda whole: "[1]", "got a JSON list"),
        (lambda whole: "[" * 100_000, "got no complete JSON"),
        (in_row(median=None), 'results[0]: "median": wanted a number, got None'),
        (in_row(median=float("nan")), 'results[0]: "median": wanted a finite number, got nan'),
        (in_row(count=True), 'results[0]: "count": wanted a whole number, got True'),
        (in_row(better="more"), 'results[0]: wanted "better": "higher" or "lower", got \'more\''),
        (damaged(results=[7]), "results[0]: wanted a JSON object, got int"),
        (damaged(results=[row("a", "t", "ppl", [1])] * 2), "wanted one row for each arm"),
        (damaged(samples=[{"arm": "a"}]), 'samples[0]: wanted a key "device", got arm'),
        (damaged(ratios=[{}]), 'ratios[0]: wanted a key "arm", got no key'),
        (damaged(published=[{"what": "x"}]), 'published[0]: wanted a key "label", got what'),
    ],
)
def test_a_file_that_is_no_result_is_one_line(damage, words, tmp_path, capsys):
    good = write(tmp_path / "good.json", one("ttft_s", 1))
    bad = tmp_path / "bad.json"
    bad.write_text(damage(one("ttft_s", 1)))
    assert cli.main(["bench", "compare", str(good), str(bad)]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith(f"mlxeff: error: {bad}: ")
    assert words in line


def places(value, path=()):
    """The path to every value inside a document."""
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(entry, dict | list):
            yield from places(entry, (*path, key))


def problem(whole, path):
    """Why the result cannot be compared or shown, or ""."""
    try:
        read = reader.read(path)
        compare.compare(whole, read, 0.03, ("A", "B"))
        assert sections.page([(path.name, read, [(plot, plot.described) for plot in plots(read)])], [])
    except MlxeffError as error:
        return str(error)
    return ""


def test_a_result_with_any_other_value_is_used_or_refused(tmp_path):
    """Every value of a small result by some others: no other exception than the one that explains itself."""
    whole, refused = realistic(ARMS), 0
    for name in ("results", "samples", "ratios"):
        whole[name] = whole[name][:2]
    whole["results"].append(whole["results"][-1] | {"arm": ARMS[1]})
    for path in places(whole):
        for value in ("x", None, [], {}, [[1]], -1, 0, 1e300, True):
            other = json.loads(json.dumps(whole))
            holder = other
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = value
            error = problem(whole, write(tmp_path / "r.json", other))
            refused += bool(error)
            assert not error or "r.json: " in error or "bench compare: " in error
    assert refused > 300


def test_a_missing_file_and_bytes_are_one_line(tmp_path):
    good = write(tmp_path / "good.json", one("ttft_s", 1))
    assert "none.json: cannot be read: No such file" in fails("bench", "compare", good, tmp_path / "none.json")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    assert "wanted a result of mlxeff bench in UTF-8" in fails("bench", "compare", good, tmp_path / "bytes")


def passes(factor):
    """Samples of `bench ttft --out`: five passes, alone and four at once."""
    return [
        {"arm": "m", "device": "cpu", "test": f"pp100{also}", "batch": batch, "tokens": 100, "depth": 0, "round": index}
        | {"values": {"ttft_s": 2 * each * factor, "prompt_tps": batch * 50 / each / factor}, "load_average": factor}
        for batch, also in ((1, ""), (4, " x4"))
        for index, each in enumerate(NOISE)
    ]


def test_files_of_samples_are_read(tmp_path):
    """The last line of the second one was cut."""
    identity = {"format": "mlxeff-bench-samples", "cpu": "x", "threads": 2, "model": "m", "fingerprint": "f"}
    for name, factor in (("a", 1), ("b", 2)):
        lines = [json.dumps(each) for each in (identity, *passes(factor))] + (['{"device": "c'] if name == "b" else [])
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    out, err = mlxeff("bench", "compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--json", code=1)
    assert "b.jsonl: 1 incomplete lines are left out" in err
    found = json.loads(out)
    (one_file,) = found["comparisons"]
    rows = {(each["test"], each["metric"]): each for each in one_file["rows"]}
    assert rows["pp100", "ttft_s"]["change"] == pytest.approx(1)
    assert rows["pp100 x4", "prompt_tps"]["before"] == pytest.approx(200)
    assert found["regressions"] == 4
    assert one_file["differences"] == ["samples: median load average before a pass: 1.00 → 2.00"]
    for damage, message in (
        ({"values": {"ttft_s": "1"}}, 'samples[0]: values: "ttft_s": wanted a number or null'),
        ({"values": {"hours": 1}}, "samples[0]: wanted metrics of ttft_s, "),
        ({"arm": 3}, 'samples[0]: "arm": wanted a text, got 3'),
    ):
        (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, (identity, passes(1)[0] | damage))))
        assert message in fails("bench", "compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")


def test_what_the_verbs_write_is_read(tmp_path):
    """A real measurement: its document and its file of samples have the same rows, and a page is made of it."""
    folder, samples, result = write_tiny_model(tmp_path / "tiny"), tmp_path / "samples.jsonl", tmp_path / "result.json"
    command = ("bench", "decode", folder, "-p", "8", "-n", "4", "-r", "3", "--vs", "--kv-cache float16", "--quiet")
    result.write_text(mlxeff(*command, "--out", samples, "-o", "json")[0])
    out, _ = mlxeff("bench", "compare", result, samples, "--json")
    (found,) = json.loads(out)["comparisons"]
    assert {each["change"] for each in found["rows"]} == {0}
    assert {each["arm"] for each in found["rows"]} == {str(folder), f"{folder} --kv-cache float16"}
    assert {"ttft_s", "decode_tps", "peak_bytes"} <= {each["metric"] for each in found["rows"]}
    mlxeff("bench", "page", result, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "pp8" in text
    assert "tg4" in text


def test_numbers_are_short_and_have_units():
    assert [digits(x) for x in (0, 0.0123456, 1, 9.999, 99.96, 123.4, 1234.5, 1e-7)] == [
        *("0", "0.0123", "1.00", "10.0", "100", "123", "1,234", "1e-07")
    ]  # fmt: skip
    assert [shown(x, "s") for x in (2, 0.0123, 1.5e-5)] == ["2.00 s", "12.3 ms", "15.0 µs"]
    assert [shown(x, "bytes") for x in (512, 2048, 3e6, 4.1e9)] == ["512 bytes", "2.05 kB", "3.00 MB", "4.10 GB"]
    assert scale("tok/s", 1e9) == (1, "tok/s")
    assert shown(None, "s") == "–"


def test_tables_keep_their_columns():
    assert table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"
    assert aligned(["a", "bb"], [["ccc", "d"]]) == "a    bb\nccc  d"
    assert aligned(["a"], []) == ""
