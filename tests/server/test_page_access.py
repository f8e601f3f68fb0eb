"""The page for everybody: by keyboard alone, by name, on a phone, in the light and in the dark."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from visiting import H, W, browser, expect, finished, needs_chromium, photo, server, take, visit  # noqa: F401

pytestmark = needs_chromium

PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


def focused(page: Any) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")


OUTLINES = """() => {
    const focused = document.activeElement;
    const shown = [focused, focused.nextElementSibling, focused.parentElement];
    return shown.map((element) => element && getComputedStyle(element).outlineStyle);
}"""


def tab_to(page: Any, name: str) -> None:
    """Presses Tab until that element has the focus, and sees that the focus can be seen."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused(page) == name:
            outlines = page.evaluate(OUTLINES)
            assert "solid" in outlines or "auto" in outlines, f"{name} has no visible focus"
            return
    raise AssertionError(f"Tab never comes to {name}")


def test_everything_by_keyboard_alone(server, visit, photo):
    page = visit(server)
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the pictures"
    tab_to(page, "prompt")
    page.keyboard.type("a blue tree")
    page.keyboard.press("Enter")  # as in any form
    assert finished(page, 4).shape == (4, H, W, 3)
    page.get_by_role("radio", name="Empty canvas").focus()
    page.keyboard.press("ArrowRight")  # from the empty canvas to a photo
    tab_to(page, "file")
    page.locator("#file").set_input_files(photo)  # the system's own dialog is the system's
    page.locator("#mask-canvas").wait_for()
    tab_to(page, "mask-canvas")
    state = page.locator("#mask-state")
    for _ in range(H):
        page.keyboard.press("ArrowUp")
    for _ in range(W):
        page.keyboard.press("ArrowLeft")
    expect(state).to_contain_text("row 1, column 1: nothing is marked yet")
    page.locator("#brush").evaluate("(range) => { range.value = 1; range.dispatchEvent(new Event('input')) }")
    page.keyboard.press("Space")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    expect(state).to_contain_text(f"row 2, column 2: 3 of {H * W} cells")
    page.keyboard.press("x")
    expect(state).to_contain_text(f"2 of {H * W} cells")
    tab_to(page, "keep-top")
    page.keyboard.press("Enter")
    expect(state).to_contain_text(f"{(H - H // 2) * W} of {H * W} cells")
    tab_to(page, "clear-mask")
    page.keyboard.press("Space")
    tab_to(page, "Mark a rectangle by numbers")
    page.keyboard.press("Enter")
    for name, value in {"top": 1, "left": 1, "height": 2, "width": 2}.items():
        tab_to(page, name)
        page.keyboard.type(str(value))
    tab_to(page, "mark")
    page.keyboard.press("Enter")
    expect(state).to_contain_text(f"4 of {H * W} cells")
    tab_to(page, "n")
    page.keyboard.type("1")
    tab_to(page, "seed")
    page.keyboard.type("9")
    tab_to(page, "draw")
    page.keyboard.press("Enter")
    expect(page.locator(".batch")).to_have_count(2)
    mask = np.zeros((H, W), bool)
    mask[1:3, 1:3] = True
    how = {"prompt": "a blue tree", "guidance_scale": 2.0, "seed": 9, "temperature": 0.8, "output_type": "np"}
    assert np.array_equal(finished(page, 1), server.model.complete(photo, 1, mask=mask, **how))


def test_on_a_phone_nothing_is_wider_than_the_screen(server, visit, photo):
    page = visit(server, **PHONE)
    take(page, photo)
    page.get_by_role("button", name="Keep the top half").click()
    for fold in page.locator("details").all():
        fold.evaluate("(fold) => (fold.open = true)")
    page.locator("#file-name").evaluate("(name) => (name.textContent = 'x'.repeat(200))")
    page.get_by_role("button", name="Draw 4 pictures").click()
    finished(page, 4)
    expect(page.locator(".picture img").first).to_be_in_viewport()  # they are below the form
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    small = page.evaluate(
        """[...document.querySelectorAll("button, a, input, summary, select")]
            .filter((e) => e.checkVisibility() && !e.classList.contains("skip"))
            .filter((e) => e.getBoundingClientRect().height < 24).map((e) => e.outerHTML)"""
    )
    assert small == [], "too small for a finger"


CONTRAST = """() => {
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => {
        const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const [r, g, b] = parts(color).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if ((parts(color)[3] ?? 1) === 1) return color;
        }
        return getComputedStyle(document.body).backgroundColor;
    };
    const found = [];
    for (const e of document.body.querySelectorAll("*")) {
        const own = [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!(own || e.matches("input, select")) || !e.checkVisibility()) continue;
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        found.push([ratio, `${e.tagName} ${e.id} ${e.className} ${e.textContent.trim().slice(0, 30)}`]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_the_light_and_in_the_dark(server, visit, photo, scheme):
    page = visit(server, color_scheme=scheme)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in background[4:-1].split(",")) < 200) == (scheme == "dark")
    take(page, photo)
    for fold in page.locator("details").all():
        fold.evaluate("(fold) => (fold.open = true)")
    page.get_by_label("Prompt", exact=True).fill("a green house")
    page.get_by_role("button", name="Keep the top half").click()
    page.get_by_role("button", name="Draw 4 pictures").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("")
    page.get_by_role("button", name="Draw 4 pictures").click()
    finished(page, 4)
    found = page.evaluate(CONTRAST)
    assert len(found) > 50
    assert [entry for entry in found if entry[0] < 4.5] == []


CONTROLS = "input, select, textarea, button, a, canvas, img, summary, section, main"
NAMELESS = """(controls) => [...document.querySelectorAll(controls)]
    .filter((e) => !e.closest("[aria-hidden=true]") && !(e.matches("img") && e.getAttribute("alt") === ""))
    .filter((e) => {
        const ids = (e.getAttribute("aria-labelledby") ?? "").split(" ");
        const by = ids.map((id) => document.getElementById(id)?.textContent);
        const labels = [...(e.labels ?? [])].map((label) => label.textContent);
        const names = [e.getAttribute("aria-label"), e.getAttribute("alt"), ...by, ...labels];
        if (e.matches("button, a, summary")) names.push(e.textContent);
        return !names.some((name) => name?.trim());
    }).map((e) => e.outerHTML)"""


def test_every_control_and_picture_has_a_name(server, visit, photo):
    page = visit(server)
    take(page, photo)
    page.get_by_role("button", name="Keep the top half").click()
    page.get_by_role("button", name="Draw 4 pictures").click()
    finished(page, 4)
    assert page.evaluate(NAMELESS, CONTROLS) == []
    assert page.evaluate("document.documentElement.lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    described = "[...document.querySelectorAll('[aria-describedby]')].map((e) => e.getAttribute('aria-describedby'))"
    named = {name for names in page.evaluate(described) for name in names.split()}
    assert named and named <= set(ids)
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((e) => Number(e.tagName[1]))")
    assert levels.count(1) == 1 and set(levels) == {1, 2}
