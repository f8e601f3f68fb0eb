"""Bodies of requests: JSON and multipart forms become parameters and uploads, or an error that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from fastigpt.server.errors import ApiError, invalid, unsupported_parameter
from fastigpt.server.pictures import from_data_url
from fastigpt.untrusted import short

_LARGE = 1 << 20  # bytes of JSON that are worth a thread
_TEXT = 1 << 20  # bytes of a text field


@dataclass
class Body:
    """given: parameters by name, as they came. strings: whether all of them are strings. images, mask: files."""

    given: dict[str, Any]
    strings: bool = False
    images: list[bytes] = field(default_factory=list)
    mask: bytes | None = None


async def read_json(request: Request) -> dict[str, Any]:
    """The object that a request's body is. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"The body must be application/json here, not '{kind[:100]}'."
        raise ApiError(415, message, code="unsupported_content_type")
    body = await request.body()
    try:
        data = _parsed(body) if len(body) < _LARGE else await _in_thread(body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(
            400, f"We could not parse the JSON body of your request: {reason}.", code="invalid_json"
        ) from None
    if not isinstance(data, dict):
        raise ApiError(400, f"The body must be a JSON object, not {short(data, 60)}.", code="invalid_json")
    return data


async def _in_thread(body: bytes) -> Any:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(_parsed, body)


def _parsed(body: bytes) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no number of JSON")

    return json.loads(body, parse_constant=refuse)


async def read_edit(request: Request) -> Body:
    """The body of an edit, in either of its forms. Raises ApiError."""
    if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await _read_form(request)
    given = await read_json(request)
    images, mask = given.pop("images", None), given.pop("mask", None)
    if images is not None and not isinstance(images, list):
        raise invalid("images", f"images must be a list of objects with an image_url, not {short(images, 60)}.")
    body = Body(given, images=[_reference(image, "images") for image in images or []])
    if mask is not None:
        body.mask = _reference(mask, "mask")
    return body


def _reference(reference: Any, name: str) -> bytes:
    if isinstance(reference, dict) and reference.get("file_id") is not None:
        raise unsupported_parameter("file_id")
    url = reference.get("image_url") if isinstance(reference, dict) and reference.keys() <= _KEYS else None
    if not isinstance(url, str):
        raise invalid(name, f"{name} takes objects with an image_url, a data URL, not {short(reference, 60)}.")
    return from_data_url(url, name)


_KEYS = {"image_url", "file_id"}


async def _read_form(request: Request) -> Body:
    body = Body({}, strings=True)
    async with request.form(max_files=20, max_fields=100, max_part_size=_TEXT) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in ("image", "mask"):
                if not isinstance(value, UploadFile):
                    raise invalid(name, f"{name} must be a file.")
                content = await value.read()
                if name == "image":
                    body.images.append(content)
                elif body.mask is not None:
                    raise invalid(name, "There is more than one mask.")
                else:
                    body.mask = content
            elif isinstance(value, UploadFile):
                raise invalid(name[:100], f"'{name[:100]}' is no file.")
            elif key in body.given:
                raise invalid(key[:100], f"'{key[:100]}' is there more than once.")
            else:
                body.given[key] = value
    return body
