"""The report in a real browser: headless Chromium, wide and narrow, light and dark, by mouse and by keyboard."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    installed = subprocess.run([str(Path(__file__).parent / "install.sh")], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"no browser: {(installed.stdout + installed.stderr)[-300:]}")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Browser, report_file: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The report's page; the test fails where the browser complained or asked for anything else."""
    options: dict[str, Any] = getattr(request, "param", {"viewport": DESKTOP})
    context = browser.new_context(**options)
    page = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda one: asked.append(one.url[:80]))
    page.goto(report_file.as_uri())
    yield page
    assert complaints == []
    assert [url for url in asked if not url.startswith("data:")] == [report_file.as_uri()]
    context.close()


def visible(page: Page, selector: str) -> int:
    return page.locator(f"{selector}:visible").count()


@pytest.mark.parametrize(
    "opened",
    [{"viewport": DESKTOP}, {"viewport": PHONE, "color_scheme": "dark", "has_touch": True, "is_mobile": True}],
    ids=["desktop", "phone"],
    indirect=True,
)
def test_nothing_hangs_over_the_side_and_text_can_be_told_from_the_page(opened: Page) -> None:
    wide = opened.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    contrast = opened.evaluate("""() => {
        const light = (colour) => {
            const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3)
                .map((v) => v / 255).map((v) => v <= .04 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
        };
        const page = light(getComputedStyle(document.body).backgroundColor);
        return ["p.muted", ".good", ".bad", "tbody th", "a", ".chart text"].map((selector) => {
            const style = getComputedStyle(document.querySelector(`main ${selector}, header ${selector}`));
            const own = light(selector.includes("text") ? style.fill : style.color);
            return [selector, (Math.max(own, page) + .05) / (Math.min(own, page) + .05)];
        });
    }""")
    assert all(ratio >= 4.5 for _, ratio in contrast), contrast
    widths = opened.locator(".panel:visible").evaluate_all("all => all.map((one) => one.clientWidth)")
    assert min(widths) > 120


def test_pictures_are_drawn_and_described(opened: Page) -> None:
    sizes = opened.evaluate("""async () => Promise.all([...document.querySelectorAll("image")].map(async (one) => {
        const picture = new Image();
        picture.src = one.getAttribute("href");
        await picture.decode();
        return picture.naturalWidth;
    }))""")
    assert len(sizes) >= 3
    assert min(sizes) > 100
    for label in opened.locator("svg[role=img]").evaluate_all("all => all.map((one) => one.ariaLabel)"):
        assert label
    assert opened.locator("figure:not(:has(figcaption))").count() == 0
    assert opened.locator("h1").count() == 1


def test_filters_choose_images_shapes_stages_and_lines(opened: Page) -> None:
    every = visible(opened, ".card")
    opened.select_option("#group", "worst")
    assert 0 < visible(opened, ".card") < every
    assert opened.locator("#count").inner_text() == f"{visible(opened, '.card')} of {every} images"
    opened.select_option("#group", "")
    value = opened.locator(".card").first.get_attribute("data-classes")
    assert value
    chosen = value.split()[0]
    opened.select_option("#class", chosen)
    for card in opened.locator(".card:visible").all():
        assert chosen in (card.get_attribute("data-classes") or "").split()
    shown = opened.locator(".panel g[data-class]:visible").evaluate_all("all => all.map((one) => one.dataset.class)")
    assert set(shown) == {chosen}
    lines = opened.locator(".chart [id*='-class-']").evaluate_all(
        "all => all.filter((one) => one.style.display !== 'none').map((one) => one.id)"
    )
    assert all(line.endswith(f"-class-{chosen}") for line in lines)
    opened.select_option("#class", "")
    opened.locator(".stages summary").click()
    before = visible(opened, ".panel[data-step=proposals]")
    opened.get_by_label("proposals", exact=True).uncheck()
    assert before > 0
    assert visible(opened, ".panel[data-step=proposals]") == 0


def test_the_score_is_moved_by_keyboard_and_hides_what_is_below(opened: Page) -> None:
    slider = opened.locator("#score")
    slider.focus()
    opened.keyboard.press("End")
    assert opened.locator("#score-shown").inner_text() == "1.00"
    assert visible(opened, ".panel g[data-score]") == 0
    opened.keyboard.press("Home")
    scores = opened.locator(".panel g[data-score]").count()
    assert visible(opened, ".panel g[data-score]") == scores > 0


def test_a_picture_is_enlarged_and_closed_by_keyboard(opened: Page) -> None:
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.className") == "skip"
    button = opened.locator(".zoom").first
    button.focus()
    opened.keyboard.press("Enter")
    assert opened.locator("#large").is_visible()
    assert opened.locator("#large svg").count() == 1
    assert opened.locator("#large-caption").inner_text()
    opened.keyboard.press("Escape")
    assert not opened.locator("#large").is_visible()
    assert opened.evaluate("document.activeElement.className") == "zoom"
