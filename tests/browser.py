"""The interactive pages in a real Chromium: no console error, no request that leaves the folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAGES = Path(__file__).resolve().parent.parent / "docs" / "interactive"
CHROMIUM = os.environ.get("LORA_CORE_CHROMIUM", "/usr/bin/chromium")
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1200, "height": 900}


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, name: str, address: str = "", **context: Any) -> Iterator[Any]:
    """A page of docs/interactive, which must do without errors and without a network."""
    wrong: list[str] = []
    page = browser.new_context(**{"viewport": DESK, **context}).new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    local = ("file:", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else wrong.append(request.url))
    page.goto(f"{(PAGES / name).as_uri()}{address}")
    yield page
    page.context.close()
    assert not wrong, wrong


def set_to(page: Any, control: str, value: Any) -> None:
    """Give a control a value as a reader's hand would: by choosing, clicking or dragging."""
    handle = page.locator(f"#{control}")
    kind = handle.evaluate("c => c.tagName === 'SELECT' ? 'select' : c.type")
    if kind == "select":
        handle.select_option(str(value))
    elif kind == "checkbox":
        handle.set_checked(bool(value))
    else:
        handle.fill(str(value))


def overflow(page: Any) -> int:
    """Pixels that the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def cut_texts(page: Any) -> list[str]:
    """Texts of the pictures that do not lie in them whole."""
    return page.evaluate(
        """[...document.querySelectorAll("svg text")].filter((text) => {
            const box = text.getBBox(), { width, height } = text.ownerSVGElement.viewBox.baseVal;
            return box.x < 0 || box.y < 0 || box.x + box.width > width || box.y + box.height > height;
        }).map((text) => text.textContent)"""
    )


def check_page(browser: Any, name: str, control: str) -> None:
    """What all pages promise: phones, themes, keys, and an address that brings the settings back."""
    with opened(browser, name, viewport=PHONE) as page:
        assert overflow(page) == 0
        assert not cut_texts(page)
    for scheme in ("light", "dark"):
        with opened(browser, name, color_scheme=scheme) as page:
            assert page.evaluate("document.documentElement.dataset.theme") == scheme
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            page.click("#theme")
            assert page.evaluate("document.documentElement.dataset.theme") != scheme
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    with opened(browser, name) as page:
        page.wait_for_function("spoken.textContent.length > 20")
        said = page.inner_text("#spoken")
        before = page.input_value(f"#{control}")
        page.focus(f"#{control}")
        page.keyboard.press("ArrowRight")
        after = page.input_value(f"#{control}")
        assert float(after) > float(before)
        # to those who hear the page a sentence is said, once the control has come to rest, and no region of numbers
        assert page.inner_text("#spoken") == said
        page.wait_for_function("said => spoken.textContent !== said", arg=said)
        assert page.locator("[aria-live]").count() == 0
        address = page.evaluate("location.hash")
        # every control has a name for those who hear the page
        controls = "[...document.querySelectorAll('.controls [id]:not([hidden]):not(output):not(button)')]"
        assert page.evaluate(f"{controls}.every(c => !c.labels || c.labels.length > 0)")
    with opened(browser, name, address) as page:
        assert page.input_value(f"#{control}") == after
    with opened(browser, name, "#nothing=1&" + control + "=nonsense") as page:
        assert page.input_value(f"#{control}")
