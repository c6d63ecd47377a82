"""`mlxeff bench page`: the report in a real browser, on a phone and on a desk, light and dark; its files. Some 20 s.

The tests in the browser are skipped where there is none, unless MLXEFF_REQUIRE_BROWSER is set: they fail then.
"""

import base64
import json
import os
import re
import sys
from html.parser import HTMLParser

import pytest

import browser
from bench_results import ARMS, document, measured, realistic, row, write
from mlxeff import cli
from mlxeff.bench.page.plots import MOST, plots
from test_cli import fails, mlxeff

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert(1)</script> \"quoted\" 'arm' & $x_1$ _a"
VOID = {"meta", "link", "br", "img", "hr", "input"}


def page(files, out, *options):
    """Write a page; returns its text."""
    assert cli.main(["bench", "page", *map(str, files), "--out", str(out), *map(str, options)]) == 0
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Name → the page's path: of one result, of two, of hostile names, of many arms, of rows that are bars only."""
    place = tmp_path_factory.mktemp("reports")
    usual = write(place / "usual.json", realistic())
    slower = write(place / "slower.json", realistic(speed=1 / 1.1))
    hostile = realistic((HOSTILE, "_hidden" + "x" * 120 + "\n\x1b\0 \ud800 \udcff"), notices=["a <b>notice</b>"])
    hostile["settings"]["model"] = "<img src=x onerror=alert(1)>"
    hostile["published"][0]["source"] = "</script><script>alert(2)</script>"
    kernels = [row(f"kernel {i}", f"{n} x {n}", "gbps", [20 + i + n / 900] * 3) for i in range(11) for n in (256, 4096)]
    inputs = {
        "one": [usual],
        "two": [usual, slower],
        "hostile": [write(place / "hostile.json", hostile)],
        "bars": [write(place / "bars.json", document(kernels))],
        "empty": [write(place / "empty.json", document(skipped=["all of it"]))],
    }
    for name, files in inputs.items():
        page(files, place / f"{name}.html")
    return {name: place / f"{name}.html" for name in inputs}


@pytest.fixture(scope="module")
def window():
    """The browser; a skip where there is none."""
    if browser.executable() is None and not os.environ.get("MLXEFF_REQUIRE_BROWSER"):
        pytest.skip(f"no browser found ({', '.join(browser.NAMES)})")
    with browser.running() as found:
        yield found


# Every element that is neither inside a box that scrolls nor folded away, and reaches beyond the window.
OUTSIDE = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll table, svg *") &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(e => e.outerHTML.slice(0, 90))"""
# The contrast of two colours as WCAG 2 defines it, of each text with the background behind it.
CONTRAST = """(() => {
  const light = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map(v => (v /= 255) <= 0.04045 ?
    v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (c !== "rgba(0, 0, 0, 0)" && c !== "transparent") return c; } return "rgb(255, 255, 255)"; };
  const found = [];
  for (const e of document.querySelectorAll(
    "h1, h2, p, a, b, small, th, td, dt, dd, li, figcaption, summary, span, svg text")) {
    const style = getComputedStyle(e), own = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [a, b] = [light(own), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.textContent.slice(0, 40), own]); }
  return found.sort((x, y) => x[0] - y[0])[0]; })()"""


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["one", "two", "hostile", "bars", "empty"])
def test_a_page_fits_its_window_and_fetches_nothing(window, reports, name, width):
    window.open(reports[name], width)
    assert window.value("innerWidth") == width
    assert window.value("document.documentElement.scrollWidth") == width
    assert window.value(OUTSIDE) == []
    told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Page.javascriptDialogOpening")
    assert [event for event in window.events if event["method"] in told] == []
    asked = [e["params"]["request"]["url"] for e in window.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [reports[name].as_uri()]


def test_a_page_that_is_too_wide_would_be_noticed(window, tmp_path):
    (tmp_path / "wide.html").write_text(
        '<meta name="viewport" content="width=device-width"><body><div style="width:700px">x</div><img src="y.png">'
        "<script>console.log(1)</script>"
    )
    window.open(tmp_path / "wide.html", 360)
    assert window.value("document.documentElement.scrollWidth") > 360
    assert window.value(OUTSIDE) != []
    assert any(event["method"] == "Runtime.consoleAPICalled" for event in window.events)
    assert sum(event["method"] == "Network.requestWillBeSent" for event in window.events) == 2


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everything_can_be_read(window, reports, dark, width):
    window.open(reports["two"], width, dark=dark)
    lightness = window.value("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] * 1")
    assert (lightness < 60) if dark else (lightness > 240)
    ratio, *where = window.value(CONTRAST)
    assert ratio >= 4.5, where  # level AA of WCAG 2
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
    assert window.value(smallest) >= 11


def test_tables_scroll_inside_their_boxes_on_a_phone(window, reports):
    window.open(reports["one"], 360)
    boxes = window.value(
        "[...document.querySelectorAll('.scroll')].map(e => [e.scrollWidth, e.clientWidth, e.tabIndex])"
    )
    assert len(boxes) >= 8
    assert any(inner > outer for inner, outer, _ in boxes)
    assert all(outer <= 328 and index == 0 for _, outer, index in boxes)
    first = "document.querySelector('.scroll').scrollLeft = 200, "
    first += "document.querySelector('.scroll tbody th').getBoundingClientRect().left"
    assert window.value(first) == pytest.approx(17, abs=1), "the first column stays in sight"


def test_plots_and_tables_are_there(window, reports):
    window.open(reports["one"])
    titles = window.value("[...document.querySelectorAll('figcaption')].map(e => e.firstChild.textContent)")
    assert titles == [
        "Time to the first token by prompt length",
        "Decoding speed by depth",
        "Prompt speed by prompt length",
        *("Peak memory", "Perplexity", "KL divergence", f"Against {ARMS[0]}", "Share of the machine's ceiling"),
        *("Time to the first token: every sample", "Decoding speed: every sample", "Our numbers by published ones"),
    ]
    svg = "document.querySelector('figure svg')"
    assert window.value(f"{svg}.getBoundingClientRect().height") > 150
    texts = window.value(f"[...{svg}.querySelectorAll('text')].map(e => e.textContent.trim())")
    assert {"128", "512", "2048", *ARMS} <= set(texts), "text is text"
    assert window.value(f"{svg}.querySelector('desc').textContent").endswith("128: 0.0625, 512: 0.273, 2048: 1.46.")
    text = window.value("document.body.innerText")
    for words in ("left out: smollm2-135m, batch 64", "noted: the load average", "310 GFLOP/s", "1.76 ×", "4.80 s",
                  "reconstructed: computed from", "0.526 × that of smollm2-135m (0.518 to 0.533)", "115 MB",
                  "prefill_step.cpu\n512", "thermal\nnot known"):  # fmt: skip
        assert words in text, words


def test_names_from_a_file_stay_text(window, reports):
    window.open(reports["hostile"])
    assert (
        window.value("document.scripts.length + document.images.length + document.querySelectorAll('li b').length") == 0
    )
    text = window.value("document.body.innerText")
    assert HOSTILE in text
    assert "</script><script>alert(2)</script>" in text
    legend = "[...document.querySelectorAll('figure svg')[0].querySelectorAll('text')].map(e => e.textContent).join()"
    assert HOSTILE[:25] in window.value(legend), "no tags"
    assert HOSTILE[-12:] in window.value(legend), "no mathematics"
    assert "_hiddenxxx" in window.value(legend)


def test_the_page_holds_the_data(window, reports):
    window.open(reports["one"])
    name, link = window.value("(e => [e.download, e.href])(document.querySelector('a.download'))")
    assert name == "usual.json"
    data = base64.b64decode(link.partition("base64,")[2])
    assert json.loads(data) == json.loads(reports["one"].with_name("usual.json").read_text())


class Checked(HTMLParser):
    """Checks that elements are closed in the order in which they were opened, and collects ids."""

    def __init__(self):
        super().__init__()
        self.open, self.ids = [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["one", "two", "hostile", "bars", "empty"])
def test_the_markup_is_sound(reports, name):
    checked = Checked()
    text = reports[name].read_text(encoding="utf-8")
    checked.feed(text)
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    links = set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) | set(
        re.findall(r'aria-labelledby="(\S+) (\S+)"', text)
    )
    assert {each for link in links for each in ((link,) if isinstance(link, str) else link)} <= set(checked.ids)


def test_a_page_is_the_same_when_it_is_made_again(reports, tmp_path):
    again = page([reports["one"].with_name("usual.json")], tmp_path / "again.html")
    assert again == reports["one"].read_text(encoding="utf-8")


def test_plots_follow_from_the_rows():
    names = [plot.name for plot in plots(document([row("a", f"k{i}", "gbps", [i + 1] * 3) for i in range(MOST + 4)]))]
    assert names == ["cpu-gbps"]
    (plot,) = plots(document([row("a", f"k{i}", "gbps", [i + 1] * 3) for i in range(MOST + 4)]))
    assert (plot.kind, len(plot.series["a"])) == ("bars", MOST)
    assert plot.note == f"The first {MOST} of {MOST + 4} rows; the table has all of them."
    rows = [each for n in (64, 128) for b in (1, 4) for each in
            measured("a", f"pp{n} x{b}", ttft_s=n * b / 1000, tokens=n, depth=0, batch=b)[0]]  # fmt: skip
    found = plots(document(rows))
    assert [plot.title for plot in found] == [f"Time to the first token by prompt length{b}" for b in ("", ", batch 4")]
    assert [point.value for point in found[1].series["a"]] == [256, 512], "in ms"
    rows = [each for n in (16, 64) for each in measured("a", f"tg{n}", decode_tps=50, tokens=n, depth=0)[0]]
    assert [plot.title for plot in plots(document(rows))] == ["Decoding speed by answer length"]
    rows = measured("a", "tg8", decode_tps=50, tokens=8, depth=0)[0]
    assert [(plot.kind, plot.title) for plot in plots(document(rows))] == [("bars", "Decoding speed")]


def test_ratios_are_turned_so_that_above_1_is_better():
    (plot,) = (plot for plot in plots(realistic()) if plot.kind == "ratios" and plot.name != "published")
    found = {point.group: point for point in plot.series[ARMS[1]]}
    assert found["pp512 TTFT"].value == pytest.approx(1.9)
    assert found["pp512 TTFT"].low < 1.9 < found["pp512 TTFT"].high
    assert found["tg64 @ d0 speed"].value == pytest.approx(0.995)
    assert "pp512 speed" not in found, "the time to the first token says it"


def test_pictures_are_written_and_other_files_are_not_replaced(tmp_path):
    source = write(tmp_path / "r.json", document(*measured("a", "pp8", ttft_s=1)))
    out, _ = mlxeff("bench", "page", source, "--png", tmp_path / "png", "--json")
    found = json.loads(out)
    assert found["out"] == str(tmp_path / "r.html")
    assert len(found["png"]) == len(found["plots"]) == 2
    for path in (tmp_path / "png").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    again, _ = mlxeff("bench", "page", source, "--png", tmp_path / "png", cwd=tmp_path)
    assert again.splitlines() == [found["out"], *found["png"]]
    assert not list(tmp_path.glob(".*")), "no temporary file is left"
    (tmp_path / "r.html").write_text("mine")
    assert "wanted a new file, or one that mlxeff bench page wrote" in fails("bench", "page", source)
    assert (tmp_path / "r.html").read_text() == "mine"
    first = tmp_path / "png" / "cpu-ttft-s.png"
    first.write_bytes(b"mine")
    assert f"{first}: wanted a new file" in fails("bench", "page", source, "--out", tmp_path / "x.html", "--png",
                                                  tmp_path / "png")  # fmt: skip
    assert not (tmp_path / "x.html").exists()
    assert "wanted an existing parent folder" in fails("bench", "page", source, "--out", tmp_path / "no" / "x.html")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = write(tmp_path / "r.json", realistic())
    assert cli.main(["bench", "page", str(source)]) == 1
    assert "wanted matplotlib, which is not installed: pip install 'mlxeff[benchmarks]'" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_results_that_cannot_be_compared_stand_in_one_page_all_the_same(tmp_path):
    first = write(tmp_path / "a.json", document(*measured("a", "pp8", ttft_s=1)))
    second = write(tmp_path / "b.json", document(*measured("a", "tg8", decode_tps=1)))
    text = page([first, second], tmp_path / "x.html")
    assert "wanted results with a row in common" in text
    assert text.count("<article") == 2
