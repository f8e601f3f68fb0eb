"""Scenes: the same ones for the same seed, captions that say what is in them, and every fact within reach."""

import dataclasses
import itertools

import numpy as np
import pytest

from fastigpt.scenes import details, scenes
from fastigpt.scenes.captions import EXAMPLES, PROMPT_LENGTH, WORDS, caption, parse
from fastigpt.scenes.describe import confirmed, describe
from fastigpt.scenes.paint import paint
from fastigpt.scenes.world import COLORS, GROUNDS, KINDS, RELATIONS, SIDES, SIZES, SKIES
from fastigpt.training.data import scene_vocabulary


def drawn(n, seed=3, first=0):
    return list(itertools.islice(scenes(seed, first), n))


def test_item_k_depends_on_the_seed_and_k_alone():
    whole, tail = drawn(40), drawn(10, first=30)
    for (image, text, scene), (image2, text2, scene2) in zip(whole[30:], tail):
        assert (text, scene) == (text2, scene2)
        np.testing.assert_array_equal(image, image2)
    assert any(a[2] != b[2] for a, b in zip(whole, drawn(40, seed=4)))


def test_images_are_uint8_and_never_the_same():
    images = np.stack([image for image, _, _ in drawn(200)])
    assert images.shape == (200, 32, 32, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 200
    assert (images.std(axis=(1, 2, 3)) > 10).all()


def test_larger_pictures_show_the_same_scene_with_more_in_it(monkeypatch):
    small, large = drawn(200), list(itertools.islice(scenes(3, 0, 128), 200))
    assert [item[1:] for item in small] == [item[1:] for item in large]
    pictures = np.stack([image for image, _, _ in large])
    means = pictures.reshape(200, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(means - np.stack([image for image, _, _ in small])).mean() < 4
    read = zip(large, describe(means.round().astype(np.uint8)))
    assert np.mean([v for (_, _, scene), found in read for v in confirmed(scene.facts(), found).values()]) >= 0.96
    monkeypatch.setattr(details, "adorn", lambda painter: None)
    adorned = {scene.subjects[0].kind for picture, _, scene in large[:60] if (picture != paint(scene, 128)).any()}
    assert adorned == set(KINDS)


@pytest.mark.parametrize("side", [0, 16, 100])
def test_a_side_is_a_multiple_of_32(side):
    with pytest.raises(ValueError, match=f"multiple of 32, not {side}"):
        paint(drawn(1)[0][2], side)


def test_style_changes_the_picture_and_nothing_else_does():
    _, _, scene = drawn(1)[0]
    np.testing.assert_array_equal(paint(scene), paint(scene))
    assert (paint(scene) != paint(dataclasses.replace(scene, style=scene.style + 1))).any()


def test_every_fact_occurs():
    facts = [scene.facts() for _, _, scene in drawn(1500)]

    def seen(*names):
        return {f[name] for f in facts for name in names if name in f}

    assert seen("sky") == set(SKIES) and seen("ground") == set(GROUNDS)
    assert seen("kind") == seen("kind2") | {"balloon", "rocket"} == set(KINDS)
    assert seen("color", "color2") == set(COLORS) and seen("size", "size2") == set(SIZES)
    assert seen("side") == set(SIDES) and seen("relation") == set(RELATIONS)


def test_a_full_caption_says_all_facts_and_a_random_one_some_of_them():
    rng = np.random.default_rng(0)
    lengths = set()
    for _, text, scene in drawn(1000):
        assert parse(caption(scene)) == scene.facts()
        for part in (text, caption(scene, rng)):
            stated = parse(part)
            assert "kind" in stated and stated.items() <= scene.facts().items()
            lengths.add(len(stated))
    assert min(lengths) <= 2 and max(lengths) >= 8


def test_captions_are_read_by_the_vocabulary():
    vocabulary = scene_vocabulary()
    assert len(WORDS) == len(set(WORDS)) <= 60
    for _, text, scene in drawn(1000):
        assert len(caption(scene).split()) <= PROMPT_LENGTH
        assert vocabulary.decode(vocabulary.encode(text)) == text
    for text in EXAMPLES:
        assert vocabulary.decode(vocabulary.encode(text)) == text
        parse(text)


def test_sentences_that_were_promised():
    assert parse("a red house on snow at night") == {
        "kind": "house", "color": "red", "ground": "snow", "sky": "night"
    }  # fmt: skip
    assert parse("a blue house on grass by day") == {
        "kind": "house", "color": "blue", "ground": "grass", "sky": "day"
    }  # fmt: skip
    facts = parse("a red house left of a green tree, on snow at night")
    assert facts["relation"] == "left" and (facts["kind2"], facts["color2"]) == ("tree", "green")


@pytest.mark.parametrize(
    "text", ["", "red house", "a house house", "a house on the moon", "a red", "a house at night by day"]
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="caption"):
        parse(text)
