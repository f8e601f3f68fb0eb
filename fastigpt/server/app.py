"""The application: routes, errors in OpenAI's bodies, and what stands before both."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import fastigpt
from fastigpt.server.errors import ApiError
from fastigpt.server.middleware import Authorized, BodyLimit, Observed
from fastigpt.server.page import router as page
from fastigpt.server.routes import router
from fastigpt.server.service import Service

_MESSAGES = {404: "There is no such route.", 405: "The route is not asked in this way."}


def create_app(service: Service) -> FastAPI:
    """An ASGI application that serves these models; `app.state.service` is what its routes share."""
    settings = service.settings
    # No pages about the API: they would load scripts from elsewhere.
    app = FastAPI(title="fastigpt", version=fastigpt.__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.include_router(page)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    if settings.keys is not None:
        app.add_middleware(Authorized, keys=settings.keys, metrics=service.metrics)
    app.add_middleware(BodyLimit, limit=settings.max_body, patience=settings.body_patience, metrics=service.metrics)
    app.add_middleware(Observed, metrics=service.metrics)
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = _MESSAGES.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code="invalid_request", headers=error.headers).response()
