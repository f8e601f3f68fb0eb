"""What is wrong, in the words and bodies that OpenAI's clients know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """An answer with an error in it. param: the parameter it is about. details: more fields of the error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.code = status, type, code
        self.headers = dict(headers or {})
        self.error = {"message": message, "type": type, "param": param, "code": code, **(details or {})}

    def response(self) -> Response:
        return json_response({"error": self.error}, self.status, self.headers)


def json_response(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII: half a surrogate pair that somebody sent cannot be encoded otherwise."""
    return Response(json.dumps(data).encode(), status, dict(headers or {}), media_type="application/json")


def invalid(param: str, message: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")


def unknown_parameter(name: str, hint: str = "") -> ApiError:
    return ApiError(400, f"Unknown parameter: '{name}'.{hint}", param=name, code="unknown_parameter")


def unsupported_parameter(name: str) -> ApiError:
    return ApiError(
        400, f"Parameter '{name}' is not supported by this server.", param=name, code="unsupported_parameter"
    )


def no_such_model(name: str, there: Sequence[str]) -> ApiError:
    message = f"The model '{name}' does not exist; there is {', '.join(there)}."
    return ApiError(404, message, param="model", code="model_not_found")


def wrong_key() -> ApiError:
    headers = {"www-authenticate": "Bearer"}
    return ApiError(401, "Incorrect API key provided.", code="invalid_api_key", headers=headers)


def too_large(limit: int) -> ApiError:
    message = f"The request is larger than {limit} bytes."
    return ApiError(413, message, code="request_too_large", headers={"connection": "close"})


def too_slow(seconds: float) -> ApiError:
    message = f"The request did not arrive within {seconds:g} seconds."
    headers = {"connection": "close", "x-should-retry": "false"}
    return ApiError(408, message, code="request_timeout", headers=headers)


def queue_full(retry_after: int) -> ApiError:
    return ApiError(
        429,
        f"The server draws as much as it can; try again in {retry_after} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"retry-after": str(retry_after)},
    )


def draining() -> ApiError:
    return ApiError(
        503,
        "The server is shutting down.",
        type="server_error",
        code="server_shutting_down",
        headers={"retry-after": "1", "connection": "close"},
    )


def took_too_long(seconds: float) -> ApiError:
    return ApiError(
        504,
        f"The images were not drawn within {seconds:g} seconds.",
        type="server_error",
        code="timeout",
        headers={"x-should-retry": "false"},  # it would not be faster the next time
    )


def server_error() -> ApiError:
    """What went wrong is in the log; it may name files, and is nobody else's business."""
    message = "The server failed; its log tells more, under the id of this request."
    return ApiError(500, message, type="server_error", code="server_error")
