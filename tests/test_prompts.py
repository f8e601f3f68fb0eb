"""Prompts: text to word ids, and errors that say what to write instead."""

import json

import pytest

from fastigpt.prompts import Vocabulary

VOCABULARY = Vocabulary(("<pad>", "a", "red", "house", "horse"), 5, ("a red house",))


def test_words_become_ids_padded_to_the_slots():
    assert VOCABULARY.encode("A RED, house!") == [1, 2, 3, 0, 0]
    assert VOCABULARY.decode([1, 2, 3, 0, 0]) == "a red house"


def test_unknown_words_are_named_with_near_ones():
    with pytest.raises(ValueError, match=r"'hous' \(near: house, horse\)"):
        VOCABULARY.encode("a red hous")
    with pytest.raises(ValueError, match=r"'xyzzy'.*knows a, horse, house, red"):
        VOCABULARY.encode("xyzzy")
    with pytest.raises(ValueError, match="unknown word 'pad'"):  # the padding is no word
        VOCABULARY.encode("<pad>")


@pytest.mark.parametrize("text", ["", "  ", "?!", "_"])
def test_a_prompt_without_words_is_refused(text):
    with pytest.raises(ValueError, match="has no words; try 'a red house'"):
        VOCABULARY.encode(text)


def test_a_long_prompt_is_refused():
    with pytest.raises(ValueError, match="6 words, the model reads at most 5"):
        VOCABULARY.encode("a a a a a a")
    with pytest.raises(TypeError, match="must be a string, not int"):
        VOCABULARY.encode(3)


def test_json_round_trip_passes_over_other_keys():
    data = json.loads(VOCABULARY.to_json()) | {"grammar": "…"}
    assert Vocabulary.from_json(json.dumps(data)) == VOCABULARY


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"words": ["<pad>"], "max_words": 3}',
        '{"words": ["<pad>", "a", "a"], "max_words": 3}',
        '{"words": ["<pad>", 7], "max_words": 3}',
        '{"words": "abc", "max_words": 3}',
        '{"words": ["<pad>", "a"], "max_words": 0}',
        '{"words": ["<pad>", "a"], "max_words": true}',
        '{"words": ["<pad>", "a"], "max_words": 3, "examples": [1]}',
        "not json",
    ],
)
def test_an_impossible_vocabulary_is_refused(text):
    with pytest.raises(ValueError):
        Vocabulary.from_json(text)
