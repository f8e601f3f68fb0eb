"""A moderation hook that asks an HTTP endpoint of the operator's choice, in the format of OpenAI's `/v1/moderations`.

It is sent {"input": [{"type": "text", "text": …}, {"type": "image_url", "image_url": {"url": "data:image/png;…"}}]} and
answers {"results": [{"flagged": true, "categories": {"violence": true, …}}]}. The key, where one is needed, is in the
environment (FASTIGPT_MODERATION_KEY), not on the command line, which others can read.
"""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from fastigpt.server.moderation import Question, Refusal

KEY = "FASTIGPT_MODERATION_KEY"
_SECONDS = 30.0
_LIMIT = 1 << 20  # bytes of an answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Prompts, pictures and the key go where the operator said and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Endpoint:
    """url: http or https; it is asked about every request and every finished picture. Raises ValueError for another
    URL. A call raises OSError if the endpoint does not answer, ValueError if its answer is not of the format."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--moderation {url}: expected http://host/path or https://host/path")
        self._url = url
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._headers = {"content-type": "application/json"}
        if key := os.environ.get(KEY):
            self._headers["authorization"] = f"Bearer {key}"

    def __call__(self, question: Question) -> Refusal | None:
        asked = _inputs(question)
        if not asked:
            return None
        body = json.dumps({"input": asked}).encode()
        request = urllib.request.Request(self._url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=_SECONDS) as answer:
                told = answer.read(_LIMIT + 1)
        except urllib.error.HTTPError as error:
            error.close()
            raise OSError(f"the moderation endpoint answered with status {error.code}") from None
        return _refusal(told)


def _inputs(question: Question) -> list[dict[str, Any]]:
    """At the stage "output" the picture, at "input" everything else that there is."""
    if question.stage == "output":
        return [] if question.picture is None else [_image(question.picture)]
    texts = [text for text in (question.prompt, question.negative_prompt) if text]
    inputs: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts]
    return inputs if question.upload is None else [*inputs, _image(question.upload)]


def _image(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def _refusal(told: bytes) -> Refusal | None:
    if len(told) > _LIMIT:
        raise ValueError(f"the moderation endpoint's answer is larger than {_LIMIT} bytes")
    try:
        results = json.loads(told)["results"]
        flagged = [result for result in results if _flag(result)]
        found = {name for result in flagged for name, value in result.get("categories", {}).items() if value is True}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("the moderation endpoint's answer is not of the format of /v1/moderations") from None
    if not results:
        raise ValueError("the moderation endpoint's answer holds no result")
    return Refusal(sorted(found)) if flagged else None


def _flag(result: Any) -> bool:
    if not isinstance(result["flagged"], bool):
        raise TypeError
    return result["flagged"]
