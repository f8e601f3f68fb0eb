"""The page in a real browser: from a prompt to a picture, row by row, with photos, keys and several models."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from live import live
from PIL import Image
from served_models import Gate, tiny_model
from tiny_janus import their_model, tokenizer
from visiting import H, W, browser, expect, finished, needs_chromium, photo, pixels, server, take, visit  # noqa: F401

import fastigpt
from fastigpt.families.llamagen import read_file
from fastigpt.model import Model
from fastigpt.provenance.reading import State, read
from fastigpt.server.keys import Keys, make_key
from fastigpt.server.service import Settings

CLASSES = Path(__file__).parents[1] / "families" / "llamagen_golden" / "c2i_tiny_64.pt"
pytestmark = needs_chromium


def test_from_a_prompt_to_signed_pictures(server, visit):
    page = visit(server)
    page.get_by_role("button", name="a red house").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red house")
    page.get_by_role("spinbutton", name="Pictures").fill("3")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Draw 3 pictures").click()
    found = finished(page, 3)
    how = {"temperature": 0.8, "guidance_scale": 2.0}
    expected = server.model.sample(3, prompt="a red house", seed=7, output_type="np", **how)
    assert np.array_equal(found, expected)
    expect(page.get_by_role("status")).to_have_text("All 3 pictures are drawn: a red house.")
    expect(page.get_by_role("img", name="Picture 1: a red house, seed 7")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download picture 1").click()
    file = Path(download.value.path()).read_bytes()
    assert download.value.suggested_filename == "fastigpt-7-1.png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), expected[1])
    report = read(file)
    assert report.state is State.VALID and (report.facts["seed"], report.facts["index"]) == ("7", "1")


def test_a_picture_is_drawn_again(server, visit):
    """Seed and index name it for ever; the seed was the server's, beyond what JavaScript's numbers hold."""
    page = visit(server)
    page.get_by_label("Seed").fill(str(2**64 - 1))
    page.get_by_role("button", name="Draw 4 pictures").click()
    first = finished(page, 4)
    page.get_by_label("Seed").fill("5")  # the form moves on
    page.get_by_role("button", name="Draw picture 2 again").click()
    expect(page.locator(".batch")).to_have_count(2)
    assert np.array_equal(finished(page, 1)[0], first[2])
    expected = server.model.sample(1, seed=2**64 - 1, first_index=2, temperature=0.8, output_type="np")
    assert np.array_equal(first[2], expected[0])


def test_rows_are_seen_before_the_end_and_drawing_can_be_cancelled(visit):
    model = tiny_model()
    expected = model.sample(2, seed=1, temperature=0.8, output_type="np")
    gate = Gate(model)
    with live(model) as server, gate.closed():
        page = visit(server)
        page.get_by_role("spinbutton", name="Pictures").fill("2")
        page.get_by_label("Seed").fill("1")
        gate.let(3 * W + 1)
        page.get_by_role("button", name="Draw 2 pictures").click()
        canvases = page.locator(".picture canvas")
        for image in range(2):
            expect(canvases.nth(image)).to_have_attribute("data-rows", "3")
            seen = pixels(canvases.nth(image))
            assert np.array_equal(seen[:3, :, :3], expected[image, :3]) and not seen[3:].any()
        expect(page.get_by_role("status")).to_have_text("Half of Anything is drawn.")
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_text("seed 1, cancelled")).to_be_visible()
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
        while not (server.batch._given_up or server.batch.counts.cancelled):  # it has heard that the client left
            page.wait_for_timeout(5)
        gate.let_all()
        page.get_by_role("button", name="Draw 2 pictures").click()
        assert np.array_equal(finished(page, 2), expected)
        assert server.batch.counts.cancelled == 2


def test_a_mask_is_painted_and_honoured(server, visit, photo):
    page = visit(server)
    take(page, photo)
    page.get_by_role("slider", name="Brush").fill("1")
    canvas = page.locator("#mask-canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    cells = [(1, 0), (1, 3), (4, 3)]  # along these lines
    x, y, cell = box["x"], box["y"], box["width"] / W
    at = [(x + (column + 0.5) * cell, y + (row + 0.5) * cell) for row, column in cells]
    page.mouse.move(*at[0])
    page.mouse.down()
    for place in at[1:]:
        page.mouse.move(*place)
    page.mouse.up()
    mask = np.zeros((H, W), bool)
    mask[1, :] = mask[1:5, 3] = True
    expect(page.locator("#mask-state")).to_contain_text(f"{mask.sum()} of {H * W} cells")
    page.get_by_label("Seed").fill("3")
    page.get_by_role("spinbutton", name="Pictures").fill("2")
    page.get_by_role("button", name="Draw 2 pictures").click()
    found = finished(page, 2)
    expected = server.model.complete(photo, 2, mask=mask, seed=3, temperature=0.8, output_type="np")
    assert np.array_equal(found, expected)
    original = server.model.decode(server.model.encode(photo))[0]
    assert np.array_equal(found[0][~mask], original[~mask]) and not np.array_equal(found[0], found[1])


def test_what_is_kept_is_there_from_the_start(visit, photo):
    model = tiny_model()
    gate = Gate(model)
    with live(model) as server, gate.closed():
        page = visit(server)
        take(page, photo)
        page.get_by_role("button", name="Redraw the middle").click()
        page.get_by_role("button", name="Draw 4 pictures").click()
        page.locator(".picture canvas").first.wait_for()
        seen = pixels(page.locator(".picture canvas").first)
        mask = np.zeros((H, W), bool)
        mask[H // 4 : H // 4 + H // 2, W // 4 : W // 4 + W // 2] = True
        assert np.array_equal(seen[..., 3] == 0, mask)
        assert np.array_equal(seen[~mask][:, :3], model.decode(model.encode(photo))[0][~mask])


def test_what_is_wrong_is_told_in_words_where_it_is(server, visit, tmp_path):
    page = visit(server)
    alert = page.get_by_role("alert")
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("a green house")
    expect(page.locator("#prompt-help")).to_have_text("The model does not know “green”.")
    page.get_by_role("button", name="Draw 4 pictures").click()
    expect(alert).to_contain_text("unknown word 'green'")
    expect(prompt).to_be_focused()
    expect(prompt).to_have_attribute("aria-invalid", "true")
    prompt.fill("a red house")
    page.get_by_label("Seed").fill("many")
    page.get_by_role("button", name="Draw 4 pictures").click()
    expect(alert).to_have_text("A seed is a whole number, or nothing for a new one.")
    page.get_by_label("Seed").fill("")
    page.locator("#negative").evaluate("(field) => (field.value = 'blue')")
    page.locator("#guidance").evaluate("(field) => (field.value = 1)")
    page.get_by_role("button", name="Draw 4 pictures").click()
    expect(alert).to_have_text("A negative prompt needs guidance above 1.")
    expect(page.locator("#guidance")).to_be_focused()  # its fold has opened
    page.get_by_role("radio", name="Photo").check(force=True)
    page.locator("#negative").fill("")
    page.get_by_role("button", name="Draw 4 pictures").click()
    expect(alert).to_have_text("Choose a photo first.")
    (tmp_path / "text.png").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "text.png")
    expect(alert).to_contain_text("text.png is no picture that can be read")
    assert page.locator(".batch").count() == 0


def test_a_server_with_keys_asks_for_one(visit, tmp_path):
    key, digest = make_key()
    (tmp_path / "keys").write_text(digest + "\n")
    with live(settings=Settings(keys=Keys.read(tmp_path / "keys"))) as server:
        page = visit(server, ready="#key")
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_role("alert")).to_have_text("This server does not know that key.")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        expect(page.get_by_label("API key")).to_be_hidden()
        page.get_by_role("button", name="Draw 4 pictures").click()
        assert len(finished(page, 4)) == 4


def test_a_model_of_classes_is_asked_by_name_or_number_with_its_own_defaults(visit):
    model = Model(read_file(CLASSES, n_head=4), device="cpu", backend="portable", dtype="float32")
    with live(model) as server:
        page = visit(server, ready="#prompt-field:not([hidden])")
        expect(page.locator("#prompt-help")).to_contain_text("by its name or its number")
        expect(page.locator("#all-words")).to_be_hidden()
        page.get_by_label("Prompt", exact=True).fill("7")
        page.get_by_label("Seed").fill("3")
        page.get_by_role("button", name="Draw 4 pictures").click()
        assert np.array_equal(finished(page, 4), model.sample(4, label=7, seed=3, output_type="np"))
        page.locator("#guidance").evaluate("(field) => (field.value = 1)")
        page.get_by_role("button", name="Draw 4 pictures").click()
        expect(page.locator(".batch")).to_have_count(2)
        plain = model.sample(4, label=7, seed=3, guidance_scale=1.0, output_type="np")
        assert np.array_equal(finished(page, 4), plain)


def test_a_model_of_captions_reads_words_of_ones_own(visit, tmp_path):
    their_model().save_pretrained(tmp_path / "janus")
    (tmp_path / "janus" / "tokenizer.json").write_text(tokenizer().to_str())
    model = fastigpt.load(tmp_path / "janus", device="cpu", backend="portable", dtype="float32")
    with live(model) as server:
        page = visit(server, ready="#prompt-field:not([hidden])")
        page.get_by_label("Prompt", exact=True).fill("a red house <or so>")
        expect(page.locator("#prompt-help")).to_contain_text("In words of your own")
        page.get_by_label("Seed").fill("3")
        page.get_by_role("button", name="Draw 4 pictures").click()
        expected = model.sample(4, prompt="a red house <or so>", seed=3, output_type="np")
        assert np.array_equal(finished(page, 4), expected)


def test_several_models_can_be_chosen(visit):
    wordless = tiny_model(vocabulary=None)
    with live(tiny_model(), wordless) as server:
        page = visit(server)
        page.get_by_label("Model").select_option("second")
        expect(page.get_by_label("Prompt", exact=True)).to_be_hidden()
        page.get_by_label("Seed").fill("4")
        page.get_by_role("button", name="Draw 4 pictures").click()
        expected = wordless.sample(4, seed=4, temperature=0.8, output_type="np")
        assert np.array_equal(finished(page, 4), expected)
        expect(page.get_by_text("second, seed 4")).to_be_visible()
