"""A browser, a server that signs, and what tests of the page do in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import Live, live
from PIL import Image
from served_models import CONFIG

from fastigpt.server.service import Settings
from fastigpt.server.signing import open_signing

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")

expect = playwright.expect
H, W = CONFIG.height, CONFIG.width
PATIENCE = 120_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        expect.set_options(timeout=PATIENCE)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    data = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(data))
        patch.setenv("HOME", str(data))
        sign, _ = open_signing(None, None, wanted=True)
    with live(settings=Settings(sign=sign)) as found:
        yield found


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """visit(server, **options of a browser's context): the page, loaded. Nothing in it may fail unseen."""
    contexts, wrong = [], []

    def opened(server: Live, *, ready: str = "#suggestions button", **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda told: wrong.append(told.text) if "Content Security" in told.text else None)
        page.goto(server.url)
        page.locator(ready).first.wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def pixels(picture: Any) -> np.ndarray:
    """uint8 [height, width, 4] of an <img> or a <canvas> as it is on the page."""
    width, height, *data = picture.evaluate(
        """async (shown) => {
            if (shown.decode) await shown.decode();
            const [width, height] = [shown.naturalWidth ?? shown.width, shown.naturalHeight ?? shown.height];
            const canvas = Object.assign(document.createElement("canvas"), { width, height });
            canvas.getContext("2d").drawImage(shown, 0, 0);
            return [width, height, ...canvas.getContext("2d").getImageData(0, 0, width, height).data];
        }"""
    )
    return np.array(data, np.uint8).reshape(height, width, 4)


def finished(page: Any, count: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: the pictures of the newest batch, when they are all there."""
    pictures = page.locator(".batch").first.locator(".picture img")
    expect(pictures).to_have_count(count)
    return np.stack([pixels(pictures.nth(i)) for i in range(count)])[..., :3]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def take(page: Any, photo: Path) -> None:
    page.get_by_role("radio", name="Photo").check(force=True)
    page.get_by_label("Choose a photo").set_input_files(photo)
    page.locator("#mask-canvas").wait_for()
