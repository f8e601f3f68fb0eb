"""What the operator refuses: the exact form of it, before drawing and after; and no claim where nobody looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openai
import pytest
from live import live, pixels, png
from served_models import Gate, tiny_model

from fastigpt.server.moderation import BlockedWords, Moderation, Question, Refusal, load_hook
from fastigpt.server.service import Settings


def words(folder: Path, text: str) -> BlockedWords:
    (folder / "words").write_text(text, "utf-8")
    return BlockedWords(folder / "words")


def test_a_refusal_has_openais_form(tmp_path):
    moderation = Moderation(words(tmp_path, "tree\nred house\n"))
    with live(settings=Settings(moderation=moderation)) as server:
        client = server.client()
        for route in ("generate", "edit"):
            picture = (
                {"image": png(np.zeros((6, 4, 3), np.uint8)), "extra_body": {"rows": 1}} if route == "edit" else {}
            )
            with pytest.raises(openai.BadRequestError) as caught:
                getattr(client.images, route)(prompt="A blue TREE.", **picture)
            assert (caught.value.type, caught.value.code) == ("image_generation_user_error", "moderation_blocked")
            assert caught.value.message.endswith("safety_violations=[blocked_words]") or "safety_violations" in str(
                caught.value
            )
            assert caught.value.body["moderation_details"] == {
                "moderation_stage": "input",
                "categories": ["blocked_words"],
            }
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a house", extra_body={"negative_prompt": "red house", "guidance_scale": 2})
        assert client.images.generate(prompt="red blue house").data
        assert server.batch.counts.images == 1
        assert 'fastigpt_refused_total{why="moderation_input"} 3.0' in server.get("/metrics").text
        assert server.client().models.retrieve("tiny").moderated is True


@pytest.mark.parametrize(
    "prompt, refused",
    [
        ("tree", True),
        ("trees", False),
        ("a TREE, please", True),
        ("ｔｒｅｅ", True),
        ("Straße", True),
        ("STRASSE", True),
        ("red\n  house", True),
        ("red blue house", False),
        ("house red", False),
        ("#tag", False),
        ("", False),
    ],
)
def test_whole_words_after_nfkc_and_case_folding(tmp_path, prompt, refused):
    blocked = words(tmp_path, "# tag\ntree\n\n  Red   House\nstrasse\n")
    assert (blocked(Question("input", "m", prompt)) is not None) == refused
    assert (blocked(Question("input", "m", "", negative_prompt=prompt)) is not None) == refused
    assert blocked(Question("output", "m", prompt)) is None


def test_words_of_the_prompt_and_of_the_negative_one_make_no_phrase(tmp_path):
    blocked = words(tmp_path, "red house")
    assert blocked(Question("input", "m", "a red", negative_prompt="house")) is None


@pytest.mark.parametrize("text", ["", "# nothing\n", "!!!\n"])
def test_a_file_without_words_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="holds no words"):
        words(tmp_path, text)


def test_a_hook_is_asked_before_and_after():
    asked: list[Question] = []

    def hook(question: Question) -> Refusal | None:
        asked.append(question)
        return None

    photo = np.full((6, 4, 3), 128, np.uint8)
    with live(settings=Settings(moderation=Moderation(hook=hook))) as server:
        answer = server.client().images.edit(
            image=png(photo), prompt="a tree", n=2, extra_body={"rows": 1, "seed": 1, "safety_identifier": "u"}
        )
        first, *others = asked
        assert (first.stage, first.prompt, first.model, first.level) == ("input", "a tree", "tiny", "auto")
        assert first.safety_identifier == "u" and first.picture is None and np.array_equal(first.upload, photo)
        assert [question.stage for question in others] == ["output"] * 2
        seen = sorted(np.asarray(question.picture).tobytes() for question in others)
        assert seen == sorted(pixels(image.b64_json).tobytes() for image in answer.data)
        server.client().images.generate(prompt="", moderation="low")
        assert asked[-1].level == "low"
        raw = server.client().images.with_raw_response.generate(prompt="", moderation="low")
        assert "x-fastigpt-ignored" not in raw.headers


def test_a_picture_that_is_refused_is_not_shown_in_part_or_whole():
    def hook(question: Question) -> Refusal | None:
        return Refusal(["ugly", "dull"]) if question.stage == "output" else None

    with live(settings=Settings(moderation=Moderation(hook=hook))) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="", n=3)
        assert caught.value.body["moderation_details"] == {"moderation_stage": "output", "categories": ["ugly", "dull"]}
        assert caught.value.body["message"].endswith("safety_violations=[ugly, dull]")
        raw = client.images.with_raw_response.generate(prompt="", stream=True, partial_images=3)
        assert raw.headers["x-fastigpt-ignored"] == "partial_images"
        with pytest.raises(openai.APIError) as refused:
            list(raw.parse())
        assert refused.value.code == "moderation_blocked"


def test_a_refusal_costs_nothing():
    model = tiny_model()
    gate = Gate(model)
    with live(model, settings=Settings(moderation=Moderation(hook=lambda _: Refusal(["no"])))) as server:
        with pytest.raises(openai.BadRequestError):
            server.client().images.generate(prompt="", n=10)
        assert len(gate.added) == 1  # the batch's own, when it was started


@pytest.mark.parametrize("hook", [lambda _: 1 / 0, lambda _: True])
def test_a_hook_that_fails_lets_nothing_through(hook):
    with live(settings=Settings(moderation=Moderation(hook=hook))) as server:
        with pytest.raises(openai.InternalServerError):
            server.client().images.generate(prompt="")
        assert server.batch.counts.images == 0


def test_a_hook_is_named_by_module_and_function():
    assert load_hook("os.path:join")
    for name in ("os", ":join", "os.path:", "os:nothing", "no_such_module:f", "os:sep"):
        with pytest.raises(ValueError, match="--moderation"):
            load_hook(name)
