"""Fetching images, from hosts that the operator has named and by https only."""

from collections.abc import Callable
from urllib.parse import urlsplit

import httpx

from vpt.serving.protocol import ApiError
from vpt.serving.settings import ServeConfig


def fetcher(config: ServeConfig) -> Callable[[str], bytes] | None:
    """The bytes at a URL of `image_hosts`; None where there are none. It follows no redirect."""
    if not config.image_hosts:
        return None
    hosts, limit = {*config.image_hosts}, int(config.max_body_mb * 2**20)

    def fetch(url: str) -> bytes:
        try:
            host = urlsplit(url).netloc
            if host not in hosts:
                raise ApiError(400, f"images are fetched from {', '.join(sorted(hosts))} only, not from {host[:80]!r}")
            data = bytearray()
            with httpx.stream("GET", url, timeout=config.body_timeout, follow_redirects=False) as reply:
                if reply.status_code != 200:
                    raise ApiError(400, f"{host} answers {reply.status_code} to {url[:200]}")
                for part in reply.iter_bytes():
                    data += part
                    if len(data) > limit:
                        raise ApiError(400, f"{url[:200]} has more than {limit:,} bytes")
            return bytes(data)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ApiError(400, f"{url[:200]} cannot be fetched: {error}") from None

    return fetch
