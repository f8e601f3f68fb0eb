"""The routes: /v1/images/generations, /v1/images/edits, /v1/models, and what operators ask."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from fastigpt.server.bodies import Body, read_edit, read_json
from fastigpt.server.errors import ApiError, json_response
from fastigpt.server.images import Asked, answer
from fastigpt.server.parameters import Edit, Generation, parsed
from fastigpt.server.pictures import Encoding, read_mask, read_upload
from fastigpt.server.schemas import EDITS, ERRORS, GENERATIONS, MODEL, MODELS, NAMED, TEXT
from fastigpt.server.service import Service

router = APIRouter()


def service_of(request: Request) -> Service:
    return request.app.state.service


@router.post("/v1/images/generations", responses=ERRORS, openapi_extra=GENERATIONS)
async def generations(request: Request) -> Response:
    """Draws images."""
    service = service_of(request)
    given = parsed(Generation, await read_json(request), strings=False)
    return await answer(service, request, generation_asked(service, given))


def generation_asked(service: Service, given: Generation | Edit) -> Asked:
    """What it means to a model. Raises ApiError."""
    served = service.find(given.model)
    how = _encoding(given, served.scale(given.size))
    return Asked("image_generation", given, served, served.generation(given), how)


@router.post("/v1/images/edits", responses=ERRORS, openapi_extra=EDITS)
async def edits(request: Request) -> Response:
    """Draws parts of an image anew: those where the mask, or the image itself, has alpha 0, or those below `rows`."""
    service = service_of(request)
    body = await read_edit(request)
    given = parsed(Edit, body.given, strings=body.strings)
    return await answer(service, request, await edit_asked(service, body, given))


async def edit_asked(service: Service, body: Body, given: Edit) -> Asked:
    """What it means to a model, its pictures decoded. Raises ApiError."""
    served = service.find(given.model)
    how = _encoding(given, served.scale(given.size))
    _check_pictures(body, given)
    limit = service.settings.max_pixels

    def decode() -> Asked:
        photo = read_upload(body.images[0], "image", limit)
        mask = None if body.mask is None else read_mask(body.mask, limit)
        job = served.edit(given, photo, mask)
        return Asked("image_edit", given, served, job, how, photo, (body.images[0],))

    return await service.decode(decode)


def _check_pictures(body: Body, given: Edit) -> None:
    if not body.images:
        raise ApiError(400, "Missing required parameter: 'image'.", param="image", code="missing_required_parameter")
    if len(body.images) > 1:
        message = f"This server edits one image at a time; there are {len(body.images)}."
        raise ApiError(400, message, param="image", code="invalid_value")
    if body.mask is not None and given.rows is not None:
        raise ApiError(400, "Send 'rows' or a mask, not both.", param="rows", code="invalid_value")


def _encoding(given: Generation | Edit, scale: int) -> Encoding:
    return Encoding(scale, given.output_format, 100 if given.output_compression is None else given.output_compression)


@router.get("/v1/models", responses=ERRORS | MODELS)
async def models(request: Request) -> Response:
    """The models that are served."""
    service = service_of(request)
    moderated = bool(service.settings.moderation)
    data = [served.described(moderated) for served in service.models.values()]
    return json_response({"object": "list", "data": data})


@router.get("/v1/models/{model:path}", responses=ERRORS | MODEL, openapi_extra=NAMED)
async def model(request: Request) -> Response:
    """One of them."""
    service = service_of(request)
    return json_response(service.find(request.path_params["model"]).described(bool(service.settings.moderation)))


@router.get("/healthz", responses=TEXT)
async def healthz() -> Response:
    """200 while the process runs."""
    return PlainTextResponse("ok\n")


@router.get("/readyz", responses={**TEXT, 503: {"description": "It shuts down, or a model failed."}})
async def readyz(request: Request) -> Response:
    """200 while images can be asked for, else 503."""
    ready = service_of(request).ready
    return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)


@router.get("/metrics", responses=TEXT)
async def metrics(request: Request) -> Response:
    """For Prometheus."""
    return Response(generate_latest(service_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
