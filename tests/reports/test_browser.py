"""Does the page work in a real browser: filters, permalinks, dark mode, narrow screens, no network?"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_material import NOT_RUN, REFUTED, make_ledger, make_results
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from test_render import FIGURES

from turboquant_reports.render import render, write

PUBLISHED = Path(__file__).parents[2] / "reports/published/report.html"

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1600",
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    statement = (
        "A long statement with averyveryveryveryveryveryveryveryveryveryveryveryveryverylongword in it."
    )
    ledger = make_ledger(folder / "paper-v1.toml", claims=10, cells=4, statement=statement)
    say = {0: REFUTED, 1: NOT_RUN, 7: REFUTED, 12: NOT_RUN}
    results = make_results(ledger, subjects=["ours-mse", "a-subject-with-a-long-name"], say=say)
    paths = write(render(ledger, results, make_results(ledger), FIGURES[:2]), folder / "out")
    return paths["report.html"].as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.fail(
            "chromium and chromedriver are not on the PATH; install them, or select with -m 'not browser'"
        )
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, address: str) -> webdriver.Chrome:
    """The page, freshly loaded on a wide light screen."""
    screen(browser, 1280, "light")
    browser.get("about:blank")
    browser.get(address)
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    return browser


def screen(browser: webdriver.Chrome, width: int, scheme: str, *, script: bool = True) -> None:
    """Set the screen's width, its colour scheme and whether scripts run."""
    metrics = {"width": width, "height": 1600, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})


def shown(page: webdriver.Chrome, selector: str) -> list[str]:
    """Ids of the visible elements."""
    found = page.find_elements(By.CSS_SELECTOR, selector)
    return [element.get_attribute("id") or "" for element in found if element.is_displayed()]


def status(page: webdriver.Chrome) -> str:
    """What the page says of its filters."""
    return page.find_element(By.ID, "shown").text


def background(page: webdriver.Chrome) -> Any:
    """The page's background colour."""
    return page.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_a_filter_hides_rows_says_how_many_and_is_kept_in_the_url(page: webdriver.Chrome) -> None:
    assert status(page) == "All 10 claims and 60 cells shown, none hidden."
    Select(page.find_element(By.NAME, "verdict")).select_by_visible_text("refuted")
    assert page.current_url.endswith("#verdict=refuted")
    assert shown(page, "tr.claim") == ["paper-v1-claim-0"]
    assert status(page) == "1 of 10 claims shown, 9 hidden; 2 of 60 cells shown, 58 hidden."
    page.find_element(By.ID, "clear").click()
    assert "#" not in page.current_url
    assert len(shown(page, "tr.claim")) == 10


@pytest.mark.parametrize(
    ("fragment", "claims"),
    [
        ("verdict=unexpected", ["paper-v1-claim-0"]),
        ("execution=not+run", ["paper-v1-claim-0", "paper-v1-claim-2"]),
        ("source=paper-v1&text=point+7", ["paper-v1-claim-7"]),
        ("subject=ours-mse&verdict=refuted", ["paper-v1-claim-0"]),
        ("text=%3Cb%3E", []),
    ],
)
def test_a_url_with_filters_shows_their_rows(
    page: webdriver.Chrome, fragment: str, claims: list[str]
) -> None:
    page.get(page.current_url.split("#")[0] + "#" + fragment)
    page.refresh()
    assert shown(page, "tr.claim") == claims
    assert f"{len(claims)} of 10 claims shown" in status(page)


def test_a_permalink_opens_its_cell_even_from_behind_a_filter(page: webdriver.Chrome) -> None:
    cell = "paper-v1-claim-2/bits-3.dim-128@ours-mse"
    waiting = WebDriverWait(page, 5)
    page.execute_script("location.hash = 'verdict=refuted'")
    waiting.until(lambda page: shown(page, "tr.claim") == ["paper-v1-claim-0"])
    assert not page.find_element(By.ID, cell).is_displayed()
    page.execute_script("location.hash = arguments[0]", cell)
    waiting.until(lambda page: page.find_element(By.ID, cell).is_displayed())
    assert page.current_url.endswith(cell)


def test_a_link_to_a_claim_opens_its_evidence(page: webdriver.Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, "#refuted ~ details a").click()
    assert page.current_url.endswith("#paper-v1-claim-0")
    cells = page.find_element(By.CSS_SELECTOR, "[aria-label='Cells of paper-v1-claim-0']")
    WebDriverWait(page, 5).until(lambda _: cells.is_displayed())


@pytest.mark.parametrize("script", [True, False])
def test_every_link_into_the_page_leads_somewhere_visible(
    page: webdriver.Chrome, address: str, script: bool
) -> None:
    screen(page, 1280, "light", script=script)
    cell = "paper-v1-claim-2/bits-3.dim-128@ours-mse"
    page.get("about:blank")
    page.get(f"{address}#{cell}")
    assert page.find_element(By.ID, cell).is_displayed()


def test_it_is_readable_without_javascript(page: webdriver.Chrome, address: str) -> None:
    screen(page, 1280, "light", script=False)
    page.get("about:blank")
    page.get(address)
    assert not page.find_element(By.ID, "filters").is_displayed()
    assert not page.find_element(By.ID, "theme").is_displayed()
    assert len(shown(page, "tr.claim")) == 10
    page.find_element(By.CSS_SELECTOR, ".more summary").click()
    assert page.find_element(By.CSS_SELECTOR, ".cells").is_displayed()


def test_dark_mode_follows_the_system_and_the_button_overrides_it(page: webdriver.Chrome) -> None:
    light = background(page)
    screen(page, 1280, "dark")
    dark = background(page)
    assert light != dark
    page.find_element(By.ID, "theme").click()
    assert background(page) == light
    page.refresh()
    assert background(page) == light
    page.execute_script("localStorage.clear()")


@pytest.mark.parametrize("width", [320, 390, 768, 1000, 1280])
def test_nothing_overflows_sideways(page: webdriver.Chrome, width: int) -> None:
    screen(page, width, "light")
    page.execute_script(OPEN_ALL)
    beyond = page.execute_script(BEYOND)
    assert beyond == []
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    page.execute_script("document.querySelector('h1').style.minWidth = '2000px'")
    assert page.execute_script(BEYOND) != []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_published_report_does_not_overflow(browser: webdriver.Chrome, width: int) -> None:
    """Its matrices scroll; words for screen readers in them must not widen the page."""
    screen(browser, width, "light")
    browser.get(PUBLISHED.as_uri())
    browser.execute_script(OPEN_ALL)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.execute_script(
        "for (const e of document.querySelectorAll('.scroll-x')) e.style.position = 'static'"
    )
    assert width < 600 or browser.execute_script("return document.documentElement.scrollWidth > innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(page: webdriver.Chrome, scheme: str) -> None:
    screen(page, 1280, scheme)
    page.execute_script(OPEN_ALL)
    assert page.execute_script(CONTRAST) == []
    page.execute_script("document.querySelector('h1').style.color = 'light-dark(#999, #666)'")
    assert len(page.execute_script(CONTRAST)) == 1


def test_nothing_is_fetched_and_nothing_complains(page: webdriver.Chrome) -> None:
    page.get_log("performance")  # type: ignore[no-untyped-call]
    page.refresh()
    wanted = [entry["message"] for entry in page.get_log("performance")]  # type: ignore[no-untyped-call]
    sent = [message for message in wanted if '"Network.requestWillBeSent"' in message]
    assert [
        message for message in sent if '"url":"file:' not in message and '"url":"data:' not in message
    ] == []
    assert page.get_log("browser") == []  # type: ignore[no-untyped-call]


def test_keyboard_reaches_the_content_first(page: webdriver.Chrome) -> None:
    skip = page.execute_script(
        "document.querySelector('.skip').focus(); return document.activeElement.getBoundingClientRect().left"
    )
    assert skip >= 0


OPEN_ALL = "document.querySelectorAll('details').forEach((details) => { details.open = true; })"

BEYOND = """
const beyond = (element) =>
  element.getClientRects().length && element.getBoundingClientRect().right > innerWidth + 1;
return [...document.querySelectorAll("main *, header *")]
  .filter((element) => !element.closest(".sr, .scroll, svg") && beyond(element))
  .slice(0, 5)
  .map((element) => element.outerHTML.slice(0, 200));
"""

CONTRAST = """
const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const known = new Map();
const parse = (text) => {
  if (!known.has(text)) {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    known.set(text, [...context.getImageData(0, 0, 1, 1).data]);
  }
  return known.get(text);
};
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour[3] > 0) return colour;
  }
  return parse(getComputedStyle(document.body).backgroundColor);
};
const found = new Set();
for (const element of document.querySelectorAll("body *:not(script, style, svg, svg *, option)")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.getClientRects().length) continue;
  const both = [parse(getComputedStyle(element).color), behind(element)].map(light).sort((x, y) => y - x);
  const ratio = (both[0] + 0.05) / (both[1] + 0.05);
  if (ratio < 4.5) found.add(`${element.tagName}.${element.className}: ${ratio.toFixed(2)}`);
}
return [...found];
"""
