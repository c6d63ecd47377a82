"""`mlxeff trace dynamoe`: which tokens take how much, as a page in a real browser and as a picture. Costs about 5 s,
with a browser 10 s."""

import html
import json
import re
import shutil
import struct
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from mlxeff.assembly.dynamoe import networks
from mlxeff.assembly.model import load_path
from mlxeff.dynamoe.trace import Trace, colour, trace
from mlxeff.running import RunOptions
from test_cli import fails, mlxeff
from test_fit_dynamoe import fitted, source, text  # noqa: F401, fixtures

SENTENCE = "Some <b>words</b> & signs, täglich.\nA second line."
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def page(fitted, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("trace") / "page.html"
    options = ("--out", out, "--sensitivity", "0.6", "--json")
    return out, json.loads(mlxeff("trace", "dynamoe", fitted[0], SENTENCE, *options)[0])


def test_the_numbers_are_those_of_the_routers(page, fitted):  # noqa: F811
    """Token by token and layer by layer what a forward pass chooses."""
    loaded = load_path(fitted[0])
    ids = loaded.tokenizer.encode(SENTENCE)
    before = [network.counts for network in networks(loaded, "here")]
    mx.eval(loaded.model.plain.forward(mx.array([ids]), loaded.model.new_cache(), RunOptions(fraction=0.6), False))
    _, report = page
    for network, counts, share in zip(networks(loaded, "here"), before, report["layer_fractions"], strict=True):
        taken = np.subtract(network.counts, counts)
        assert share == pytest.approx(taken @ network.widths / (taken.sum() * network.widths[-1]), abs=1e-4)
    assert "".join(token["text"] for token in report["tokens"]).endswith(SENTENCE)
    assert report["mean_fraction"] == pytest.approx(np.mean(report["layer_fractions"]), abs=1e-3)


def test_tokens_differ(page):
    assert len({token["fraction"] for token in page[1]["tokens"]}) > 2


def test_a_long_text_is_traced_piece_by_piece(fitted, monkeypatch):  # noqa: F811
    loaded = load_path(fitted[0])
    ids = np.random.default_rng(1).integers(97, 123, 40).tolist()
    whole = trace(loaded.model, ids, [""] * 40, 0.6)
    monkeypatch.setattr("mlxeff.dynamoe.trace.STEP", 7)
    assert (trace(loaded.model, ids, [""] * 40, 0.6).shares == whole.shares).mean() > 0.98
    assert (trace(loaded.model, ids, [""] * 40, 1.0).shares == 1).all()


def test_the_page_stands_alone_and_escapes_the_text(page):
    written = page[0].read_text(encoding="utf-8")
    assert "<b>words" not in written
    assert html.escape("<b>words</b>") in re.sub(r"</?span[^>]*>", "", written)
    assert not re.search(r"<script|https?://|src=|url\(", written)


def test_the_picture_is_a_png(page):
    pytest.importorskip("matplotlib")
    data = (page[0].with_suffix(".png")).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800
    assert height > 300


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_shows_the_text(page, tmp_path):
    """The page as the browser has parsed it: every token once, in order, and a rectangle for each change of share."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile")
    shown = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{page[0]}"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    body = re.search(r'<div class="text">(.*?)</div>', shown, re.DOTALL)[1]
    assert html.unescape(re.sub(r"<[^>]*>", "", body)).endswith(SENTENCE)
    assert len(re.findall("<span", body)) == len(page[1]["tokens"])
    assert len(re.findall("<rect", shown)) >= 2
    subprocess.run(
        [BROWSER, *flags, f"--screenshot={tmp_path}/page.png", "--window-size=900,1200", f"file://{page[0]}"],
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_shares_have_colours_from_little_to_all():
    def lightness(share):
        return sum(int(colour(share)[i : i + 2], 16) for i in (1, 3, 5)) / 3

    assert len({colour(k / 4) for k in range(5)}) == 5
    assert min(map(lightness, (0, 0.5, 1))) > 120, "black text is read on it"
    assert colour(-1) == colour(0)
    assert Trace(["a", "b"], np.ones((3, 2)), 1.0).page("t").count("<rect") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--out", "page.txt"], "wanted a name that ends in .html"),
        (["--out", "page.html"], "trace: wanted a text or --file, got none"),
        (["x", "--file", "y", "--out", "page.html"], "trace: wanted a text or --file, got both"),
        (["--file", "nowhere", "--out", "page.html"], "nowhere: cannot be read: No such file or directory"),
        (["", "--out", "page.html"], "wanted a text, got an empty one"),
    ],
)
def test_bad_input_is_one_line(fitted, tmp_path, arguments, message):  # noqa: F811
    assert message in fails("trace", "dynamoe", fitted[0], *arguments, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_text_that_begins_like_a_home_folder_stays_as_it_is(fitted, tmp_path):  # noqa: F811
    found, _ = mlxeff("trace", "dynamoe", fitted[0], "~root is a name", "--out", tmp_path / "page.html", "--json")
    assert "".join(token["text"] for token in json.loads(found)["tokens"]).endswith("~root is a name")


def test_a_dense_model_is_refused(source, tmp_path):  # noqa: F811
    line = fails("trace", "dynamoe", source, "x", "--out", tmp_path / "page.html")
    assert "trace dynamoe: wanted a DynaMoE model" in line


def test_a_page_is_not_overwritten(fitted, tmp_path):  # noqa: F811
    (tmp_path / "page.html").write_text("mine")
    assert "got a path that exists" in fails("trace", "dynamoe", fitted[0], "x", "--out", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"
