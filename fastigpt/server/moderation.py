"""What the operator does not let anybody ask for or see. There is no filter unless the operator brings one.

A hook is a function of theirs, `--moderation module:function`, called before anything is drawn (stage "input") and with
every finished picture before it is sent (stage "output"):

    def moderate(question: Question) -> Refusal | None: ...

It runs in a thread of its own and may take its time; if it raises, the request fails. `--moderation https://…` asks an
endpoint instead (moderation_endpoint.py). `--blocked-words FILE` is the one
check that is built in: it reads prompts only.
"""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from fastigpt.server.errors import ApiError

Stage = Literal["input", "output"]
_WORD = re.compile(r"\w+")
_LIMIT = 16 << 20  # bytes of a file of words


@dataclass(frozen=True)
class Question:
    """What a hook is asked.

    stage: "input", before anything is drawn, or "output". model: its name. prompt, negative_prompt: as they were sent.
    level: "auto" or "low", as the client asked. safety_identifier: the client's, of its user. upload: the photograph
    that is to be edited. picture: the finished picture, at stage "output".
    """

    stage: Stage
    model: str
    prompt: str
    negative_prompt: str | None = None
    level: str = "auto"
    safety_identifier: str | None = None
    upload: Image.Image | None = None
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Refusal:
    """categories: why, in words that the client is told."""

    categories: Sequence[str] = ()

    def error(self, stage: Stage) -> ApiError:
        categories = [str(category) for category in self.categories]
        return ApiError(
            400,
            "Your request was rejected by the safety system. If you believe this is an error, contact whoever runs "
            f"this server. safety_violations=[{', '.join(categories)}]",
            type="image_generation_user_error",
            code="moderation_blocked",
            details={"moderation_details": {"moderation_stage": stage, "categories": categories}},
        )


Hook = Callable[[Question], Refusal | None]


def load_hook(name: str) -> Hook:
    """The function that "module:function" names. Raises ValueError if there is none."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"--moderation must be module:function, not {name!r}")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--moderation {name}: {error}") from None
    if not callable(hook):
        raise ValueError(f"--moderation {name} is no function")
    return hook


class BlockedWords:
    """Refuses prompts that hold one of the words or phrases of a file, one a line: whole words, after NFKC and case
    folding. Lines that are empty or begin with # count for nothing. Raises ValueError for a file that holds none."""

    def __init__(self, path: Path) -> None:
        try:
            if path.stat().st_size > _LIMIT:
                raise ValueError(f"it is larger than {_LIMIT} bytes")
            lines = path.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ValueError(f"--blocked-words {path}: {getattr(error, 'strerror', None) or error}") from None
        phrases = (_spaced(line) for line in lines if not line.startswith("#"))
        self._phrases = sorted({phrase for phrase in phrases if phrase.strip()})
        if not self._phrases:
            raise ValueError(f"--blocked-words {path} holds no words")

    def __call__(self, question: Question) -> Refusal | None:
        if question.stage == "output":
            return None
        text = _spaced(question.prompt) + _spaced(question.negative_prompt or "")
        return Refusal(["blocked_words"]) if any(phrase in text for phrase in self._phrases) else None


def _spaced(text: str) -> str:
    """Its words in one spelling, with a space around each."""
    words = _WORD.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))
    return f" {' '.join(words)} "


@dataclass(frozen=True)
class Moderation:
    """words: of the operator's file. hook: the operator's own."""

    words: BlockedWords | None = None
    hook: Hook | None = None

    def __bool__(self) -> bool:
        return self.words is not None or self.hook is not None

    @property
    def sees_pictures(self) -> bool:
        """Whether nothing of a picture may be shown before it was asked about."""
        return self.hook is not None

    def check(self, question: Question) -> None:
        """Raises ApiError for what is refused."""
        for hook in (self.words, self.hook):
            if hook is None:
                continue
            refusal = hook(question)
            if refusal is not None:
                if not isinstance(refusal, Refusal):
                    raise TypeError(f"a moderation hook returns None or a Refusal, not {type(refusal).__name__}")
                raise refusal.error(question.stage)
