"""HTTP on the control socket: each route is one operation, each answer is JSON, each body is bounded.

Hypercorn's connection handler is used without its worker: that one would bring its own listening, banner,
lifespan and graceful waiting, while here the nursery around `serve` decides when it ends, and it then ends at
once.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from weightfs.control.address import socket_path
from weightfs.control.documents import error_to_json, render
from weightfs.control.listener import BoundedListener, PeerCheckedListener, listening
from weightfs.control.metrics import Scraper
from weightfs.control.ports import Document, Operations
from weightfs.errors import DaemonError, SourceError, UsageError, WeightfsError

MAX_BODY: Final = 64 * 1024
# Hypercorn keeps a connection for so long even after its peer has gone; our own client closes after each answer.
IDLE: Final = 1.0  # seconds
MAX_REFS_IN_BODY: Final = 1000
MAX_ACCEPT: Final = 1024  # characters; Prometheus sends about 300

_NUMBER: Final = re.compile(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,4})?", re.ASCII)

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Any]]


async def serve(
    operations: Operations,
    cache: Path,
    *,
    scraper: Scraper | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer on the cache's control socket until cancelled. DaemonError if the socket cannot be made."""
    with listening(socket_path(cache)) as sock:
        listener = PeerCheckedListener(sock)
        await serve_connections(make_app(operations, scraper), listener, task_status=task_status)


async def serve_connections(
    app: Starlette,
    listener: BoundedListener,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer whoever `listener` lets in, until cancelled; then at once nobody any more."""
    handle = _connection_handler(app, listener)
    async with trio.open_nursery() as connections:
        try:
            task_status.started()
            await trio.serve_listeners(handle, [listener], handler_nursery=connections)
        finally:
            listener.cut()


def _connection_handler(
    asgi: Starlette, listener: BoundedListener
) -> Callable[[trio.SocketStream], Awaitable[None]]:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("weightfs.control.http")
    config.include_server_header = False
    config.keep_alive_timeout = IDLE
    app = ASGIWrapper(cast("ASGIFramework", asgi))
    context = WorkerContext(None)

    async def handle(stream: trio.SocketStream) -> None:
        try:
            # The annotation asks for an SSL stream; a plain one is what hypercorn itself passes for http.
            await TCPServer(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        except Exception:
            log.exception("a connection to a socket of weightfs failed")
        finally:
            listener.open_streams.discard(stream)
            await trio.aclose_forcefully(stream)

    return handle


def make_app(operations: Operations, scraper: Scraper | None = None) -> Starlette:
    """The ASGI application; docs/configuration.md describes the routes."""
    routes = [
        Route(path, _endpoint(partial(handler, operations)), methods=[method])
        for method, path, handler in (
            ("GET", "/v1/openapi.json", _openapi),
            ("GET", "/v1/health", _health),
            ("GET", "/v1/status", _status),
            ("GET", "/v1/inflight", _inflight),
            ("GET", "/v1/stacks", _stacks),
            ("GET", "/v1/refs", _refs),
            ("POST", "/v1/refs", _add),
            ("DELETE", "/v1/refs", _remove),
            ("POST", "/v1/update", _update),
            ("POST", "/v1/pin", _pin),
            ("POST", "/v1/mode", _mode),
            ("POST", "/v1/pause", _pause),
            ("POST", "/v1/gc", _gc),
            ("POST", "/v1/reload", _reload),
            ("POST", "/v1/fill", _fill),
            ("POST", "/v1/verify", _verify),
            ("POST", "/v1/repair", _repair),
            ("GET", "/v1/headers", _headers),
            ("GET", "/v1/details", _details),
            ("GET", "/v1/map", _map),
            ("GET", "/v1/chunks", _chunks),
            ("GET", "/v1/jobs/{job}", _job),
            ("DELETE", "/v1/jobs/{job}", _cancel),
        )
    ]
    if scraper is not None:
        routes.append(metrics_route(scraper))
    return Starlette(routes=routes, exception_handlers={404: _no_route, 405: _no_method})


async def _openapi(_: Operations, __: Request) -> Document:
    # It looks into the engine; a client of this module need not.
    from weightfs.control.openapi import describe

    return describe()


def metrics_route(scraper: Scraper) -> Route:
    """`GET /metrics`: docs/monitoring/README.md."""

    async def answer(request: Request) -> Response:
        try:
            found = await scraper.scrape(request.headers.get("accept", "")[:MAX_ACCEPT])
        except trio.TooSlowError:
            raise DaemonError(
                "the metrics could not be put together in time; the daemon is very busy"
            ) from None
        # The header goes out as it is: Starlette would add a charset to the one that has it.
        return Response(found.body, headers={"content-type": found.content_type})

    return Route("/metrics", _endpoint(answer), methods=["GET"])


async def _health(operations: Operations, _: Request) -> Document:
    return await operations.health()


async def _status(operations: Operations, _: Request) -> Document:
    return await operations.status()


async def _inflight(operations: Operations, _: Request) -> Document:
    return await operations.inflight()


async def _stacks(operations: Operations, _: Request) -> Document:
    return await operations.stacks()


async def _refs(operations: Operations, _: Request) -> Document:
    return {"refs": await operations.refs()}


async def _add(operations: Operations, request: Request) -> Document:
    body = await _body(request)
    return await operations.add(_text(body, "ref"), refresh=_flag(body, "refresh"))


async def _update(operations: Operations, request: Request) -> Document:
    return await operations.update(_text(await _body(request), "ref"))


async def _pin(operations: Operations, request: Request) -> Document:
    body = await _body(request)
    return await operations.pin(_text(body, "ref"), pinned=_needed_flag(body, "pinned"))


async def _mode(operations: Operations, request: Request) -> Document:
    body = await _body(request)
    return await operations.set_fill(_text(body, "ref"), _text(body, "mode"))


async def _pause(operations: Operations, request: Request) -> Document:
    body = await _body(request)
    ref = _text(body, "ref") if "ref" in body else None
    return await operations.pause(ref, paused=_needed_flag(body, "paused"))


async def _remove(operations: Operations, request: Request) -> Document:
    return await operations.remove(_text(await _body(request), "ref"))


async def _gc(operations: Operations, request: Request) -> Document:
    return await operations.gc(dry_run=_flag(await _body(request), "dry_run"))


async def _fill(operations: Operations, request: Request) -> Document:
    return await operations.start_fill(_text(await _body(request), "ref"))


async def _verify(operations: Operations, request: Request) -> Document:
    body = await _body(request)
    return await operations.start_verify(_texts(body, "refs"), repair=_flag(body, "repair"))


async def _repair(operations: Operations, request: Request) -> Document:
    return await operations.start_repair(_texts(await _body(request), "refs"))


async def _headers(operations: Operations, request: Request) -> Document:
    return await operations.headers(_query(request, "ref"), wait=_seconds(request))


async def _details(operations: Operations, request: Request) -> Document:
    return await operations.details(_query(request, "ref"), fetch=_query_flag(request, "fetch"))


async def _map(operations: Operations, request: Request) -> Document:
    by = _query(request, "by", "tensor")
    if by not in ("tensor", "layer"):
        raise UsageError("the parameter 'by' must be tensor or layer")
    return await operations.tensor_map(
        _query(request, "ref"), layers=by == "layer", fetch=_query_flag(request, "fetch")
    )


async def _chunks(operations: Operations, request: Request) -> Document:
    return await operations.chunk_map(_query(request, "ref"))


async def _rendered(document: Document) -> Response:
    body = await trio.to_thread.run_sync(lambda: "".join(render(document)).encode())
    return Response(body, media_type="application/json")


async def _job(operations: Operations, request: Request) -> Document:
    return await operations.job(request.path_params["job"], wait=_seconds(request))


async def _reload(operations: Operations, request: Request) -> Document:
    await _body(request)  # else the answer might come, and the connection end, before all of it is sent
    return await operations.reload()


async def _cancel(operations: Operations, request: Request) -> Document:
    return await operations.cancel_job(request.path_params["job"])


def _endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
    """`handler` with its document or its error as the response."""

    async def respond(request: Request) -> Response:
        try:
            answer = await handler(request)
            return answer if isinstance(answer, Response) else await _rendered(answer)
        except WeightfsError as error:
            return JSONResponse(error_to_json(error), status_code=_status_of(error))
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)
        except Exception as error:  # a fault in one answer must not end the daemon or its readers
            log.exception("the control request %s %s failed", request.method, request.url.path)
            told = DaemonError(
                f"the daemon failed in a way it should not ({type(error).__name__}); its log has the details"
            )
            return JSONResponse(error_to_json(told), status_code=HTTPStatus.INTERNAL_SERVER_ERROR)

    return respond


def _status_of(error: WeightfsError) -> HTTPStatus:
    match error:
        case UsageError():
            return HTTPStatus.BAD_REQUEST
        case SourceError():
            return HTTPStatus.BAD_GATEWAY
        case _:
            return HTTPStatus.CONFLICT


async def _no_route(request: Request, _: Exception) -> Response:
    error = UsageError(f"there is no {request.method} {request.url.path[:200]} on the control socket")
    return JSONResponse(error_to_json(error), status_code=HTTPStatus.NOT_FOUND)


async def _no_method(request: Request, _: Exception) -> Response:
    """RFC 9110 section 15.5.6. Starlette knows the methods of one route, and a path may have several."""
    there = {
        method
        for route in request.app.routes
        if route.path_regex.match(request.url.path)
        for method in route.methods
    }
    text = f"{request.url.path[:200]} is not asked with {request.method[:20]}, but with {', '.join(sorted(there))}"
    return JSONResponse(
        error_to_json(UsageError(text)),
        status_code=HTTPStatus.METHOD_NOT_ALLOWED,
        headers={"Allow": ", ".join(sorted(there))},
    )


async def _body(request: Request) -> dict[str, Any]:
    data = bytearray()
    async with contextlib.aclosing(request.stream()) as pieces:
        async for piece in pieces:
            data += piece
            if len(data) > MAX_BODY:
                raise UsageError(f"the request has over {MAX_BODY} bytes; send fewer refs at a time")
    try:
        body = json.loads(bytes(data))
    except (ValueError, RecursionError):
        raise UsageError("the request is not JSON") from None
    if not isinstance(body, dict):
        raise UsageError("the request is not a JSON object")
    return body


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"the request needs a text in the field {key!r}")
    return value


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"the field {key!r} must be true or false")
    return value


def _needed_flag(body: dict[str, Any], key: str) -> bool:
    if key not in body:
        raise UsageError(f"the request needs true or false in the field {key!r}")
    return _flag(body, key)


def _texts(body: dict[str, Any], key: str) -> list[str]:
    value = body.get(key, [])
    if (
        not isinstance(value, list)
        or len(value) > MAX_REFS_IN_BODY
        or not all(isinstance(item, str) for item in value)
    ):
        raise UsageError(f"the field {key!r} must be a list of at most {MAX_REFS_IN_BODY} texts")
    return value


def _query(request: Request, key: str, default: str = "") -> str:
    value = request.query_params.get(key, default)
    if not value:
        raise UsageError(f"the request needs the parameter {key!r}")
    return value


def _query_flag(request: Request, key: str) -> bool:
    value = request.query_params.get(key, "false")
    if value not in ("true", "false"):
        raise UsageError(f"the parameter {key!r} must be true or false")
    return value == "true"


def _seconds(request: Request) -> float:
    text = request.query_params.get("wait", "0")
    if not _NUMBER.fullmatch(text):  # `float` takes more: nan, inf, 1_000
        raise UsageError("the parameter 'wait' must be a number of seconds")
    return float(text)
