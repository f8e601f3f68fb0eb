"""What a model reads before it draws: words to ids, and what to say when a word is not among them."""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastigpt.classes import ClassNames
from fastigpt.scalars import whole


class PromptReader(Protocol):
    """What turns a prompt into what a model reads in front of the first token."""

    def prefix(self, prompt: str, name: str = "prompt") -> tuple[int, ...]:
        """Ids in 0 … n_prefix_tokens − 1, 1 to prefix_length of them (see ModelSpec). Raises ValueError for a prompt
        that the model cannot read, TypeError for anything but a string; `name` is the argument's in those."""
        ...

    def unconditional(self, prefix: tuple[int, ...]) -> tuple[int, ...]:
        """What guidance leads away from for this prefix where no negative prompt is given."""
        ...


_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


@dataclass(frozen=True)
class Vocabulary:
    """words: all of them, lower case; word 0 fills the slots behind a short prompt. max_words: slots of a prompt.
    examples: prompts the model is good at. Raises ValueError for a vocabulary no prompt could be read with."""

    words: tuple[str, ...]
    max_words: int
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("words", "examples"):
            values = getattr(self, name)
            if isinstance(values, str) or not all(isinstance(v, str) for v in values):
                raise ValueError(f"{name} must be a list of strings")
            object.__setattr__(self, name, tuple(values))
        if len(self.words) < 2:
            raise ValueError(f"words must hold the padding and at least one word, found {len(self.words)}")
        if len(set(self.words)) < len(self.words):
            twice = sorted(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words holds {', '.join(twice[:4])[:200]} more than once")
        object.__setattr__(self, "max_words", whole("max_words", self.max_words, 1))

    @property
    def n_words(self) -> int:
        return len(self.words)

    def encode(self, text: str, name: str = "prompt") -> list[int]:
        """max_words word ids: the text's words in lower case without punctuation, then padding (0).

        Raises ValueError for a text without words, with more than max_words, or with a word that is not known (the
        message lists near ones); TypeError for anything but a string. `name`: of the argument, for these messages.
        """
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string, not {type(text).__name__}")
        found = _WORD.findall(text.lower())
        if not found:
            raise ValueError(f"{name} {text!r} has no words; try {self._example()}")
        if len(found) > self.max_words:
            raise ValueError(f"{name} has {len(found)} words, the model reads at most {self.max_words}: {text!r}")
        ids = {word: i for i, word in enumerate(self.words) if i}
        unknown = [word for word in dict.fromkeys(found) if word not in ids]
        if unknown:
            raise ValueError(f"{name}: {advice(unknown, self.words[1:])}")
        return [ids[word] for word in found] + [0] * (self.max_words - len(found))

    def decode(self, ids: Sequence[int]) -> str:
        """The words of these ids, padding left out."""
        return " ".join(self.words[i] for i in ids if i)

    def _example(self) -> str:
        return repr(self.examples[0] if self.examples else self.words[1])

    def to_json(self) -> str:
        return json.dumps(
            {"words": list(self.words), "max_words": self.max_words, "examples": list(self.examples)}, indent=2
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Vocabulary:
        """Raises ValueError for anything but what to_json writes; other keys are passed over."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_dict(cls, data: object) -> Vocabulary:
        """The same from parsed JSON."""
        if not isinstance(data, dict) or not {"words", "max_words"} <= data.keys():
            raise ValueError('must be a JSON object with "words" and "max_words"')
        examples = data.get("examples", [])
        if not isinstance(data["words"], list) or not isinstance(examples, list):
            raise ValueError('"words" and "examples" must be lists of strings')
        try:
            return cls(tuple(data["words"]), data["max_words"], tuple(examples))
        except TypeError as error:
            raise ValueError(str(error)) from None


def advice(unknown: Sequence[str], known: Iterable[str]) -> str:
    """What to say about words that a model does not know; "" for none."""
    words, parts = [word for word in known if _WORD.fullmatch(word)], []
    for word in unknown:
        near = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
        parts.append(f"unknown word {word!r}" + (f" (near: {', '.join(near)})" if near else ""))
    if parts and not any("near" in part for part in parts):
        parts.append(f"the model knows {', '.join(sorted(words))}")
    return "; ".join(parts)


@dataclass(frozen=True)
class WordReader:
    """Reads the words of a vocabulary, all slots of a prompt, and then `start`."""

    vocabulary: Vocabulary
    start: tuple[int, ...]

    def prefix(self, prompt: str, name: str = "prompt") -> tuple[int, ...]:
        return (*self.vocabulary.encode(prompt, name), *self.start)

    def unconditional(self, prefix: tuple[int, ...]) -> tuple[int, ...]:
        return self.start


@dataclass(frozen=True)
class ClassReader:
    """Reads the number of a class, 0 … n_classes − 1, or its name where names are known; class n_classes is none."""

    n_classes: int
    names: ClassNames | None = None

    def prefix(self, prompt: str, name: str = "prompt") -> tuple[int, ...]:
        if not isinstance(prompt, str):
            raise TypeError(f"{name} must be a string, not {type(prompt).__name__}")
        text = prompt.strip()
        if self.names is not None and not (text.isascii() and text.isdecimal()):
            return (self.names.number(text, name),)
        if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) < self.n_classes):
            told = prompt if len(prompt) <= 60 else prompt[:57] + "..."
            raise ValueError(f"{name} must be the number of a class, 0 to {self.n_classes - 1}, not {told!r}")
        return (int(text),)

    def unconditional(self, prefix: tuple[int, ...]) -> tuple[int, ...]:
        return (self.n_classes,)


def prefixes(
    prompt: str | Sequence[str], count: int, reader: PromptReader | None, name: str = "prompt"
) -> list[tuple[int, ...]]:
    """What is read for one prompt for all `count` images, or one for each. Raises ValueError, also where there is no
    reader or another number of prompts, and TypeError."""
    if name == "label" and not isinstance(reader, ClassReader):
        raise ValueError("label was given, but this model knows no classes")
    if reader is None:
        raise ValueError(f"{name} was given, but this model reads no text")
    texts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a sequence of strings")
    if len(texts) != count:
        raise ValueError(f"{name} has {len(texts)} entries for {count} images")
    read = {text: reader.prefix(text, name) for text in dict.fromkeys(texts)}
    return [read[text] for text in texts]
