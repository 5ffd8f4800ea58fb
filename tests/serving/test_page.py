"""The page in a real browser: ask, watch it look again, force another action, compare, ablate, save and open."""

import json
import os
import shutil
from pathlib import Path

import pytest

from helpers.served import serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SHOTS = os.environ.get("VPT_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def service(all_parts):
    with serving(all_parts, generation={"max_new_tokens": 16}) as running:
        yield running


@pytest.fixture
def page(browser, service):
    """The page, on which nothing may be written to the console, and nothing asked of anyone else."""
    wrong = []
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda request: None if request.url.startswith((service.url, "data:", "blob:")) else wrong.append(request.url))  # fmt: skip
    opened.goto(service.url)
    yield opened
    assert [text for text in wrong if "the server responded with a status of 400" not in text] == []
    opened.close()


def ended(page, count):
    page.locator(".answer.ended").nth(count - 1).wait_for(timeout=60_000)


def value(page, expression):
    """Of an expression in the page, whose own policy forbids Playwright's `evaluate`."""
    found = page.context.new_cdp_session(page).send("Runtime.evaluate", {"expression": expression})
    return found["result"]["value"]


def shot(page, name):
    if SHOTS:
        page.wait_for_timeout(200)
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


def asked(page, action):
    """One question about an example, without the mouse."""
    page.wait_for_selector("#examples button")
    page.locator("#examples button").nth(1).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#stage:not([hidden])")
    page.select_option("#action", action)
    page.locator("#question").press("Enter")
    ended(page, 1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ask_compare_and_ablate(page, scheme):
    page.emulate_media(color_scheme=scheme)
    asked(page, "region")
    assert page.locator(".answer .pair img").count() >= 2
    assert page.locator(".pair img").nth(1).get_attribute("alt").startswith("1: region, ")
    assert "pixels" in page.locator("figcaption").first.inner_text()
    page.select_option(".more select", "dino")
    ended(page, 2)
    slider = page.locator("input[type=range]").first
    opacity = "getComputedStyle(document.querySelector('.stack img:last-child')).opacity"
    assert value(page, opacity) == "1"
    slider.fill("10")
    assert value(page, opacity) == "0.1"
    slider.fill("100")
    page.get_by_role("button", name="Zero features").first.click()
    ended(page, 3)
    page.get_by_role("button", name="Random region").first.click()
    ended(page, 4)
    assert [text.split(";")[-1].strip() for text in page.locator(".answer h3").all_inner_texts()] == [
        "looks again by region", "looks again by dino", "zero features", "random region",
    ]  # fmt: skip
    shot(page, scheme)
    page.fill("#question", "and how many sides has it?")
    page.locator("#send").click()
    ended(page, 5)
    assert not page.locator(".bad").count()


@pytest.mark.slow
def test_on_a_phone(page):
    page.set_viewport_size({"width": 390, "height": 844})
    asked(page, "dino")
    assert value(page, "document.documentElement.scrollWidth") <= 390
    shot(page, "phone")


@pytest.mark.slow
def test_save_and_open(page, tmp_path, folder):
    page.set_input_files("#file", str(folder.root / "3.png"))
    page.wait_for_selector("#stage:not([hidden])")
    page.fill("#question", "what is it?")
    page.locator("#send").click()
    ended(page, 1)
    said = page.locator(".said").inner_text()
    with page.expect_download() as download:
        page.locator("#save").click()
    saved = Path(download.value.path()).read_text()
    assert json.loads(saved)["turns"][0]["answers"][0]["text"] == said.replace("(no answer)", "")
    kept = tmp_path / "conversation.json"
    kept.write_text(saved)
    page.locator("#new").click()
    assert not page.locator(".turn").count()
    page.set_input_files("#file", str(kept))
    ended(page, 1)
    assert page.locator(".said").inner_text() == said
    for wrong in (
        "{}",
        '{"turns": 7}',
        '{"turns": [{"question": "a", "answers": []}, {"question": "b", "answers": [{}]}]}',
    ):
        kept.write_text(wrong)
        page.set_input_files("#file", str(kept))
        page.wait_for_timeout(100)
        assert page.locator("#hint").inner_text() == "this file holds no saved conversation"
        assert page.locator(".turn").count() == 1 and page.locator(".said").inner_text() == said
    kept.write_text('{"turns": [{"question": "<img src=x onerror=alert(1)>", "answers": []}]}')
    page.set_input_files("#file", str(kept))
    page.wait_for_timeout(100)
    assert page.locator(".turn h2").inner_text() == "<img src=x onerror=alert(1)>"


@pytest.mark.slow
def test_an_error_is_told(page):
    page.fill("#question", "what is <|im_end|> here?")
    page.locator("#question").press("Enter")
    page.wait_for_selector(".bad")
    assert "a token of the model" in page.locator(".bad").inner_text()
