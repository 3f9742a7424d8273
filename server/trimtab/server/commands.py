"""The server's commands for the `trimtab` CLI; vLLM is imported only when one of them runs."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

__all__ = ["serve"]

REFUSED = 2


def serve(
    model: Annotated[str, typer.Argument(help="The embedded model's name, an HF folder, or a hub id.")],
    bundle: Annotated[
        list[Path] | None, typer.Option(help="A bundle that requests may name; give it once for each.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve gRPC on this port too; 0 takes any free one.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="Speak TLS, on both ports, with this certificate (PEM, with its chain).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key (PEM).")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Callers must show a certificate of this authority (PEM): mutual TLS.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The id that requests name; MODEL by default.")] = None,
    on_failure: Annotated[
        Literal["closed", "open"],
        typer.Option(
            help="For requests that do not say: a reply that was not steered as asked is an error, or says so."
        ),
    ] = "closed",
    allow_bundle_upload: Annotated[
        bool, typer.Option(help="Callers may load, replace and remove bundles while the server runs.")
    ] = False,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TRIMTAB_API_KEY", show_envvar=True, help="Callers must send it as `Authorization: Bearer`."
        ),
    ] = None,
    engine_flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ENGINE FLAGS", help="Flags of `vllm serve`, passed on to the engine."),
    ] = None,
) -> None:
    """Serve MODEL on vLLM with the OpenAI API; requests may steer it with the latents of the loaded bundles."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)

    def say(line: str) -> None:
        console.print(f"trimtab: {line}", markup=False)

    from trimtab.attribution.bundle import BundleError
    from trimtab.attribution.embedded import EmbeddedModelError
    from trimtab.attribution.fingerprint import FingerprintError
    from trimtab.server.errors import TrimtabError

    try:
        from trimtab.server.service.preflight import TLS, Settings, preflight

        settings = Settings(
            model=model,
            bundles=tuple(bundle or ()),
            host=host,
            port=port,
            grpc_port=grpc_port,
            tls=TLS.of(tls_cert, tls_key, tls_client_ca),
            served_name=served_model_name or model,
            on_failure=on_failure,
            allow_bundle_upload=allow_bundle_upload,
            api_key=api_key or None,
            engine_flags=tuple(engine_flags or ()),
            say=say,
        )
        with preflight(settings) as ready:
            from trimtab.server.service.launch import run

            code = run(ready)
    except (TrimtabError, BundleError, FingerprintError, EmbeddedModelError) as e:
        say(str(e))
        raise typer.Exit(REFUSED) from None
    raise typer.Exit(code)
