"""The routes: embeddings, models, health and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from m2dexport.errors import M2DError
from m2dexport.serve.batching import Batcher
from m2dexport.serve.messages import Limits, Prepared, Refusal, prepare, render
from m2dexport.serve.metrics import Metrics
from m2dexport.serve.served import Served

_BODY_WITHIN_S = 30  # from a request's head to the end of its body
#: What takes longer than some milliseconds must not hold up the other requests.
_QUICK_BYTES, _QUICK_VALUES = 1 << 13, 1 << 13
_CLIENT_GONE = 499  # as other servers log it; nobody receives it
_SPACE_HEADER = "x-m2dexport-space"

T = TypeVar("T")


class Service:
    """What the routes share.

    Args:
        served: the bundle.
        limits: what requests may ask for.
    """

    def __init__(self, served: Served, limits: Limits) -> None:
        self.limits = limits
        self.metrics = Metrics()
        self.batcher = Batcher(self.metrics.batches.observe)
        self.stopping = False  # every answer closes its connection now
        self.at_work: set[asyncio.Task[Any]] = set()  # on requests, from their head to the answer
        self.metrics.watch("queue_texts", "Texts that wait.", lambda: self.batcher.waiting)
        self.metrics.watch("requests_at_work", "Requests at work.", lambda: len(self.at_work))
        self.serve(served)

    def serve(self, served: Served) -> None:
        """Answer requests that come from now on by this bundle."""
        self.served = served
        self.metrics.serves(served.name, served.space_id)

    async def embeddings(self, request: Request) -> Response:
        """Answer a request for embeddings, with an error where it must be."""
        began = time.perf_counter()
        try:
            response = await self._admitted(request)
        except Refusal as refusal:
            response = _refused(refusal)
        except ClientDisconnect:
            response = Response(status_code=_CLIENT_GONE)
        except M2DError as error:  # of the engine
            response = _refused(Refusal(500, str(error)))
        except asyncio.CancelledError:
            if not self.stopping:
                raise
            response = _refused(Refusal(503, "the server stops and did not wait for this request."))
        if self.stopping:
            response.headers["connection"] = "close"
        self.metrics.requests.labels(response.status_code).inc()
        self.metrics.seconds.observe(time.perf_counter() - began)
        return response

    def abandon(self) -> int:
        """Answer all requests at work with an error, and return how many those are."""
        for task in self.at_work:
            task.cancel()
        return len(self.at_work)

    async def models(self, request: Request) -> Response:
        """List the one model."""
        return JSONResponse({"object": "list", "data": [_card(self.served)]})

    async def model(self, request: Request) -> Response:
        """Describe the model, by one of its names."""
        name, served = request.path_params["name"], self.served
        if name not in (served.name, served.space_id):
            raise HTTPException(404)
        return JSONResponse(_card(served))

    async def health(self, request: Request) -> Response:
        """Say whether it takes requests; what answers has loaded its bundle."""
        status = "stopping" if self.stopping else "ready"
        return JSONResponse({"status": status}, 503 if self.stopping else 200)

    async def page(self, request: Request) -> Response:
        """Return the metrics."""
        return Response(self.metrics.page(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _admitted(self, request: Request) -> Response:
        if len(self.at_work) >= self.limits.requests:
            raise Refusal(
                429, f"{len(self.at_work)} requests are at work; try again later.", "queue_full"
            )
        task = asyncio.current_task()
        assert task is not None
        self.at_work.add(task)
        try:
            body = await _body(request, self.limits.body_bytes)
            return await _unless_gone(request, self._answer(body))
        finally:
            self.at_work.discard(task)

    async def _answer(self, body: bytes) -> Response:
        served = self.served
        prepared = await _aside(len(body) > _QUICK_BYTES, prepare, body, served, self.limits)
        codes = await self.batcher.encode(served.encoder, prepared.ids)
        content = await _aside(codes.size > _QUICK_VALUES, render, prepared, codes)
        self._count(prepared)
        headers = {_SPACE_HEADER: served.space_id}
        return Response(content, headers=headers, media_type="application/json")

    def _count(self, prepared: Prepared) -> None:
        self.metrics.texts.inc(len(prepared.ids))
        self.metrics.tokens.inc(prepared.tokens)
        self.metrics.truncated.inc(prepared.truncated)


def make_app(service: Service, beside: Callable[[], Awaitable[None]] | None = None) -> Starlette:
    """Return the ASGI application.

    Args:
        service: what it answers with.
        beside: what else runs as long as it does.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        work = [service.batcher.work, *([beside] if beside else [])]
        tasks = [asyncio.ensure_future(each()) for each in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()

    return Starlette(
        routes=[
            Route("/v1/embeddings", service.embeddings, methods=["POST"]),
            Route("/v1/models", service.models),
            Route("/v1/models/{name}", service.model),
            Route("/healthz", service.health),
            Route("/metrics", service.page),
        ],
        exception_handlers={HTTPException: _no_route, Exception: _failed},
        lifespan=lifespan,
    )


def _card(served: Served) -> dict[str, Any]:
    spec = served.encoder.spec
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "m2dexport",
        **served.facts(),
        "dimensions": spec.dim,
        "max_tokens": spec.max_length,
        "prompts": sorted(spec.prompts),
    }


def _refused(refusal: Refusal) -> Response:
    headers = {"retry-after": "1"} if refusal.status == 429 else None
    return JSONResponse(refusal.body(), refusal.status, headers)


def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    sentence = f"{method} {path} is not served here; see GET /v1/models and POST /v1/embeddings."
    refusal = Refusal(error.status_code, sentence)
    return JSONResponse(refusal.body(), error.status_code, error.headers)


def _failed(request: Request, error: Exception) -> Response:
    return _refused(Refusal(500, "the server failed; its log says where."))


async def _body(request: Request, most: int) -> bytes:
    try:
        return await asyncio.wait_for(_read(request, most), _BODY_WITHIN_S)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"the body took longer than {_BODY_WITHIN_S} s.") from error


async def _read(request: Request, most: int) -> bytes:
    too_large = Refusal(413, f"the body is larger than {most:,} bytes; send several requests.")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > most:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)


async def _unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """Return the answer; drop the work for it when the client goes away before."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _aside(slow: bool, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function, in a thread if it is slow."""
    return await asyncio.to_thread(function, *arguments) if slow else function(*arguments)
