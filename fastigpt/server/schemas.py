"""What /openapi.json says of bodies that the routes read themselves."""

from __future__ import annotations

from typing import Any

from fastigpt.server.parameters import Common, Edit, Generation

Json = dict[str, Any]


def _object(properties: Json, required: list[str], **more: Any) -> Json:
    return {"type": "object", "properties": properties, "required": required, **more}


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_ERROR = _object(
    {
        "error": _object(
            {
                "message": _STRING,
                "type": _STRING,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            ["message", "type", "param", "code"],
        )
    },
    ["error"],
)
_PICTURE = _object({"b64_json": _STRING, "index": _INTEGER}, ["b64_json", "index"])
_ANSWER = _object(
    {
        "created": _INTEGER,
        "data": {"type": "array", "items": _PICTURE},
        "size": _STRING,
        "quality": _STRING,
        "background": _STRING,
        "output_format": _STRING,
        "usage": {"type": "object"},
        "seed": _INTEGER,
        "safety_identifier": _STRING,
    },
    ["created", "data", "size", "quality", "background", "output_format", "usage", "seed"],
)
_MODEL = _object(
    {
        "id": _STRING,
        "object": {"const": "model"},
        "created": _INTEGER,
        "owned_by": _STRING,
        "size": _STRING,
        "prompts": {"enum": ["words", "text", "class", "none"]},
        "temperature": {"type": ["number", "null"]},
        "guidance_scale": {"type": ["number", "null"]},
        "words": {"type": "array", "items": _STRING},
        "examples": {"type": "array", "items": _STRING},
        "moderated": {"type": "boolean"},
    },
    ["id", "object", "created", "owned_by"],
)
_WHY = {
    400: "Something is wrong with a parameter, or the operator refuses it.",
    401: "The key is not one of this server's.",
    404: "There is no such model.",
    405: "The route is asked in another way.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is of another kind.",
    429: "Too many images wait; Retry-After says when there is room.",
    500: "The server failed.",
    503: "The server shuts down.",
    504: "The images took too long.",
}


def _json(schema: Json, description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_STREAM = {"text/event-stream": {"schema": _STRING}}
_PICTURES = _json(_ANSWER, "Images, or a stream of them.")
_PICTURES["content"] |= _STREAM
ERRORS: dict[int | str, Json] = {status: _json(_ERROR, why) for status, why in _WHY.items()}
MODEL: dict[int | str, Json] = {200: _json(_MODEL, "A model.")}
MODELS: dict[int | str, Json] = {
    200: _json(_object({"data": {"type": "array", "items": _MODEL}}, ["data"]), "All models.")
}
TEXT: dict[int | str, Json] = {200: {"description": "As it should be.", "content": {"text/plain": {"schema": _STRING}}}}


def _nullable(kind: type[Common]) -> Json:
    """The JSON schema of parameters; null is as good as leaving one out."""
    schema = kind.model_json_schema()
    for name, field in schema["properties"].items():
        if name not in schema["required"] and "anyOf" not in field:
            told = {key: field.pop(key) for key in ("description", "default", "title") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **told}
    return schema


def _plain(kind: type[Common]) -> Json:
    """Of a form, which has no null."""
    schema = kind.model_json_schema()
    for name, field in schema["properties"].items():
        if "anyOf" in field:
            schema["properties"][name] = {**field["anyOf"][0], "description": field.get("description", "")}
    return schema


def _edit_form() -> Json:
    schema = _plain(Edit)
    file = {"type": "string", "format": "binary"}
    schema["properties"] |= {"image": file, "mask": file}
    schema["required"] = [*schema["required"], "image"]
    return schema


def _edit_json() -> Json:
    schema = _nullable(Edit)
    reference = _object({"image_url": {"type": "string", "description": "A data URL."}}, ["image_url"])
    one = {"type": "array", "items": reference, "minItems": 1, "maxItems": 1}
    schema["properties"] |= {"images": one, "mask": reference}
    schema["required"] = [*schema["required"], "images"]
    return schema


def _route(bodies: Json) -> Json:
    content = {kind: {"schema": schema} for kind, schema in bodies.items()}
    return {"requestBody": {"required": True, "content": content}, "responses": {"200": _PICTURES}}


NAMED: Json = {"parameters": [{"name": "model", "in": "path", "required": True, "schema": _STRING}]}
GENERATIONS = _route({"application/json": _nullable(Generation)})
EDITS = _route({"multipart/form-data": _edit_form(), "application/json": _edit_json()})
