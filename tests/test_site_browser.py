"""The page in headless Chromium, from a file and from a server. Screenshots: UNMERGEBENCH_SHOTS."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from listed import EVIL, hostile, several, written

from leaderboard.site import build
from leaderboard.site.serve import server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"
    ),
    # What a browser or its client leaves open is no fault of the page.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return build(several(folder / "entries"), folder / "site").page


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("UNMERGEBENCH_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads: Path) -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--disable-background-networking", "--window-size=1440,1000"):  # fmt: skip
        options.add_argument(word)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(executable_path=DRIVER))
    driver.execute_cdp_cmd("Network.enable", {})
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, site: Path) -> Any:
    """The table, opened as a file, as a desktop in the light shows it."""
    look(browser, 1440, 1000, "light")
    browser.get(site.as_uri())
    return browser


def look(browser: Any, width: int, height: int, scheme: str) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def find(browser: Any, css: str) -> Any:
    return browser.find_element("css selector", css)


def names(browser: Any) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll('#board tbody tr:has(th)')]"
        ".map(row => row.querySelector('th a').textContent)"
    )


def header(browser: Any, column: str) -> Any:
    return find(browser, f"#board thead th[data-column='{column}']")


def choose(browser: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.ui import Select

    Select(find(browser, f"select[name={name}]")).select_by_value(value)


def requested(browser: Any) -> list[str]:
    """Addresses asked for since the last call."""
    messages = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def test_sorts_by_header_mouse_and_keyboard(page: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    before = names(page)
    title = header(page, "drop").find_element("css selector", ".dt-column-title")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", title)
    title.click()
    values = page.execute_script(
        "const all = (css) => [...document.querySelectorAll(css)];"
        "const at = all('#board thead th').findIndex(th => th.dataset.column === 'drop');"
        "return all('#board tbody tr').map(row => row.cells[at].dataset.order)"
    )
    assert values == sorted(values, key=float)
    assert header(page, "drop").get_attribute("aria-sort") == "ascending"
    assert sorted(names(page)) == sorted(before)
    order = header(page, "weights").find_element("css selector", "[role=button]")
    page.execute_script("arguments[0].focus()", order)
    ActionChains(page).send_keys(Keys.ENTER).perform()
    # On a busy machine the key takes a moment to arrive.
    WebDriverWait(page, 10).until(
        lambda page: (
            header(page, "weights").get_attribute("aria-sort") in ("ascending", "descending")
        )
    )
    assert header(page, "drop").get_attribute("aria-sort") is None


def test_filters(page: Any) -> None:
    assert len(names(page)) == 7  # the first suite
    page.execute_script("document.querySelector('input[value=\"task-aware\"]').click()")
    shown = page.execute_script(
        "return [...document.querySelectorAll('#board thead th')].map(th => th.dataset.column)"
    )
    assert "task-aware" in shown
    assert not {"weights", "unlabeled", "labeled"} & set(shown)
    assert header(page, "task-aware").get_attribute("aria-sort") == "descending"
    find(page, "button[type=reset]").click()
    time.sleep(0.2)
    find(page, "input[name=find]").send_keys("mergelock")
    assert names(page) == ["mergelock"]
    find(page, "input[name=find]").clear()
    find(page, "input[name=find]").send_keys("nothing has this name")
    assert names(page) == []
    assert find(page, "#count").text == "0 of 9 entries shown"
    find(page, "button[type=reset]").click()
    time.sleep(0.2)
    choose(page, "standing", "below-gate")
    assert names(page) == []
    choose(page, "standing", "reference")
    assert names(page) == ["none"]
    choose(page, "standing", "")
    choose(page, "suite", "")
    assert len(names(page)) == 9
    assert len([f for f in page.find_elements("css selector", "figure") if f.is_displayed()]) == 2


def test_a_definition_is_one_key_away_and_does_not_sort(page: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    button = header(page, "labeled").find_element("css selector", "button.what")
    page.execute_script("arguments[0].focus()", button)
    ActionChains(page).send_keys(Keys.ENTER).perform()
    tip = find(page, "#tip-labeled")
    assert tip.is_displayed()
    assert "labeled examples" in tip.text
    assert header(page, "labeled").get_attribute("aria-sort") is None
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()


def test_opens_a_defense_and_comes_back(page: Any, shots: Path) -> None:
    link = page.find_element("link text", "params")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
    link.click()
    assert find(page, "h1").text == "params"
    heads = [head.text for head in page.find_elements("css selector", "h2, h3")]
    for wanted in ("Card", "Which attack it survives", "What breaking it costs", "Flags",
                   "Merged accuracy by coefficient λ", "How to reproduce", "Versions"):  # fmt: skip
        assert wanted in heads
    assert "gauge-align+aga" in find(page, "main").text
    whole(page, shots / "defense-light.png")
    look(page, 1440, 1000, "dark")
    whole(page, shots / "defense-dark.png")
    find(page, "nav.crumbs a").click()
    assert find(page, "h1").text == "UnmergeBench leaderboard"


def whole(browser: Any, path: Path) -> None:
    """The whole page as a picture."""
    import base64

    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(taken["data"]))


def test_dark_and_light_differ_and_can_be_read(page: Any, shots: Path) -> None:
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    seen = {}
    for scheme in ("light", "dark"):
        look(page, 1440, 1000, scheme)
        text, ground = page.execute_script(colours)
        assert contrast(text, ground) > 7
        seen[scheme] = ground
        worst = page.execute_script(
            "return [...document.querySelectorAll('#board td.score small')].map(one => "
            "[getComputedStyle(one).color, getComputedStyle(one.parentElement).backgroundColor])"
        )
        assert min(contrast(*pair) for pair in worst) > 4.5
        whole(page, shots / f"desktop-{scheme}.png")
    assert seen["light"] != seen["dark"]


def contrast(one: str, other: str) -> float:
    """WCAG contrast of two CSS colours rgb(r, g, b)."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_phone_scrolls_only_down(page: Any, site: Path, shots: Path) -> None:
    look(page, 390, 844, "light")
    for path in (site, site.parent / "defenses" / "params.html"):
        page.get(path.as_uri())
        width = page.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390
        whole(page, shots / f"phone-{path.stem}.png")
    page.get(site.as_uri())
    box = "const box = document.querySelector('#board').closest('.scroll');"
    assert page.execute_script(f"{box} return box.scrollWidth > box.clientWidth")


def test_nothing_is_asked_of_the_network_and_nothing_goes_wrong(browser: Any, site: Path) -> None:
    look(browser, 1440, 1000, "light")
    requested(browser)
    browser.get_log("browser")
    for path in (site, site.parent / "defenses" / "params.html"):
        browser.get(path.as_uri())
        time.sleep(0.2)
    asked = [url for url in requested(browser) if not url.startswith("data:")]
    assert asked == [site.as_uri(), (site.parent / "defenses" / "params.html").as_uri()]
    assert browser.get_log("browser") == []  # no error, no violation of the page's own policy


def test_downloads_from_a_server(browser: Any, site: Path, downloads: Path) -> None:
    running = server(site.parent, 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        home = f"http://127.0.0.1:{running.server_port}/"
        requested(browser)
        browser.get(home)
        assert len(names(browser)) > 0
        link = browser.find_element("link text", "entries.json")
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", link)
        link.click()
        wanted = downloads / "entries.json"
        for _ in range(50):
            if wanted.exists():
                break
            time.sleep(0.1)
        found = json.loads(wanted.read_text(encoding="ascii"))
        assert found["schema_version"] == 1
        assert found == json.loads((site.parent / "entries.json").read_text(encoding="ascii"))
        assert all(url.startswith((home, "data:")) for url in requested(browser))
    finally:
        running.shutdown()
        running.server_close()


def test_a_hostile_entry_runs_nothing(browser: Any, tmp_path: Path) -> None:
    look(browser, 1440, 1000, "light")
    page = build(written(tmp_path / "entries", hostile()), tmp_path / "site").page
    browser.get_log("browser")
    for path in (page, *(page.parent / "defenses").iterdir()):
        browser.get(path.as_uri())  # an alert would make the next line fail
        assert EVIL in find(browser, "main").get_attribute("textContent")
    assert browser.get_log("browser") == []
