"""The report in a real browser: Debian's Chromium with its driver.

The README's picture is made here too, of any report, by a command of its own:

    RILQ_PICTURE_OF=report.html pytest tests/e2e/test_report_browser.py -k picture
"""

import base64
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report_examples as examples

from rilq.evaluation.report.page import write_page

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "report.png"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars"
).split()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)",
)
Browser = Any  # selenium's driver


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium without a display, with a profile of its own."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # A driver that is given is not looked for, on the network or elsewhere.
    driver = Chrome(options=options, service=Service(executable_path=DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three checkpoints, one of them with hostile text everywhere."""
    bad = examples.HOSTILE
    subjects = [
        examples.subject(name, bits_per_weight=bits, evaluations=(examples.evaluation(ppl, bits),))
        for name, bits, ppl in (("two bits", 2.5, 19.5), ("ten bits", 10.5, 17.3), (bad, 4.5, 17.4))
    ]
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_page(path, subjects)
    return path


@pytest.fixture
def show(browser: Browser, page: Path) -> Callable[..., Browser]:
    """`show(width=1200, height=900, theme="light", path=the report)`: a browser that shows it."""

    def open_page(
        width: int = 1200, height: int = 900, theme: str = "light", path: Path = page
    ) -> Browser:
        command = browser.execute_cdp_cmd
        command(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        preferred = {"name": "prefers-color-scheme", "value": theme}
        command("Emulation.setEmulatedMedia", {"features": [preferred]})
        browser.get(path.as_uri())
        browser.execute_script("localStorage.clear()")
        browser.refresh()
        return browser

    return open_page


def colour(browser: Browser, element: str, name: str) -> tuple[float, ...]:
    script = f"return getComputedStyle(document.querySelector('{element}')).{name}"
    numbers = browser.execute_script(script).partition("(")[2].rstrip(")").split(",")
    return tuple(map(float, numbers[:3]))


def test_it_renders_without_complaints_and_asks_nothing_of_the_network(
    show: Callable[..., Browser],
) -> None:
    browser = show()
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    widths = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map((each) => each.clientWidth)"
    )
    assert len(widths) == 2 + 3 * 7 and all(width > 300 for width in widths)


def test_the_policy_forbids_other_scripts_and_the_network(show: Callable[..., Browser]) -> None:
    browser = show()
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.added = 1';"
        "document.body.append(s)"
    )
    assert browser.execute_script("return window.added") is None
    reached = browser.execute_async_script(
        "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('reached'),"
        " (error) => done(error.name))"
    )
    assert reached == "TypeError"
    assert all("Content Security Policy" in e["message"] for e in browser.get_log("browser")[:2])


def test_a_script_in_a_text_is_shown_and_does_not_run(show: Callable[..., Browser]) -> None:
    browser = show()
    shown = browser.execute_script("return document.querySelector('blockquote').textContent")
    assert examples.HOSTILE in shown
    names = browser.execute_script(
        "return [...document.querySelectorAll('.name')].map((e) => e.textContent)"
    )
    assert examples.HOSTILE in names[2]
    assert browser.execute_script("return window.hacked") is None
    assert browser.execute_script("return document.scripts.length") == 1


def test_tables_are_sorted_by_number_by_mouse_and_by_keyboard(show: Callable[..., Browser]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser = show()

    def column(number: int) -> list[str]:
        script = "return [...document.querySelector('table').tBodies[0].rows].map((r) =>"
        return list(browser.execute_script(f"{script} r.cells[{number}].firstChild.data.trim())"))

    def sorting() -> list[str | None]:
        script = "return [...document.querySelectorAll('table')[0].tHead.rows[0].cells].map("
        return list(browser.execute_script(f"{script}(c) => c.getAttribute('aria-sort'))"))

    buttons = browser.find_elements(By.CSS_SELECTOR, "table:first-of-type thead button")
    assert column(1) == ["2.50", "10.50", "4.50"]
    assert set(sorting()) == {None}
    buttons[1].click()
    assert column(1) == ["2.50", "4.50", "10.50"] and sorting()[1] == "ascending"
    buttons[1].send_keys(Keys.ENTER)
    assert column(1) == ["10.50", "4.50", "2.50"] and sorting()[1] == "descending"
    buttons[0].send_keys(Keys.SPACE)
    assert [name[0] for name in column(0)] == ["A", "B", "C"]
    assert sorting()[:2] == ["ascending", None]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_follows_the_system_and_the_button_overrules_it(
    show: Callable[..., Browser], theme: str
) -> None:
    from selenium.webdriver.common.by import By

    browser = show(theme=theme)
    button = browser.find_element(By.ID, "theme")

    def is_dark() -> bool:
        paper = colour(browser, "body", "backgroundColor")
        for text, name in (("h1", "color"), (".plot text", "fill"), (".verdict", "color")):
            apart = abs(sum(paper) - sum(colour(browser, text, name)))
            assert apart > 3 * 70, f"{text} cannot be read"
        return sum(paper) < 3 * 128

    assert is_dark() == (theme == "dark") and button.text == "Theme: system"
    seen = []
    for _ in range(3):
        button.click()
        seen.append((button.text.removeprefix("Theme: "), is_dark()))
    assert seen == [("light", False), ("dark", True), ("system", theme == "dark")]
    button.click()
    browser.refresh()
    assert browser.find_element(By.ID, "theme").text == "Theme: light", "it is remembered"


@pytest.mark.parametrize("width", [390, 320, 1200])
def test_nothing_has_to_be_scrolled_sideways(show: Callable[..., Browser], width: int) -> None:
    browser = show(width=width)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    room, needed = browser.execute_script(
        "const e = document.documentElement; return [e.clientWidth, e.scrollWidth]"
    )
    assert needed <= room <= width
    table = "const t = document.querySelector('.scroll'); return [t.clientWidth, t.scrollWidth]"
    inside = browser.execute_script(table)
    assert width > 400 or inside[0] < inside[1], "a wide table scrolls inside itself"
    scale = browser.execute_script(
        "const s = document.querySelector('svg'); return s.clientWidth / s.viewBox.baseVal.width"
    )
    assert width == 320 or scale >= 1, "the text of plots has 9 pixels or more"


def test_it_can_be_printed_with_everything_unfolded(show: Callable[..., Browser]) -> None:
    browser = show(theme="dark")
    browser.execute_script(
        "window.addEventListener('beforeprint', () => {"
        " window.folded = document.querySelectorAll('details:not([open])').length })"
    )
    printed = base64.b64decode(browser.print_page())
    assert printed.startswith(b"%PDF") and len(printed) > 20_000
    assert browser.execute_script("return window.folded") == 0
    assert browser.execute_script("return document.querySelectorAll('details[open]').length") == 0


@pytest.mark.skipif("RILQ_PICTURE_OF" not in os.environ, reason="only if RILQ_PICTURE_OF names it")
def test_picture_for_the_readme(show: Callable[..., Browser]) -> None:
    browser = show(path=Path(os.environ["RILQ_PICTURE_OF"]).resolve(), height=750)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(base64.b64decode(browser.get_screenshot_as_base64()))
    assert PICTURE.stat().st_size < 300_000
