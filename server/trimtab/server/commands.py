"""The server's commands for the `trimtab` CLI; vLLM is imported only when one of them runs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trimtab.server.console import REFUSED, say

__all__ = ["openapi", "serve"]

_CONFIG = "A TOML file of settings; flags and TRIMTAB_… variables count before it."


def serve(
    model: Annotated[str | None, typer.Argument(help="The embedded model's name, an HF folder, or a hub id.")] = None,
    bundle: Annotated[
        list[Path] | None, typer.Option(help="A bundle that requests may name; give it once for each.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 127.0.0.1. Any other needs an API key.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 8000. 0 takes any free one.")] = None,
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
        Literal["closed", "open"] | None,
        typer.Option(
            help="For requests that do not say: a reply that was not steered as asked is an error, or says so; closed."
        ),
    ] = None,
    allow_bundle_upload: Annotated[
        bool | None,
        typer.Option(help="Callers may load, replace and remove bundles of this one server, past the registry."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="The operator's own key, which may do everything; better in TRIMTAB_API_KEY, which nobody sees."
        ),
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="sqlite:///FILE, or postgresql://… for several replicas; the user's own file.")
    ] = None,
    signatures: Annotated[
        Literal["optional", "strict"] | None, typer.Option(help="`strict` loads signed bundles only; optional.")
    ] = None,
    trusted_key: Annotated[
        list[Path] | None, typer.Option(help="A PEM public key whose signatures count; once for each.")
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Generation requests at a time; more are a 503; 256.")
    ] = None,
    log_format: Annotated[Literal["text", "json"] | None, typer.Option(help="Of the log; text.")] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Traces go to this OTLP/HTTP collector, http://HOST:4318.")
    ] = None,
    config: Annotated[Path | None, typer.Option(envvar="TRIMTAB_CONFIG", help=_CONFIG)] = None,
    engine_flags: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- ENGINE FLAGS", help="Flags of `vllm serve`, passed on to the engine."),
    ] = None,
) -> None:
    """Serve MODEL on vLLM with the OpenAI API; requests may steer it with the latents of the loaded bundles.

    Every option is a setting: it may stand in a TRIMTAB_… variable or in the settings file as well (`trimtab config show`).
    """
    from trimtab.attribution.bundle import BundleError
    from trimtab.attribution.embedded import EmbeddedModelError
    from trimtab.attribution.fingerprint import FingerprintError
    from trimtab.server.errors import TrimtabError
    from trimtab.server.settings import load

    given: dict[str, Any] = {
        "model": model,
        "bundles": bundle,
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_client_ca": tls_client_ca,
        "served_model_name": served_model_name,
        "on_failure": on_failure,
        "allow_bundle_upload": allow_bundle_upload,
        "api_key": api_key,
        "database": database,
        "signatures": signatures,
        "trusted_keys": trusted_key,
        "max_requests": max_requests,
        "log_format": log_format,
        "otlp_endpoint": otlp_endpoint,
        "engine_flags": engine_flags,
    }
    try:
        settings = load(
            {name: value for name, value in given.items() if value not in (None, [])}, config=config
        ).settings
        from trimtab.server.operations import logs
        from trimtab.server.service.preflight import preflight

        logs.configure(settings.log_format)

        with preflight(settings, say) as ready:
            from trimtab.server.service.launch import run

            code = run(ready)
    except (TrimtabError, BundleError, FingerprintError, EmbeddedModelError) as e:
        say(str(e))
        raise typer.Exit(REFUSED) from None
    raise typer.Exit(code)


def openapi(
    out: Annotated[Path | None, typer.Option(help="Write it there; standard output by default.")] = None,
) -> None:
    """The OpenAPI document of the HTTP API, which a server shows at /openapi.json."""
    import json

    from trimtab.server.service.openapi.document import openapi as document

    text = json.dumps(document(), indent=1, ensure_ascii=False)
    if out is None:
        typer.echo(text)
    else:
        out.write_text(text + "\n")
