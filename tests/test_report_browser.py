"""Claims about the report and the page of networks in a real browser: no errors, nothing fetched, nothing too wide.

Needs Chromium or Chrome among the system's packages (`apt-get install chromium`) and playwright to drive it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from figures_as_data import drawn
from report_material import HOSTILE, write_material

from fbn_prune.export.report.browser import write_browser
from fbn_prune.export.report.facts import read_facts
from fbn_prune.export.report.page import write_report
from fbn_prune.export.report.text import visible
from fbn_prune.networks.functional_networks import FunctionalNetworks

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {1280: 900, 390: 844}

OVERLAPPING_TEXT = """() => [...document.querySelectorAll('.drawing svg')].flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const frame = svg.getBoundingClientRect();
  const bad = texts.filter(([, b]) => b.left < frame.left - 1 || b.right > frame.right + 1);
  for (let i = 0; i < texts.length; i++) for (let j = 0; j < i; j++) {
    const [s, a] = texts[i], [t, b] = texts[j];
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 1.5 && y > 0.35 * Math.min(a.height, b.height)) bad.push([s, t]);
  }
  return bad.map(String);
})"""


BEYOND_THE_SCREEN = """width => [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide')
  && !e.closest('svg') && e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module", autouse=True)
def figures_are_drawn() -> Iterator[None]:
    with drawn():
        yield


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as driver:
        # Its sandbox needs rights that containers and root do not give; the page is our own.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    beside = write_material(folder)
    write_report(read_facts(folder / "out", **beside), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module", params=SIZES)
def opened(request: pytest.FixtureRequest, chromium: Any, page_file: Path) -> Iterator[Any]:
    """The page at one size, and what the browser said and asked for while it loaded."""
    width = request.param
    page = chromium.new_page(viewport={"width": width, "height": SIZES[width]})
    page.said, page.fetched = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda wanted: page.fetched.append(wanted.url))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield page
    page.close()


def test_the_browser_complains_of_nothing_and_fetches_nothing_else(
    opened: Any, page_file: Path
) -> None:
    assert opened.said == []
    assert opened.fetched == [page_file.as_uri()]


def test_nothing_is_wider_than_the_screen(opened: Any) -> None:
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    beyond = opened.evaluate(BEYOND_THE_SCREEN, width)
    assert beyond == []


def test_every_figure_is_drawn_with_words_that_do_not_collide(opened: Any) -> None:
    boxes = opened.evaluate(
        "[...document.querySelectorAll('.drawing svg')].map(s => s.getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == 9
    assert all(box["width"] > 300 and box["height"] > 100 for box in boxes)
    assert opened.evaluate(OVERLAPPING_TEXT) == []


def test_hostile_text_is_read_and_not_obeyed(opened: Any) -> None:
    assert opened.title() == "made-up: functional networks"
    assert opened.evaluate("document.scripts.length + document.images.length") == 0
    marks = opened.evaluate("[...document.querySelectorAll('mark')].map(m => m.textContent)")
    assert {visible(text) for text in HOSTILE} <= set(marks)


def test_the_screenshot_shows_the_page(opened: Any, tmp_path: Path) -> None:
    from PIL import Image

    width = opened.viewport_size["width"]
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert picture.width == width
    assert picture.height > 2000
    pixels = picture.width * picture.height
    share = {colour: count / pixels for count, colour in picture.getcolors(maxcolors=pixels)}
    assert 0.3 < share[255, 255, 255] < 0.95
    assert share[11, 110, 142] > 0.005, "the bars of the figures and cards"
    assert share[255, 224, 138] > 0.0005, "the marks of the top tokens"
    for top in range(0, picture.height - 900, 900):
        strip = picture.crop((0, top, picture.width, top + 900)).getcolors(maxcolors=10**6)
        assert strip is None or len(strip) > 8, f"nothing is shown from {top} px down"


def test_it_prints(chromium: Any, page_file: Path) -> None:
    page = chromium.new_page()
    page.goto(page_file.as_uri())
    printed = page.pdf(format="A4")
    page.close()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000


@pytest.mark.parametrize("width", SIZES)
def test_the_page_of_networks_fits_the_screen_and_finds_a_word(
    width: int, chromium: Any, page_file: Path
) -> None:
    networks = FunctionalNetworks.load(page_file.parent / "out" / "networks.safetensors")
    file = page_file.parent / f"networks-{width}.html"
    write_browser(networks, file)
    page = chromium.new_page(viewport={"width": width, "height": SIZES[width]})
    said: list[str] = []
    fetched: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda wanted: fetched.append(wanted.url))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(BEYOND_THE_SCREEN, width) == []
    shown = page.locator("article:visible")
    assert shown.count() == len(networks.maps)
    page.fill("#words", "no network has this word")
    assert shown.count() == 0
    page.close()
    assert said == []
    assert fetched == [file.as_uri()]
