"""A headless Chromium for tests that look at pages, and pictures of what it shows."""

import os
import shutil
import time
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing beyond loopback: XProf asks for a chart library elsewhere, and must do without it here.
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --window-size=1500,1000""".split()
FLAGS += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


def wait_for(condition, seconds=120.0):
    """Polls until `condition()` is true, and returns what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, one for all tests of a file."""
    if not CHROMIUM or not shutil.which("chromedriver"):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def keep_picture(browser, name, tmp_path):
    """Saves what the browser shows, for people: in ONECHIP_ARTIFACTS if that is set."""
    folder = Path(os.environ.get("ONECHIP_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(folder / name))
