"""The endpoint: routes of the OpenAI chat format over an `Engine`, counts for Prometheus, and the page."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vpt.errors import UserError
from vpt.generation.row_state import Answer
from vpt.serving.examples import ExampleImage, example_images
from vpt.serving.guard import Guard, read_body
from vpt.serving.metrics import Metrics
from vpt.serving.protocol import ApiError, event
from vpt.serving.replies import finish_reason
from vpt.serving.service import PendingRequest, Service
from vpt.serving.settings import ServeConfig

STATIC = Path(__file__).parent / "static"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"Content-Security-Policy": CSP, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
           "Cache-Control": "no-store"}  # fmt: skip


@dataclass
class Endpoint:
    """Handlers of the HTTP routes."""

    service: Service
    config: ServeConfig
    metrics: Metrics
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "prompts"))

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        engine, reserved = self.service.engine, 1
        engine.reserve(1)
        try:
            body = await read_body(request, self.config)
            loop = asyncio.get_running_loop()
            wanted = await loop.run_in_executor(self.pool, self.service.parse, body)
            more = (wanted.n or 1) - 1
            engine.reserve(more)
            reserved += more
            pending = await loop.run_in_executor(self.pool, self.service.read, wanted, loop)
            engine.submit(pending.rows)
            reserved = 0
        finally:
            engine.release(reserved)
        self.metrics.accepted(pending)
        if wanted.stream:
            counted = bool(wanted.stream_options and wanted.stream_options.include_usage)
            pieces = self.stream(pending, counted=counted)
            return StreamingResponse(pieces, media_type="text/event-stream", headers=HEADERS)
        return await self.whole(request, pending)

    async def whole(self, request: Request, pending: PendingRequest) -> Response:
        """All answers at once; rows whose client has gone are let go."""
        gone = asyncio.create_task(_disconnected(request))
        done = asyncio.create_task(self._collect(pending))
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                return Response(status_code=499)
            traces = [pending.traces[number] for number in range(len(pending.rows))]
            return JSONResponse(pending.writer.whole(pending.rows, done.result(), traces))
        finally:
            pending.cancel()
            for task in (gone, done):
                task.cancel()

    async def _collect(self, pending: PendingRequest) -> list[Answer]:
        answers = {number: told async for number, kind, told in self._events(pending) if kind == "done"}
        return [answers[number] for number in range(len(pending.rows))]

    async def _events(self, pending: PendingRequest) -> AsyncIterator[tuple[int, str, Any]]:
        """What the rows tell, until all have ended. Raises ApiError where one failed."""
        left = len(pending.rows)
        while left:
            number, kind, told = await pending.events.get()
            if kind == "step":
                told, draw = told
                if draw is not None:  # not in the engine's thread, which others wait for
                    told["pictures"] = await asyncio.get_running_loop().run_in_executor(self.pool, draw)
                pending.traces[number].append(told)
            self.metrics.told(pending, number, kind, told)
            if kind == "error":
                raise told
            yield number, kind, told
            left -= kind == "done"

    async def stream(self, pending: PendingRequest, *, counted: bool) -> AsyncIterator[bytes]:
        """Pieces as they come; rows whose client has gone are let go."""
        writer, answers = pending.writer, {}
        try:
            for number in range(len(pending.rows)):
                yield event(writer.piece(number, {"role": "assistant", "content": ""}))
            async for number, kind, told in self._events(pending):
                row = pending.rows[number]
                if kind == "text":
                    text, found = told
                    logprobs = None if row.top_logprobs is None else {"content": writer.logprobs(found, row)}
                    yield event(writer.piece(number, {"content": text}, logprobs=logprobs))
                elif kind == "step":
                    yield event(writer.piece(number, {"vpt": {"step": told}}))
                elif kind == "done":
                    answers[number] = told
                    yield event(
                        writer.piece(number, writer.extra(told, pending.traces[number]), finish=finish_reason(told))
                    )
            if counted:
                yield event(writer.counts([*answers.values()]))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield event({"error": error.error})
        finally:
            pending.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def build_app(
    service: Service, config: ServeConfig, *, api_key: str | None = None, examples: Sequence[ExampleImage] = ()
) -> FastAPI:
    """The application; its engine is started and ended by `vpt.cli.serve`. `examples`: the page's, else drawn ones."""
    app = FastAPI(title="vpt", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = Metrics(service.engine)
    app.add_middleware(Guard, config=config, api_key=api_key, refused=metrics.refused)
    endpoint = Endpoint(service, config, metrics)
    app.post("/v1/chat/completions")(endpoint.chat)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [service.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        service.check_name(name)
        return service.model_card()

    @app.get("/health")
    async def health() -> Response:
        draining = service.engine.draining
        return JSONResponse({"status": "ending" if draining else "ok"}, 503 if draining else 200)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    _add_page(app, service, config, examples or example_images(), keyed=api_key is not None)
    _add_errors(app, metrics)
    return app


def _add_page(
    app: FastAPI, service: Service, config: ServeConfig, examples: Sequence[ExampleImage], *, keyed: bool
) -> None:
    """The page and what it loads."""

    def file(name: str) -> Any:
        async def get() -> Response:
            return FileResponse(STATIC / name, headers=HEADERS)

        return get

    for path, name in (("/", "index.html"), ("/app.js", "app.js"), ("/app.css", "app.css")):
        app.get(path)(file(name))

    @app.get("/about")
    async def about() -> Any:
        urls = [{"url": f"/examples/{number}.png", "question": one.question} for number, one in enumerate(examples)]
        return JSONResponse(service.about() | {"examples": urls, "keyed": keyed, "urls": bool(config.image_hosts)})

    @app.get("/examples/{number}.png")
    async def example(number: int) -> Response:
        if not 0 <= number < len(examples):
            raise ApiError(404, "there is no such example")
        return Response(examples[number].png, media_type="image/png", headers=HEADERS)


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's shape, and counted."""

    def refusal(error: ApiError) -> Response:
        metrics.refused(error.status)
        return error.response()

    async def ours(_: Request, error: Exception) -> Response:
        return refusal(error if isinstance(error, ApiError) else ApiError(400, str(error)))

    async def others(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(ApiError(error.status_code, str(error.detail)))

    async def no_number(_: Request, error: Exception) -> Response:
        return refusal(ApiError(404, "there is no such path"))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)

    async def broken(_: Request, error: Exception) -> Response:
        return refusal(ApiError(500, "the server failed at this request", kind="server_error"))

    app.add_exception_handler(UserError, ours)
    app.add_exception_handler(HTTPException, others)
    app.add_exception_handler(RequestValidationError, no_number)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, broken)
