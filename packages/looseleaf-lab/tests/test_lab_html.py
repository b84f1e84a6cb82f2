"""The HTML report: complete, safe, and without errors in a browser."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looseleaf import Claim, Report, Series
from looseleaf_lab import html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def example() -> Report:
    report = Report("Attention backends on SmolLM2", facts={"model": "smollm2", "seed": 0, "torch": "2.13", "x": 1 / 3})
    table = report.table("Prefill", ["backend", "context", "speed-up", "perplexity"], note="medians of 5 rounds")
    table.add("dense", 1024, 1.0, 12.5)
    table.add("window", 1024, 1.0, 12.9)
    table.add("a <b>bold</b> & \"quoted\" name", 2048, None, math.nan)
    xs = [512.0, 1024.0, 2048.0, 4096.0]
    report.figure("Speed-up", x_label="tokens", y_label="dense time / time", x_log=True, series=[
        Series("flexprefill", xs, [0.8, 1.1, 1.7, 2.9], [0.7, 1.0, 1.5, 2.4], [0.9, 1.2, 1.9, 3.3]),
        Series("window", xs, [1.0, 1.2, 1.5, 2.0]),
        Series("minference", xs, [0.6, 0.8, 1.2, 1.6], style="line")])
    report.figure("Loss", x_label="sparsity", y_label="perplexity", y_log=True, series=[
        Series("magnitude", [0.1, 0.3, 0.5], [15, 40, 3000], [14, 35, 1500], [16, 44, 9000], style="points"),
        Series("random", [0.1, 0.3, 0.5], [20, 900, math.inf])])
    report.figure("Density by head", x_label="head", y_label="layer",
                  image=[[(i * j % 7) / 7 for j in range(9)] for i in range(30)])
    report.figure("Heads", panels={f"head <{h}>": [[0.0, 10.0 ** -h], [0.5, 0.25]] for h in range(3)})
    report.figure("Nothing", series=[Series("empty", [], [])])
    for holds, text in ((True, "It is faster."), (False, "It loses nothing."), (None, "It scales.")):
        report.claims.append(Claim.decide(holds, statement=text, source="Section 5", paper="2.43x [memory]",
                                          measured="1.7x [1.5, 1.9], 5 seeds", rule="interval above 1"))
    report.strip("What distracts", ["The ", "<b>", "cat", " sat"], [0.1, 0.9, None, -0.5], [False, True, True, False],
                 "a note")
    report.image("Picture <1>", np.linspace(0, 1, 20).reshape(4, 5), "a note & more")
    report.image("Both", [np.zeros((2, 3, 3), np.uint8), np.ones((30, 20))], captions=["before", "<after>"])
    report.examples.append(("prompt found", "Classify </script><script>alert(1)</script> the text"))
    return report


def test_page_is_self_contained_and_escaped() -> None:
    text = html.page([example()])
    assert "</script><script>alert" not in text and "<b>bold</b>" not in text
    for word in ("http://", "https://", "url(http", "@import"):
        assert word not in text, word
    assert text.count(" src=") == text.count(' src="data:image/png;base64,') == 6
    assert text.count("<svg class=\"plot\"") == 3
    assert "nan" in text and "There is nothing to draw" in text


def test_panels_are_pictures_on_one_scale() -> None:
    import base64
    import struct
    import zlib

    from looseleaf import Figure

    made = html.figure(Figure("x", panels={"a": [[0.0, 1.0], [0.1, 0.01]], "b": [[0.1]], "c": [[math.nan]]}))
    pictures = [base64.b64decode(part.split('"')[0]) for part in made.split("base64,")[1:]]
    assert len(pictures) == 3 and "head" not in made and "empty: exactly zero" in made
    cells = []
    for picture in pictures:
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        wide, high = struct.unpack(">II", picture[16:24])
        at = picture.index(b"IDAT")
        lines = zlib.decompress(picture[at + 4:at + 4 + struct.unpack(">I", picture[at - 4:at])[0]])
        cells.append([[lines[r * (4 * wide + 1) + 1 + 4 * c:][:4] for c in range(wide)] for r in range(high)])
    assert cells[0][0][0] == bytes(4) == cells[2][0][0], "nothing there, nothing drawn"
    assert cells[0][1][0] == cells[1][0][0] == bytes.fromhex(html._colour(0.5)[1:]) + b"\xff"
    assert cells[0][0][1][:3].hex() == html._colour(1.0)[1:] and cells[0][1][1][:3].hex() == html._colour(0.0)[1:]
    assert "nothing to draw" in html.figure(Figure("x", panels={"a": [[0.0]]}))


def test_images_are_drawn_with_captions_and_sizes() -> None:
    report = example()
    text = html.page([report])
    for images in report.images:
        assert all(f'src="data:image/png;base64,{data}"' in text for data in images.pngs)
    for part in ("<figcaption>Picture &lt;1&gt;</figcaption>", 'width="5" height="4"', 'width="20" height="30"',
                 'alt="Picture &lt;1&gt;"', 'alt="before"', "<span>&lt;after&gt;</span>", "a note &amp; more"):
        assert part in text, part
    assert text.count('<figure class="wide">') == 2, "the panels, and the images side by side"


def test_tokens_are_shaded_and_marked() -> None:
    made = html.page([example()])
    assert '<del style="background:#' in made and ' title="0.9, marked">&lt;b&gt;</del>' in made
    assert '<del title="not scored, marked">cat</del>' in made and "a note" in made
    flat = Report("flat")
    flat.strip("one value", ["a", "b"], [2.0, 2.0], [False, False])
    flat.strip("none", ["a"], [None], [False])
    assert html.page([flat]).count("<span") >= 3


def test_several_reports_get_contents(tmp_path: Path) -> None:
    html.write([example(), example()], tmp_path / "r.html", title="Two")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'href="#r1"' in text and "<h1>Two</h1>" in text
    ids = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_no_report_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one or more, got none"):
        html.page([])


def test_ticks_are_round_and_inside() -> None:
    for low, high in ((0.0, 1.0), (0.13, 0.17), (-5.0, 4000.0), (3.0, 3.0)):
        axis = html._Axis([low, high], 0, 100, False)
        assert 2 <= len(axis.ticks) <= 9
        assert all(axis.low - 1e-9 <= t <= axis.high + 1e-9 for t in axis.ticks)
    for low, high in ((1.0, 1e6), (0.5, 0.6), (512.0, 4096.0), (7.0, 7.0)):
        axis = html._Axis([low, high], 0, 100, True)
        assert 1 <= len(axis.ticks) <= 9, (low, high, axis.ticks)


def test_figures_with_nothing_finite_or_one_point() -> None:
    from looseleaf import Figure

    assert "nothing to draw" in html.figure(Figure("x", series=[Series("a", [1], [math.nan])]))
    assert "<circle" in html.figure(Figure("x", series=[Series("a", [1], [2], style="line")]))
    assert "nothing to draw" in html.figure(Figure("x", image=[[math.nan]]))
    assert "<rect" in html.figure(Figure("x", image=[[1.0]]))
    assert "<circle" in html.figure(Figure("x", series=[Series("a", [0, 1], [0, 5])], y_log=True, x_log=True))


@pytest.fixture(scope="module")
def browser() -> Any:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with sync.sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=[
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"])
        yield started
        started.close()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_renders_without_console_errors_or_requests(browser: Any, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "report.html"
    html.write([example()], path)
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text))
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("request", lambda r: problems.append(r.url) if r.url.startswith("http") else None)
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    names = "() => Array.from(document.querySelectorAll('tbody')[0].rows).map(r => r.cells[2].textContent)"
    button = page.locator("thead button", has_text="speed-up")
    button.click()
    assert page.evaluate(names)[-1] == "–"
    button.click()
    assert page.evaluate(names)[-1] == "–"
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    page.locator("#theme").click()
    wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0, "the page must not scroll sideways"
    page.set_viewport_size({"width": 380, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    page.set_viewport_size({"width": 1200, "height": 900})
    shot = tmp_path / f"{scheme}.png"
    page.screenshot(path=shot, full_page=True)
    assert shot.stat().st_size > 20_000
    assert not problems
    page.close()
