"""A server in this process, and clients that ask it over a real socket."""

import base64
import threading
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from openai import OpenAI

from vpt.cli.serve import build_server, listen
from vpt.serving.service import Service
from vpt.serving.settings import ServeConfig


@contextmanager
def serving(bundle, **settings):
    """Serve a model; yields the service, whose `url` is where it listens."""
    config = ServeConfig(checkpoint="outputs/tiny", port=0, **settings)
    service, listening = Service(bundle, config), listen(config)
    server = build_server(service, config)
    service.engine.start()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    service.url, service.server = f"http://127.0.0.1:{listening.getsockname()[1]}", server
    try:
        yield service
    finally:
        server.should_exit = True
        thread.join(20)
        service.engine.close()


def client(service, key="none"):
    return _client(f"{service.url}/v1", key)


@cache
def _client(url, key):
    return OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120)


def data_url(image: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()


def shown(image: Path) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def question(image: Path | None, text: str) -> list[dict]:
    parts = [shown(image)] if image else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask(service, image, text, *, key="none", stream=False, **settings):
    """One request through the official client; keys that OpenAI does not have go into `extra_body`."""
    own = ("action", "max_actions", "crop_margin", "action_prompt", "ablation", "pictures", "top_k")
    extra = {name: settings.pop(name) for name in own if name in settings}
    messages = text if isinstance(text, list) else question(image, text)
    return client(service, key).chat.completions.create(
        model="tiny", messages=messages, stream=stream, extra_body=extra, **settings
    )


def idle(service, seconds=20):
    """Wait until nothing is running or waiting; whether it came to that."""
    end = time.monotonic() + seconds
    engine = service.engine
    while engine.batch.rows or engine.waiting or engine.reserved:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True
