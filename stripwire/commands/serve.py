"""Serving a repository, once it is checked."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from stripwire.options import AsJson, ControlToken, Exported, Mode
from stripwire.terminal import command, console, print_json, say, waiting, warn

app = typer.Typer()


@app.command(epilog="Example: stripwire verify repository && tritonserver --model-repository repository …")
def verify(
    repository: Exported,
    mode: Annotated[  # noqa: ARG001  one that does not exist is refused, and nothing else is asked of it
        Mode | None,
        typer.Option(
            help="What the server is told as --model-config-name; of a name that it does not know, it blocks."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check every file of a model repository against its manifest; what does not match must not be served."""
    from model_repository.manifest import verify_repository

    manifest = verify_repository(repository)
    if as_json:
        print_json({"repository": str(repository), "version": manifest["active"], "files": len(manifest["files"])})
        return
    say(f"{repository} matches its manifest: {len(manifest['files'])} files; version {manifest['active']} is active.")


@app.command(epilog="Example: stripwire serve repository --grpc-port 8001 --mode shadow")
def serve(
    repository: Exported,
    mode: Annotated[
        Mode, typer.Option(help="block answers one past the last class when trojaned; shadow only reports.")
    ] = "block",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines call.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="Port of HTTP, 0 for a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Port of gRPC, 0 for a free one.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Port of the Prometheus metrics, 0 for a free one.")] = 8002,
    quarantine: Annotated[
        Path | None, typer.Option(help="Folder for rejected inputs, the newest 1000 of them; see `stripwire monitor`.")
    ] = None,
    startup_timeout: Annotated[float, typer.Option(help="How long the models may take to load, in seconds.")] = 120.0,
    control_token: ControlToken = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The server's certificate chain (PEM): gRPC over TLS, HTTP on loopback only.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The private key (PEM) of that certificate.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file of the authorities that callers' certificates are from (mutual TLS).")
    ] = None,
) -> None:
    """Serve a model repository with the pip-installed Triton, until Ctrl-C."""
    from deploy.embedded.server import EmbeddedTriton
    from deploy.embedded.tls import server_tls
    from detector.serving import ON_THE_CPU
    from exporter.publishing import locked
    from model_repository.manifest import read_manifest

    if not repository.exists():
        with locked(repository):
            pass  # which brings back what a killed command was replacing
    read_manifest(repository)  # a folder that is none is said before ports that are taken
    server = EmbeddedTriton(
        repository,
        mode=mode,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        startup_timeout_seconds=startup_timeout,
        control_token=control_token,
        tls=server_tls(tls_cert, tls_key, tls_client_ca),
        quarantine=quarantine,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop as cleanly as for Ctrl-C
    try:
        with waiting("Loading the models …"):
            server.start()
        if server.misses_the_gpu():
            warn(f"a network was to run on the GPU, but {ON_THE_CPU}: is there CUDA 13, with cuDNN 9?")
        table = Table(title=escape(f"Serving {repository}, mode {mode}"), show_header=False)
        table.add_row("gRPC", server.grpc_address + (" (TLS)" if tls_cert else ""))
        table.add_row("HTTP", f"http://{server.http_address}")
        table.add_row("metrics", f"http://{server.metrics_address}/metrics")
        console.print(table)
        console.print("Ctrl-C stops it. From another terminal:")
        trust = ["--tls-ca", "AUTHORITIES"] if tls_cert else []
        if tls_client_ca is not None:
            trust += ["--tls-key", "KEY", "--tls-cert", "CERTIFICATE"]
        command("classify", "--url", server.grpc_address, *trust, "IMAGE")
        watching: list[str | Path] = [
            "--url",
            server.grpc_address,
            "--metrics-url",
            f"http://{server.metrics_address}/metrics",
        ]
        if quarantine is not None:
            watching += ["--quarantine", quarantine]
        command("monitor", "--canaries", repository, *watching, *trust)
        server.wait()
    except KeyboardInterrupt:
        console.print("Stopping.")
    finally:
        server.stop()
