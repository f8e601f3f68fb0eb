"""Every parameter of the Images API and of ours, with its type and limits; what is wrong with one is told by name.

Drawing options are checked once more where `sample` and `complete` check them (options.py), which knows their limits.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from fastigpt.options import LAST_INDEX
from fastigpt.server.errors import ApiError, unknown_parameter, unsupported_parameter
from fastigpt.untrusted import short

Number = Annotated[float, Field(allow_inf_nan=False)]
MOST_IMAGES = 10
UNSUPPORTED = {"markup", "svg", "frame_count", "frame_duration_ms", "complexity"}
"""Known to OpenAI's newest models; nothing here could do what they ask."""


class Common(BaseModel):
    """What generations and edits take alike. A parameter that is null is as if it was not there."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: Annotated[str, Field(max_length=32_000, description="Words that the model knows, or nothing.")]
    model: Annotated[str | None, Field(description="Of those under /v1/models; the first if it is left out.")] = None
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES, description="Images; number j has index first_index + j.")] = 1
    size: Annotated[str, Field(description="auto, or a whole multiple of the model's own size, as WxH.")] = "auto"
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "xhigh", "max", "hd", "standard"] | None,
        Field(description="Has no effect."),
    ] = None
    background: Annotated[Literal["auto", "opaque"], Field(description="All images are opaque.")] = "auto"
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="Of webp and jpeg.")] = None
    moderation: Annotated[Literal["auto", "low"] | None, Field(description="Handed to the operator's hook.")] = None
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=3, description="Of a stream: real rows of the picture.")] = 0
    response_format: Literal["b64_json"] = "b64_json"
    style: Annotated[str | None, Field(description="Has no effect.")] = None
    user: Annotated[str | None, Field(description="Has no effect.")] = None
    safety_identifier: str | None = None
    seed: Annotated[int | None, Field(ge=0, lt=2**64, description="The same seed draws the same images.")] = None
    first_index: Annotated[int, Field(ge=0, le=LAST_INDEX, description="Number of the first image.")] = 0
    temperature: Annotated[Number | None, Field(ge=0)] = None
    top_k: Annotated[int | None, Field(ge=1)] = None
    top_p: Annotated[Number | None, Field(gt=0, le=1)] = None
    guidance_scale: Annotated[Number | None, Field(ge=0, description="How strongly to follow the prompt.")] = None
    negative_prompt: Annotated[str | None, Field(max_length=32_000, description="What guidance leads away from.")] = (
        None
    )

    def without_effect(self, moderated: bool) -> list[str]:
        """Parameters that were given and change nothing."""
        idle = {"quality", "input_fidelity", "style", "user"} | (set() if moderated else {"moderation"})
        return sorted(idle & self.model_fields_set)


class Generation(Common):
    """POST /v1/images/generations."""


class Edit(Common):
    """POST /v1/images/edits, without its pictures."""

    input_fidelity: Annotated[Literal["high", "low"] | None, Field(description="Has no effect.")] = None
    rows: Annotated[int | None, Field(ge=0, description="Keep this many rows of the model's grid from the top.")] = None


Parameters = TypeVar("Parameters", bound=Common)


def parsed(kind: type[Parameters], given: Mapping[str, Any], *, strings: bool) -> Parameters:
    """The parameters of a request. strings: numbers and booleans are strings, as in forms. Raises ApiError."""
    there = {name: value for name, value in given.items() if value is not None}
    for name in sorted(there.keys() & UNSUPPORTED):
        raise unsupported_parameter(name)
    for name in sorted(there.keys() - kind.model_fields.keys()):
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        raise unknown_parameter(name[:100], f" Did you mean '{near[0]}'?" if near else "")
    try:
        found = kind.model_validate(there, strict=not strings)
    except ValidationError as error:
        raise _told(error.errors(include_url=False, include_context=False)[0]) from None
    if "output_compression" in found.model_fields_set and found.output_format == "png":
        message = "'output_compression' is of 'webp' and 'jpeg'; this would be a 'png'."
        raise ApiError(400, message, param="output_compression", code="invalid_value")
    return found


def _told(error: ErrorDetails) -> ApiError:
    name = str(error["loc"][0])
    if error["type"] == "missing":
        message = f"Missing required parameter: '{name}'."
        return ApiError(400, message, param=name, code="missing_required_parameter")
    wrong_type = error["type"].endswith(("_type", "_parsing", "_from_float"))
    return ApiError(
        400,
        f"Invalid {'type' if wrong_type else 'value'} for '{name}': {short(error['input'], 60)}. {error['msg']}.",
        param=name,
        code="invalid_type" if wrong_type else "invalid_value",
    )
