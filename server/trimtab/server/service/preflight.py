"""What can be wrong before the engine starts, found before it starts, and before vLLM is even imported."""

import ipaddress
import json
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from trimtab.attribution.bundle import Bundle, BundleError, ModelIdentity
from trimtab.attribution.embedded import resolve
from trimtab.attribution.fingerprint import model_fingerprint, model_folder, tokenizer_digest
from trimtab.attribution.graders import Grader, GraderError, load_grader
from trimtab.server.database.database import Database, text_of, utc_now
from trimtab.server.errors import Unsupported
from trimtab.server.experiments.feature_flags import Assigner
from trimtab.server.keys.key import Key
from trimtab.server.keys.secret import Secret, open_secret
from trimtab.server.keys.store import Keys
from trimtab.server.registry.signature import Signatures
from trimtab.server.settings import Settings

__all__ = ["TLS", "Preflight", "preflight"]

MIN_KEY_LENGTH = 16
_WIDTH, _DEPTH = ("hidden_size", "n_embd", "d_model"), ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What architectures call them in config.json."""


@dataclass(frozen=True)
class TLS:
    """The files, PEM, of a server that speaks TLS."""

    certificate: Path
    """The server's, and the chain above it."""
    key: Path
    client_ca: Path | None
    """Whoever calls must show a certificate of this authority; None asks for none."""

    @classmethod
    def of(cls, certificate: Path | None, key: Path | None, client_ca: Path | None) -> "TLS | None":
        """TLS with these files; None for a server without.

        Raises:
            Unsupported: one of certificate and key is missing, or a file cannot be read.
        """
        if certificate is None or key is None:
            if certificate or key or client_ca:
                raise Unsupported("--tls-cert and --tls-key go together, and --tls-client-ca needs both")
            return None
        for path in (certificate, key, client_ca):
            if path is not None and not os.access(path, os.R_OK):
                raise Unsupported(f"{path} cannot be read; give a PEM file")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            if client_ca is not None:
                context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as e:
            raise Unsupported(f"{certificate}, {key} are no certificate and its key, or one is not PEM ({e})") from e
        return cls(certificate, key, client_ca)


class Preflight(NamedTuple):
    """What a server starts from, checked."""

    settings: Settings
    folder: Path
    """The model's files."""
    identity: ModelIdentity
    """The model as a bundle names it."""
    bundles: dict[str, Bundle]
    database: Database
    """With its tables."""
    secret: Secret
    signatures: Signatures
    tls: TLS | None
    """Of both ports."""
    graders: dict[str, Grader]
    """Those that experiments may name."""
    assigner: Assigner | None
    """The OpenFeature provider that decides arms."""
    sock: socket.socket
    """Bound, not yet listening."""
    say: Callable[[str], None]
    """Tells the operator one line."""


@contextmanager
def preflight(settings: Settings, say: Callable[[str], None]) -> Iterator[Preflight]:
    """The checked start of a server; its port is held until the end.

    Raises:
        TrimtabError, BundleError, FingerprintError, EmbeddedModelError: with one sentence that says what to do.
    """
    if not settings.model:
        raise Unsupported("no model is named; give it to `trimtab serve`, in TRIMTAB_MODEL, or in the settings file")
    _check_plugins()
    tls = TLS.of(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    signatures = Signatures(settings.signatures, settings.trusted_keys)
    signatures.require_keys()
    bundles = _bundles(settings.bundles)
    graders = _graders(settings.graders)
    provider = settings.openfeature_provider
    assigner = None if provider is None else Assigner.load(provider)
    with closing(Database(settings.database)) as database:
        database.migrate()
        secret = open_secret(database, None if settings.secret is None else settings.secret.get_secret_value())
        _check_exposure(settings, Keys(database, secret).list(), say)
        with _listen(settings.host, settings.port) as sock:
            if settings.grpc_port:
                with _listen(settings.host, settings.grpc_port, "--grpc-port"):
                    pass  # It is bound again once the engine runs.
            folder = model_folder(resolve(settings.model))
            identity = _identity(settings.model, folder)
            for bundle in bundles.values():
                bundle.check_model(identity)
            yield Preflight(
                settings, folder, identity, bundles, database, secret, signatures, tls, graders, assigner, sock, say
            )


def _graders(sources: Sequence[str]) -> dict[str, Grader]:
    found: dict[str, Grader] = {}
    for source in sources:
        try:
            grader = load_grader(source)
        except GraderError as e:
            raise Unsupported(str(e)) from e
        if grader.name in found:
            raise Unsupported(f"two graders are named {grader.name!r}, the second is {source}; leave one of them out")
        found[grader.name] = grader
    return found


def _check_plugins() -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "trimtab" not in [name.strip() for name in allowed.split(",")]:
        raise Unsupported(f"VLLM_PLUGINS={allowed} leaves out the plugin `trimtab`; unset it, or add trimtab to it")


def _check_exposure(settings: Settings, keys: Sequence[Key], say: Callable[[str], None]) -> None:
    operator_key = settings.operator_key
    if operator_key is not None and len(operator_key) < MIN_KEY_LENGTH:
        raise Unsupported(
            f"the API key is shorter than {MIN_KEY_LENGTH} characters; make one with `openssl rand -hex 32`"
        )
    valid = sum(key.is_valid(text_of(utc_now())) for key in keys)
    if operator_key is not None or valid:
        operator = "the operator's own key" if operator_key is not None else "no operator's key"
        say(f"keys are asked for: {operator}, and {valid} of the database")
    elif keys:
        say(
            "keys are asked for, and none is valid: `trimtab keys create` makes one, or TRIMTAB_API_KEY sets the operator's"
        )
    elif not _is_loopback(settings.host):
        raise Unsupported(
            f"--host {settings.host} can be reached from other machines and there is no API key; make one with "
            "`trimtab keys create`, or set TRIMTAB_API_KEY (`openssl rand -hex 32`), or serve on 127.0.0.1"
        )
    else:
        say(
            "no API key: every program on this machine may call this server, administration included (`trimtab keys create` "
            "makes a key, and from then on one is asked for)"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _listen(host: str, port: int, flag: str = "--port") -> Iterator[socket.socket]:
    """The bound socket: a port that is taken is found before the engine starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as e:
            raise Unsupported(f"cannot listen on {host} port {port}: {e.strerror}; {flag} 0 takes a free one") from e
        yield sock


def _bundles(paths: Sequence[Path]) -> dict[str, Bundle]:
    bundles: dict[str, Bundle] = {}
    for path in paths:
        bundle = Bundle.load(path)
        name = bundle.header.name
        if name in bundles:
            raise BundleError(f"two bundles are named {name!r}, the second is {path}; leave one of them out")
        bundles[name] = bundle
    return bundles


def _identity(model: str, folder: Path) -> ModelIdentity:
    """The served model as a bundle records it."""
    try:
        config = json.loads((folder / "config.json").read_text())
        text = config.get("text_config", config)
        architecture = config["architectures"][0]
        d_model, n_layers = (text[next(filter(text.__contains__, names), names[0])] for names in (_WIDTH, _DEPTH))
    except (OSError, ValueError, KeyError, IndexError, AttributeError) as e:
        raise Unsupported(
            f"{folder}/config.json does not describe a decoder ({e!r}); give an ordinary HF folder"
        ) from e
    return ModelIdentity(
        id=model,
        architecture=architecture,
        d_model=d_model,
        n_layers=n_layers,
        fingerprint=model_fingerprint(folder),
        tokenizer=tokenizer_digest(folder),
    )
