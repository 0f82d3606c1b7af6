"""The report's page in a real browser: headless Chromium, driven by playwright (`make test-report` installs both)."""

import shutil

import pytest
from models import plain, tokens

import wush_compile as wc
from wush_compile.reporting.contents import Contents, GroupFacts
from wush_compile.reporting.page import render

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make test-report")
pytest.importorskip("matplotlib", reason="a report's charts need matplotlib: pip install 'wush-compile[report]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: make test-report installs Debian's")
WIDTHS = (390, 1440)
EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        # In a container Chromium cannot start its sandbox as root. The pages are our own.
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Addresses of pages on disk: one report, two side by side, one whose names hold markup."""
    folder = tmp_path_factory.mktemp("pages")
    models = [
        wc.quantize(plain("llama"), [tokens(2, 16)], progress=False, solver="rtn", format=format)
        for format in ("mxfp4", "nvfp4")
    ]
    evil = Contents(EVIL, groups=[GroupFacts(f"layers.0.{EVIL}", relative_loss=0.1, notes=EVIL, members=[EVIL] * 2)])
    evil.skipped = {EVIL: [EVIL]}
    html = {
        "one": wc.report(models[0]),
        "two": wc.report(*models, graphs=False),
        "evil": render([evil], [EVIL]),
    }
    for name, text in html.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in html}


@pytest.fixture(params=WIDTHS)
def opened(request, browser, pages):
    """opened(name) -> a page. At the end: no request, no error, nothing in the console."""
    context = browser.new_context(viewport={"width": request.param, "height": 900}, color_scheme="light")
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith("data:") else requests.append(r.url))
    requests: list[str] = []

    def open_page(name: str):
        page.goto(pages[name])
        return page

    yield open_page
    assert faults == [] and len(requests) == 1  # the page itself
    context.close()


def first_column(page) -> list[str]:
    return page.eval_on_selector_all(
        "table.groups tbody", "bodies => bodies.filter(b => !b.hidden).map(b => b.rows[0].cells[0].textContent.trim())"
    )


@pytest.mark.parametrize("name", ["one", "two", "evil"])
def test_nothing_is_wider_than_the_screen(opened, name):
    page = opened(name)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_sorting_and_searching(opened):
    page = opened("one")
    before = first_column(page)
    page.get_by_role("button", name="group", exact=True).focus()
    page.keyboard.press("Enter")
    assert first_column(page) == sorted(before, reverse=True)
    page.keyboard.press("Enter")
    assert first_column(page) == sorted(before)
    page.get_by_role("button", name="KiB").click()
    sizes = page.eval_on_selector_all("tbody tr:first-child td:last-child", "cells => cells.map(c => +c.dataset.value)")
    assert sizes == sorted(sizes, reverse=True)
    page.get_by_label("Search").fill("layers.1 down")
    assert first_column(page) == ["model.layers.1.mlp.down_proj"]
    assert page.locator("#shown").text_content() == f"1 of {len(before)} groups"


def test_a_group_opens_by_keyboard(opened):
    page = opened("one")
    summary = page.locator("td.more summary").first
    figure = page.locator("td.more figure").first
    assert not figure.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert figure.is_visible()


def test_the_theme_changes(opened):
    page = opened("two")
    grounds = []
    for _ in range(3):
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.get_by_role("button", name="Light or dark").click()
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 28)", "rgb(255, 255, 255)"]
    page.emulate_media(color_scheme="dark", media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_two_reports_stand_side_by_side(opened):
    page = opened("two")
    assert page.get_by_role("heading", name="A: LlamaForCausalLM").is_visible()
    assert page.get_by_role("button", name="B over A").is_visible()


def test_markup_in_names_is_shown_as_text(opened):
    page = opened("evil")
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.get_by_role("heading", level=1).text_content() == f"{EVIL}: {EVIL}"
