"""The reader of scenes: right on real renderings, in the palette's colours as well."""

import itertools

import numpy as np
import pytest

from fastigpt.bundled import bundled_palette
from fastigpt.scenes import scenes
from fastigpt.scenes.describe import canonical, confirmed, describe


def share_right(images, drawn):
    held = [v for scene, found in zip(drawn, describe(images)) for v in confirmed(scene.facts(), found).values()]
    return np.mean(held)


def test_facts_of_real_renderings_are_read():
    images, _, drawn = zip(*itertools.islice(scenes(2**31), 400))
    images = np.stack(images)
    assert share_right(images, drawn) >= 0.97
    palette = bundled_palette()
    assert share_right(palette.decode(palette.encode(images)), drawn) >= 0.97
    # the measure can fail: facts of other pictures are not confirmed
    assert share_right(images, drawn[1:] + drawn[:1]) < 0.5


def test_the_left_one_of_two_comes_first():
    facts = {"kind": "cat", "color": "red", "relation": "right", "kind2": "tree"}
    assert canonical(facts) == {"kind2": "cat", "color2": "red", "relation": "left", "kind": "tree"}
    assert canonical({"kind": "cat", "relation": "left"}) == {"kind": "cat", "relation": "left"}
    assert confirmed(facts, {"kind": "tree", "relation": "left", "kind2": "cat", "color2": "blue"}) == {
        "kind": True, "kind2": True, "relation": True, "color2": False
    }  # fmt: skip


@pytest.mark.parametrize("images", [np.zeros((32, 32, 3), np.uint8), np.zeros((1, 32, 32, 3), np.float32)])
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match="images must be uint8"):
        describe(images)
