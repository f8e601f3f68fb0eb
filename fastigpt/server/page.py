"""The page at /: files of static/ as they are, under a policy that lets nothing else in, and POST /rows for it."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fastigpt.server import rows
from fastigpt.server.errors import ApiError
from fastigpt.server.routes import service_of

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page(request: Request) -> Response:
    return _file(request, "page.html")


@router.get("/favicon.ico")
async def favicon(request: Request) -> Response:
    return _file(request, "icon.svg")


@router.get("/page/{name}")
async def static(request: Request, name: str) -> Response:
    return _file(request, name)


@router.post("/rows")
async def draw(request: Request) -> Response:
    """Draws images, row by row: see rows.py."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ApiError(403, "Another site's page must not draw here.", code="cross_site")
    service = service_of(request)
    return await rows.answer(service, request, await rows.understood(service, request))


def _file(request: Request, name: str) -> Response:
    found = _contents().get(name)
    if found is None:
        raise HTTPException(404)
    content, tag = found
    headers = {**HEADERS, "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=KINDS[name.rpartition(".")[2]])


@cache
def _contents() -> dict[str, tuple[bytes, str]]:
    """What is served, by name, and a tag that changes with it."""
    found = {}
    for file in files("fastigpt.server").joinpath("static").iterdir():
        if file.name.rpartition(".")[2] in KINDS:
            content = file.read_bytes()
            found[file.name] = content, f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    return found
