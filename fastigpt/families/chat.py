"""Prompts in the words of a chat, as ids of a published tokenizer.json."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastigpt.errors import CheckpointError
from fastigpt.extras import require
from fastigpt.prompts import advice
from fastigpt.untrusted import JSON_LIMIT, exists, read_bytes, refusing

WORDS = {
    "deepseek": ("<|User|>: ", "\n\n<|Assistant|>:"),  # Janus-Pro
    "deepseek_old": ("User: ", "\n\nAssistant:"),  # Janus-1.3B
}
"""What stands before and after a prompt, by what DeepSeek's processors call it (sft_format)."""
START, PAD, IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"


@dataclass(frozen=True)
class ChatReader:
    """tokenizer: the text of a tokenizer.json. longest: ids of the longest prefix. start, pad, image: the ids that
    begin a prefix, stand for what is left out, and end it. format: of WORDS."""

    tokenizer: str
    longest: int
    start: int
    pad: int
    image: int
    format: str = "deepseek"

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_tokenizer"}

    def prefix(self, prompt: str, name: str = "prompt") -> tuple[int, ...]:
        if not isinstance(prompt, str):
            raise TypeError(f"{name} must be a string, not {type(prompt).__name__}")
        before, after = WORDS[self.format]
        try:
            ids = self._tokenizer.encode(f"{before}{prompt}{after}{IMAGE}").ids
        except (TypeError, UnicodeError):  # half of a surrogate pair
            raise ValueError(f"{name} is no text that UTF-8 can hold") from None
        except Exception as error:  # what tokenizers raises for a word that it has no id for
            raise ValueError(f"{name}: {self._advice(prompt) or error}") from None
        found = tuple(ids) if ids[0] == self.start else (self.start, *ids)
        if len(found) > self.longest:
            raise ValueError(
                f"{name} has {len(found)} tokens with the words around it, the model reads at most {self.longest}"
            )
        return found

    def _advice(self, prompt: str) -> str:
        """On the words of a prompt that have no ids, where the tokenizer knows whole words only."""
        known = self._tokenizer.get_vocab()
        plain = self._tokenizer.normalizer.normalize_str(prompt) if self._tokenizer.normalizer else prompt
        pieces = self._tokenizer.pre_tokenizer.pre_tokenize_str(plain) if self._tokenizer.pre_tokenizer else []
        return advice([word for word in dict.fromkeys(word for word, _ in pieces) if word not in known], known)

    def unconditional(self, prefix: tuple[int, ...]) -> tuple[int, ...]:
        """As long, so that images of both stand at the same positions."""
        return (prefix[0], *[self.pad] * (len(prefix) - 2), prefix[-1])


def read(path: Path, longest: int, vocabulary: int, format: str = "deepseek") -> ChatReader:
    """vocabulary: how many ids the model has embeddings for. Raises CheckpointError; ImportError without the tokenizers
    package."""
    if not exists(path):
        raise CheckpointError(f"{path} is missing: without it no prompt can be read")
    require("tokenizers", for_="a model that reads prompts with a tokenizer.json")
    from tokenizers import Tokenizer

    with refusing(path, "is no tokenizer"):
        text = read_bytes(path, 4 * JSON_LIMIT).decode()
        tokenizer = Tokenizer.from_str(text)
        ids: dict[str, int] = tokenizer.get_vocab()
    missing = [token for token in (START, PAD, IMAGE) if token not in ids]
    if missing:
        raise CheckpointError(f"{path} does not know {missing[0]}, which prompts for images need")
    if max(ids.values()) >= vocabulary:
        raise CheckpointError(f"{path} has ids up to {max(ids.values())}, the model knows {vocabulary}")
    reader = ChatReader(text, longest, ids[START], ids[PAD], ids[IMAGE], format)
    with refusing(path, "cannot read the shortest prompt"):
        reader.prefix("")
    return reader
