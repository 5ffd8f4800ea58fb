"""What keeps requests out before they are read: other hosts and sites, a missing key, size and time."""

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from vpt.serving.protocol import ApiError
from vpt.serving.settings import ServeConfig

OPEN = ("/", "/health", "/app.js", "/app.css", "/about", "/examples/")  # without a key
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Guard:
    """Refuses requests before they are read: for another host than ours, of another site's page, without the key. Tells
    `refused` the status.
    """

    app: ASGIApp
    config: ServeConfig
    api_key: str | None
    refused: Callable[[int], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self.check(Request(scope))
        except ApiError as error:
            self.refused(error.status)
            return await error.response()(scope, receive, send)
        return await self.app(scope, receive, send)

    def check(self, request: Request) -> None:
        """Raises ApiError."""
        host = request.headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.config.host in LOOPBACK and name.strip("[]") not in LOOPBACK:
            raise ApiError(403, f"this server is asked as {self.config.host}, not as {name[:80]!r}")
        path = request.scope["path"]  # a URL is put together from the header Host, too
        if self.api_key and not (path in OPEN or path.startswith(OPEN[-1])):
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
                message = "the header Authorization: Bearer KEY is missing or holds another key"
                raise ApiError(401, message, code="invalid_api_key")
        if request.method == "POST" and request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise ApiError(415, "a request's Content-Type is application/json")


async def read_body(request: Request, config: ServeConfig) -> bytes:
    """The body, within limits of size and time. Raises ApiError."""
    limit = int(config.max_body_mb * 2**20)
    too_large = ApiError(413, f"a request may have {limit:,} bytes", code="request_too_large")
    stated = request.headers.get("content-length", "0")
    if stated.isdigit() and len(stated) < 20 and int(stated) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the request took more than {config.body_timeout:g} s to arrive") from None
    return bytes(body)
