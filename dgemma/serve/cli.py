"""`dgemma serve`. Importing this imports neither fastapi nor torch."""

import logging
import os
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer

from dgemma.flags import Device, Dtype, KVCache, Model, Quantize, UsageError

GIB = float(1 << 30)


def serve(
    model: Model = "sudoku",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="DGEMMA_API_KEY", help="what clients must present")] = None,
    rows: Annotated[int, typer.Option(min=1, help="requests in work at most")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="requests that may wait")] = 64,
    cache_gb: Annotated[float, typer.Option(min=0.001, help="GiB of keys and values of requests in work")] = 4.0,
    prefix_gb: Annotated[float, typer.Option(min=0.0, help="GiB of them kept for later requests")] = 1.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="MiB of a request's body")] = 8.0,
    media_host: Annotated[
        list[str] | None,
        typer.Option(help="HOST or HOST:PORT that images and video may be fetched from; may be given again"),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=0.1, help="seconds that a request may take")] = 600.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    name: Annotated[str | None, typer.Option(help="name of the model for clients", show_default="MODEL")] = None,
    trace: Annotated[Path | None, typer.Option(help="record every request here, for `dgemma trace`")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no line for each request")] = False,
) -> None:
    """Serve a model over HTTP in OpenAI's shape, with a page to watch it at /."""
    try:
        from dgemma.serve.app import make_app
        from dgemma.serve.server import Server, bind, hosts, url
        from dgemma.serve.service import Service
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic", "anyio"):
            raise
        raise UsageError(f"serve needs the extra: pip install 'dgemma[serve]' ({error})") from None
    if api_key == "":
        raise UsageError("--api-key is empty")
    from dgemma.engine.scheduler import Limits

    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("dgemma.serve").setLevel(logging.INFO)
    limits = Limits(rows=rows, waiting=queue, cache_bytes=int(cache_gb * GIB), prefix_bytes=int(prefix_gb * GIB))
    service = Service(name or model, limits, time_limit, trace, media_host or ())
    server = Server(make_app(service, api_key, int(max_body_mb * (1 << 20)), hosts(host), quiet), service)
    failed: list[Exception] = []

    with bind(host, port) as listening:

        def load() -> None:
            try:
                from dgemma.language_model import load

                service.open(load(model, device, dtype, quantize, kv_cache))
                print(f"{service.name} is served at {url(listening)}", flush=True)
            except Exception as error:
                failed.append(error)
                server.should_exit = True

        loading = threading.Thread(target=load, name="dgemma-load", daemon=True)
        loading.start()
        server.run(sockets=[listening])
    if loading.is_alive():
        os._exit(0)  # nothing can interrupt a load, and an interpreter that ends under it may crash
    service.close()
    if failed:
        raise failed[0]


def batch(
    requests: Annotated[Path, typer.Argument(help="JSONL file in OpenAI's batch format")],
    out: Annotated[Path, typer.Argument(help="JSONL file of results; one that is there is continued")],
    model: Model = "tiny",
    rows: Annotated[int, typer.Option(min=1, help="requests in work at most")] = 16,
    cache_gb: Annotated[float, typer.Option(min=0.001, help="GiB of keys and values of requests in work")] = 4.0,
    time_limit: Annotated[float, typer.Option(min=0.1, help="seconds that a request may take")] = 3600.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    kv_cache: KVCache = None,
    name: Annotated[str | None, typer.Option(help="name of the model in the requests", show_default="MODEL")] = None,
) -> None:
    """Answer a file of requests, as `dgemma serve` would, without a server: exactly one result for each line.

    A line of REQUESTS is {"custom_id", "method", "url", "body"}, one of OUT {"id", "custom_id", "response", "error"};
    "default" names any model. A run that was ended goes on when it is called again. The exit code is 1 if any line of
    this run has no answer.
    """
    try:
        from dgemma.serve.app import make_app
        from dgemma.serve.batch import answer, results
        from dgemma.serve.service import Service
    except ModuleNotFoundError as error:
        raise UsageError(f"batch needs the extra: pip install 'dgemma[serve]' ({error})") from None
    import asyncio

    from dgemma.engine.scheduler import Limits
    from dgemma.language_model import load

    service = Service(name or model, Limits(rows=rows, cache_bytes=int(cache_gb * GIB)), time_limit)
    told = [0, 0]

    def tell(there: int, failed: int) -> None:
        told[:] = there, failed
        print(f"\r{there} answered, {failed} of them without success", end="", file=sys.stderr, flush=True)

    with requests.open("rb") as lines, results(out) as (file, done):
        told[0] = len(done)
        service.open(load(model, device, dtype, quantize, kv_cache))
        try:
            asyncio.run(answer(make_app(service, quiet=True), lines, file, done, rows, tell))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            service.close()
            print(f"\r{told[0]} results are in {out}, {told[1]} new ones without success", file=sys.stderr)
    if told[1]:
        raise typer.Exit(1)
