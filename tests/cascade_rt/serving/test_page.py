"""The page at /, in a real browser: Debian's Chromium, driven by Playwright; skipped where they are not installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cascade_rt import CascadeRuntime

from ...toy import LABELS

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that fails the test if anything is written to its console, or asked of another host."""
    found = browser.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    found.on("console", lambda message: complaints.append(message.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("request", lambda request: asked.append(request.url))
    yield found
    found.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "blob:", "data:"))] == []


def test_a_text_and_its_members(page: Any, address: str, bundle: Path) -> None:
    runtime = CascadeRuntime(bundle, threads=1)
    page.goto(f"http://{address}/")
    playwright.expect(page.locator("#bundle")).to_contain_text("tiny: 1 layers → small: 2 layers → big: 4 layers")
    for text in ("the film was good", "she is not very happy with it", "a cat sat on the mat"):
        (expected,) = runtime.predict([text])
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_label("Text", exact=True).press("Enter")
        name = ("tiny", "small", "big")[expected.exit]
        playwright.expect(page.locator(".member.left")).to_contain_text(name)
        answer = f"{expected.label}, {100 * expected.score:.1f}%: {expected.layers} layers executed"
        playwright.expect(page.locator("#answer")).to_contain_text(answer)
        assert page.locator(".member").count() == expected.exit + 1
        assert page.locator(".member.left .bar").count() == len(LABELS)
    playwright.expect(page.locator("#took")).to_contain_text("ms")
    playwright.expect(page.locator("#strip")).to_contain_text("texts per second")


def test_the_slider_answers_the_examples_again(page: Any, address: str, bundle: Path) -> None:
    page.goto(f"http://{address}/")
    texts = ["the film was good", "she is not very happy with it"]
    for text in texts:
        page.get_by_label("Text", exact=True).fill(text)
        page.get_by_role("button", name="Classify").click()
        playwright.expect(page.locator("#again")).to_contain_text(text)
    slider = page.get_by_label("Confidence that a text needs to leave")
    for value, member in (("1", "big"), ("0.3", "tiny")):
        slider.fill(value)
        for row in range(2):
            playwright.expect(page.locator("#again tr").nth(row).locator("td").nth(2)).to_have_text(member)
    slider.press("ArrowRight")
    playwright.expect(page.locator("#threshold-value")).to_have_text("0.31")


def test_a_table_comes_back_answered(page: Any, address: str, bundle: Path) -> None:
    texts = ["the film", 'a "great" film, not bad', "two\nlines"]
    page.goto(f"http://{address}/")
    playwright.expect(page.locator("#bundle")).not_to_be_empty()
    playwright.expect(page.get_by_label("Second column")).to_be_hidden()
    rows = ["id,text", "7,the film", '8,"a ""great"" film, not bad"', '9,"two\nlines"']
    page.get_by_label("CSV with a header").fill("\n".join(rows))
    page.get_by_role("button", name="Answer").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download answers.csv").click()
    written = Path(download.value.path()).read_bytes().decode()
    found = CascadeRuntime(bundle, threads=1).predict(texts)
    assert written.startswith("id,text,label,score,exit,layers\r\n7,the film,")
    assert f'8,"a ""great"" film, not bad",{found[1].label},' in written
    assert written.endswith(f",{found[2].exit},{found[2].layers}\r\n")
    page.get_by_label("Column of the text").fill("body")
    page.get_by_role("button", name="Answer").click()
    playwright.expect(page.get_by_role("alert")).to_have_text("found the columns id, text, expected body")


def test_another_bundle_takes_pairs(page: Any, address: str) -> None:
    page.goto(f"http://{address}/")
    page.get_by_label("Bundle").select_option("pairs")
    playwright.expect(page.get_by_label("Second column")).to_be_visible()
    page.get_by_label("Text", exact=True).fill("the film is good")
    page.get_by_label("Second text").fill("the film is bad")
    page.get_by_role("button", name="Classify").click()
    playwright.expect(page.locator("#answer")).to_contain_text("answered here")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(page: Any, address: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_core_python.sync_playwright")
    page.emulate_media(color_scheme=scheme)
    page.goto(f"http://{address}/")
    page.get_by_label("Text", exact=True).fill("the film was good")
    page.get_by_role("button", name="Classify").click()
    playwright.expect(page.locator("#answer")).to_contain_text("answered here")
    playwright.expect(page.locator("#strip")).to_contain_text("left at")
    found = axe.Axe().run(page)
    assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found["violations"]] == []


def test_a_token_is_asked_for(browser: Any, served: Callable[..., httpx.Client]) -> None:
    """Without the fixture: Chromium itself writes a line to the console for every 401."""
    page = browser.new_page()
    page.goto(str(served(token="secret").base_url))
    field = page.get_by_label("This server asks for a bearer token")
    playwright.expect(field).to_be_visible()
    field.fill("secret")
    playwright.expect(page.locator("#bundle")).to_contain_text("tiny")
    page.close()
