"""uvicorn, with a drain: the first signal refuses what is new and waits for what is in work, the second stops."""

import ipaddress
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from dgemma.serve.security import LOOPBACK
from dgemma.serve.service import Service


class Server(uvicorn.Server):
    def __init__(self, app: FastAPI, service: Service):
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=5)
        )
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.status == "closing":
            self.should_exit = self.force_exit = True
        self.service.status = "closing"

    async def on_tick(self, counter: int) -> bool:
        # Until all is answered the port stays open, so that clients are told why they are refused.
        drained = self.service.status == "closing" and not self.service.in_work.count
        return await super().on_tick(counter) or drained


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, or OSError that says which address is taken."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # without the address, which stands here in words
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; choose others by --host, --port") from None


def url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def hosts(host: str) -> tuple[str, ...] | None:
    """Names that a Host header may have: few on loopback, any elsewhere."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return (*LOOPBACK, host.lower()) if loopback else None
