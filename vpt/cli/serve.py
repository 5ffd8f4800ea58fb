"""Serve a trained model: an endpoint of the OpenAI chat format, and a page to watch it look again.

    vpt serve checkpoint=RUN [port=8000] [KEY=VALUE ...] [--api-key KEY]

    vpt serve checkpoint=outputs/demo
    vpt serve checkpoint=outputs/demo port=8080 max_rows=16 generation.max_new_tokens=128

The page is at http://127.0.0.1:8000/, the endpoint at http://127.0.0.1:8000/v1. The model listens on this machine only
unless host is set. SIGTERM ends it once the answers that run have ended.

"""

import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import fields, replace
from types import FrameType

import uvicorn
from omegaconf import OmegaConf

from vpt.checkpoint.load import load_any_config, load_pretrained
from vpt.cli.ask import compose_settings
from vpt.config.validate import generation_settings
from vpt.config.weight_folder import moved_paths
from vpt.errors import ConfigError
from vpt.serving.app import build_app
from vpt.serving.examples import ExampleImage, example_images
from vpt.serving.service import Service
from vpt.serving.settings import ServeConfig
from vpt.utils.heap import share_heap
from vpt.utils.threads import set_threads


class Server(uvicorn.Server):
    """Refuses what comes once it is told to end, and finishes what runs."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's own, which would end the process by the signal: it is to end with 0."""
        self.service.engine.drain()
        if self.should_exit and sig == signal.SIGINT:  # the second Ctrl-C
            self.service.engine.abandon()
            self.force_exit = True
        self.should_exit = True


def main(arguments: Sequence[str]) -> None:
    """`vpt serve`."""
    config = read_arguments(arguments)
    share_heap()
    threads = set_threads(config.threads, spare=1)  # the event loop and the reading of prompts take a core
    paths = moved_paths(config.model, config.encoder)
    trained = load_any_config(config.checkpoint, paths)
    generation_settings(trained, config.generation)  # before the weights
    listening = listen(config)
    service = Service(load_pretrained(config.checkpoint, device=config.device, paths=paths), config)
    server = build_server(service, config, example_images(trained))
    service.engine.start()
    address = url_of(listening)
    print(f"{service.name}: page {address}/, endpoint {address}/v1\n{threads}", flush=True)
    try:
        server.run(sockets=[listening])
    finally:
        service.engine.close()


def build_server(service: Service, config: ServeConfig, examples: Sequence[ExampleImage] = ()) -> Server:
    """The server of a service, to be run over a socket; the service's engine is started and closed by the caller."""
    app = build_app(service, config, api_key=config.api_key, examples=examples)
    # One longer than an answer may take, a bounded number of connections, and headers of a bounded size.
    settings = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=int(config.timeout) + 1, limit_concurrency=1000,
        h11_max_incomplete_event_size=65536, server_header=False,
    )  # fmt: skip
    return Server(settings, service)


def listen(config: ServeConfig) -> socket.socket:
    """A socket at host and port. Raises ConfigError where they are not free."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        raise ConfigError(f"host={config.host} port={config.port}: {error.strerror}; give another port=N") from None
    return listening


def url_of(listening: socket.socket) -> str:
    """What clients call the address at which a socket listens."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def read_arguments(arguments: Sequence[str]) -> ServeConfig:
    """Parse settings and `--api-key KEY`. Raises ConfigError for a key that does not exist, with the nearest one."""
    left, key = list(arguments), None
    if "--api-key" in left:
        at = left.index("--api-key")
        key = left[at + 1] if at + 1 < len(left) else None
        if not key:
            raise ConfigError("--api-key needs a key; type --api-key KEY")
        del left[at : at + 2]
    config, texts = compose_settings(left, ServeConfig)
    if texts:
        raise ConfigError(f"{texts[0]!r} is no KEY=VALUE; type vpt serve checkpoint=RUN port=8000")
    return replace(config, api_key=key or config.api_key or os.environ.get("VPT_API_KEY") or None)


def help_text() -> str:
    """Keys and their defaults, as YAML."""
    defaults = ServeConfig(checkpoint="")
    keys = [item.name for item in fields(ServeConfig) if item.name != "checkpoint"]
    return OmegaConf.to_yaml(OmegaConf.create({key: getattr(defaults, key) for key in keys}))
