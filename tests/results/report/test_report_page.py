"""A report's page in a real browser: it works without network, answers to the mouse, and names are only text."""

import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import pytest
from conftest import golden_options

from sinkbench.cli import main
from sinkbench.results.report.page import inert
from sinkbench.results.report.writing import write_report

CHROMIUM = shutil.which("chromium")
QUIET = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-quic"
)
HOSTILE = (
    "<script>window.owned = 1</script>",
    '"><img src=x onerror="window.owned = 1">',
    "</script><script>window.owned = 1</script>",
    '<a href="javascript:window.owned=1">press</a>',
    "<b>bold</b> &lt;i&gt; %{x} {{ 7 * 7 }} `tick` | pipe",
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield found
        found.close()


@pytest.fixture
def opened(browser):
    """Opens a file in a page of a given width; fails where it asked for anything else or complained."""
    requests, complaints, pages = [], [], []

    def call(path, width=1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(Path(path).as_uri())
        count = page.locator(".plot").count()
        page.wait_for_function(f"document.querySelectorAll('.plot .main-svg .xtick').length >= {count}")
        pages.append(page)
        return page

    yield call
    for page in pages:
        page.close()
    assert {urlsplit(url).scheme for url in requests} <= {"file", "data", "blob"}
    assert len([url for url in requests if url.startswith("file")]) == len(pages)
    assert complaints == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real runs of a tiny model."""
    place = tmp_path_factory.mktemp("runs") / "llama"
    for experiment in ("transformers", "windowed", "attention_sinks"):
        main(["run", "--experiment", experiment, *golden_options("llama"), "--output-dir", str(place)])
    return place


@pytest.fixture(scope="module")
def page_file(folder):
    return next(path for path in write_report([folder]) if path.suffix == ".html")


def tables(page):
    """The texts of all tables: rows of cells."""
    return page.eval_on_selector_all(
        "table",
        "found => found.map(t => [...t.rows].map(r => [...r.cells].map(c => c.innerText.replace(/\\s/g, ' '))))",
    )


def plot(page, heading):
    return page.locator("figure", has=page.get_by_role("heading", name=heading, exact=True)).locator(".plot")


def place_of(found, run, index):
    """Where on the screen the point ``index`` of ``run`` lies, and its token and value."""
    found.scroll_into_view_if_needed()
    return found.evaluate(
        """(plot, [run, index]) => {
            const trace = plot._fullData.find(t => t.name === run);
            const i = index < 0 ? trace._length + index : index;
            const { xaxis, yaxis, _size } = plot._fullLayout, box = plot.getBoundingClientRect();
            const x = trace.x[i], y = trace.y[i];
            return [box.x + _size.l + xaxis.d2p(x), box.y + _size.t + yaxis.d2p(y), x, y];
        }""",
        [run, index],
    )


def ranges(found):
    return found.evaluate("plot => [...plot._fullLayout.xaxis.range, ...plot._fullLayout.yaxis.range]")


@pytest.mark.heavy
def test_the_page_says_what_it_is_and_its_tables_hold_the_numbers_of_the_csv(opened, page_file, folder):
    page = opened(page_file)
    assert page.title() == f"{folder} – sinkbench report"
    assert page.locator("h1").inner_text() == str(folder)
    heading, *rows = tables(page)[0]
    assert heading[0] == "Run"
    assert [row[0] for row in rows] == ["transformers", "windowed", "attention_sinks"]
    for row in rows:
        shown = dict(zip(heading, row))
        frame = pd.read_csv(folder / f"{row[0]}.csv")
        assert shown["Tokens"] == f"{len(frame)}"
        assert shown["Perplexity [95 %]"].startswith(f"{frame['overall_ppl'].iloc[-1]:,.3f} [")
        assert float(shown["Latency, median (ms)"]) == pytest.approx(1e3 * frame["latency"].median(), abs=6e-4)
        assert float(shown["Latency, p99 (ms)"]) == pytest.approx(1e3 * frame["latency"].quantile(0.99), abs=6e-4)
        assert f"{frame['kv_cache_bytes'].max():,} bytes" in shown["Peak KV cache (MiB)"]
    text = page.locator("main").inner_text()
    record = json.loads((folder / "windowed.json").read_text())
    assert record["dataset"]["sha256"] in text
    assert record["versions"]["torch"] in text


@pytest.mark.heavy
def test_numbers_are_aligned_on_the_right(opened, page_file):
    page = opened(page_file)
    assert page.locator("td.number").first.evaluate("cell => getComputedStyle(cell).textAlign") == "right"


@pytest.mark.heavy
def test_hovering_shows_token_value_and_run(opened, page_file, folder):
    page = opened(page_file)
    found = plot(page, "Perplexity")
    frame = pd.read_csv(folder / "windowed.csv")
    x, y, token, value = place_of(found, "windowed", -40)
    assert value == pytest.approx(math.log(frame.set_index("input_length")["overall_ppl"][token]), rel=1e-6)
    page.mouse.move(x, y)
    label = page.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert label.text_content() == f"windowed{value:.5g} log perplexity (nats)after {token} tokens"


@pytest.mark.heavy
def test_dragging_zooms_and_a_double_click_resets(opened, page_file):
    page = opened(page_file)
    found = plot(page, "KV cache")
    before = ranges(found)
    x, y, *_ = place_of(found, "transformers", 150)
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    page.mouse.move(x + 60, y + 60, steps=5)
    page.mouse.up()
    left, right, *_ = after = ranges(found)
    assert before[0] < left < right < before[1]
    assert after[2] > before[2]
    page.mouse.dblclick(x, y)
    page.wait_for_function("plot => plot._fullLayout.xaxis.range[0] === 0", arg=found.element_handle())
    assert ranges(found) == pytest.approx(before)


@pytest.mark.heavy
def test_a_click_on_a_name_hides_the_run(opened, page_file):
    page = opened(page_file)
    found = plot(page, "Perplexity")
    found.scroll_into_view_if_needed()
    lines = found.locator(".scatterlayer .trace")
    assert lines.count() == 3
    found.locator(".legendtoggle").first.click()
    page.wait_for_function(
        "n => document.querySelector('.plot').querySelectorAll('.scatterlayer .trace').length === n", arg=2
    )


@pytest.mark.heavy
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_window(opened, page_file, width):
    page = opened(page_file, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for box in (found.bounding_box() for found in page.locator(".plot .main-svg").all()):
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


@pytest.fixture(scope="module")
def hostile_file(folder, tmp_path_factory):
    """Results whose every name tries to be more than text; a file or folder cannot be called by a slash."""
    place = tmp_path_factory.mktemp("hostile") / HOSTILE[1] / HOSTILE[4].replace("/", " ")
    place.mkdir(parents=True)
    names = [name.replace("/", " ") for name in HOSTILE]
    for name, hostile in zip(names, HOSTILE):
        shutil.copy(folder / "windowed.csv", place / f"{name}.csv")
        record = json.loads((folder / "windowed.json").read_text())
        record["experiment"] = hostile
        record["model"] |= {"name": hostile, "revision": hostile}
        record["dataset"]["name"] = hostile
        record["device"] = hostile
        record["versions"]["torch"] = hostile
        record["exit_reason"] = hostile
        record["text"] = hostile + "\n```\n" + hostile
        record["command"] = ["sinkbench", "run", "--model-name-or-path", hostile]
        (place / f"{name}.json").write_text(json.dumps(record))
    return next(path for path in write_report([place], place.parent / "page.html") if path.suffix == ".html")


@pytest.mark.heavy
def test_names_are_text_and_nothing_else(opened, hostile_file):
    page = opened(hostile_file)
    assert page.evaluate("window.owned") is None
    assert page.locator("img, iframe, object, embed, form, b, i").count() == 0
    assert page.locator("a:not([href^='#'])").count() == page.locator("a.modebar-btn").count()
    plots = page.locator(".plot").count()
    assert page.locator("script").count() == 2 + plots
    assert page.locator("script:not([type])").count() == 2
    text = page.locator("body").inner_text()
    for hostile in HOSTILE:
        assert text.count(hostile) >= 4
    assert "49" not in page.title()


@pytest.mark.heavy
def test_names_are_text_in_figures_too(opened, hostile_file):
    page = opened(hostile_file)
    found = plot(page, "Perplexity")
    found.scroll_into_view_if_needed()
    names = [name.replace("/", " ") for name in HOSTILE]
    shown = found.locator(".legendtext").all()
    assert sorted(label.text_content() for label in shown) == sorted(names)
    x, y, *_ = place_of(found, found.evaluate("plot => plot._fullData.at(-1).name"), 100)
    page.mouse.move(x, y)
    label = page.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert any(label.text_content().startswith(name) for name in names)
    assert page.locator(".plot a:not(.modebar-btn), .plot b, .plot tspan[style*='bold']").count() == 0
    assert page.evaluate("window.owned") is None


@pytest.fixture
def visits():
    """A server at an address of this machine: its port, and the paths it was asked for."""
    paths = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(204)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, paths
        server.shutdown()


@pytest.mark.heavy
def test_markup_that_came_in_all_the_same_could_do_nothing(browser, page_file, visits):
    """With the escaping out of the way, the page's policy allows no script, no handler and no request."""
    port, paths = visits
    address = f"http://127.0.0.1:{port}"
    breach = f'<script>window.owned = 1</script><img src="{address}/image" onerror="window.owned = 1">'
    source = page_file.read_text()
    assert source.count("<main>") == 1
    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', source)[0]
    for name, page_source in (("with", source), ("without", source.replace(policy, ""))):
        breached = page_file.with_name(f"{name}.html")
        breached.write_text(page_source.replace("<main>", f"<main>{breach}"))
        page = browser.new_page()
        page.goto(breached.as_uri())
        page.wait_for_selector(".plot .main-svg")
        fetched = page.evaluate(f"fetch('{address}/fetch').then(() => 'fetched', error => error.name)")
        owned = page.evaluate("window.owned")
        page.close()
        if name == "with":
            assert (fetched, owned, paths) == ("TypeError", None, [])
    assert (fetched, owned, sorted(paths)) == ("fetched", 1, ["/fetch", "/image"])  # the attempt itself is real


def test_json_cannot_close_its_script():
    text = json.dumps({"name": "</script><!-- <script> & \u2028"}, ensure_ascii=False)
    assert not set(inert(text)) & set("<>&\u2028")
    assert json.loads(inert(text)) == json.loads(text)


def test_the_page_loads_nothing_by_its_source(page_file):
    source = page_file.read_text()
    own = re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)=\"?(?!#)|url\(|@import|https?:", own)


@pytest.fixture
def diverging(folder, tmp_path):
    """The runs, as if one had a reference that it hardly leaves, one that it leaves, and one that it never leaves."""
    place = tmp_path / "diverging"
    shutil.copytree(folder, place)
    for name, kl in (("transformers", 0.0), ("windowed", 3e-1), ("attention_sinks", 1e-4)):
        rows = pd.read_csv(place / f"{name}.csv")
        rows.assign(kl=kl * (1 + rows.index / len(rows)), same_top=1, reference_nll=rows.nll).to_csv(
            place / f"{name}.csv", index=False
        )
    return place


@pytest.mark.heavy
@pytest.mark.parametrize("width", [390, 1280])
def test_divergence_is_drawn_over_decades_and_its_axis_says_what_it_is(opened, diverging, width):
    page = opened(next(path for path in write_report([diverging]) if path.suffix == ".html"), width)
    found = plot(page, "Divergence from the reference")
    title, figure = found.locator(".ytitle").bounding_box(), found.bounding_box()
    assert figure["y"] <= title["y"] and title["y"] + title["height"] <= figure["y"] + figure["height"]
    assert found.locator(".ytitle").text_content() == "KL to the reference (nats)"
    names = found.evaluate("plot => plot._fullData.map(trace => trace.name)")
    assert names == ["windowed", "attention_sinks"]
    caption = page.locator("figcaption", has_text="Divergence from the reference").inner_text()
    assert caption.endswith("lower is better. Too small to be drawn: transformers.")
    low, high = ranges(found)[2:]
    assert low < -4 < math.log10(0.6) < high
    assert not any("µ" in tick for tick in found.locator(".ytick").all_text_contents())
