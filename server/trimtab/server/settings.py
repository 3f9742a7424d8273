"""The server's settings: flag > environment > file > default, and where each value came from.

    --port 9000      TRIMTAB_PORT=9000      port = 9000 in the TOML file of --config or TRIMTAB_CONFIG

A list is JSON in the environment: TRIMTAB_TRUSTED_KEYS='["release.pem"]'. Unknown settings are errors, wherever they stand.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from platformdirs import user_state_path
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from trimtab.server.errors import Unsupported

__all__ = ["Loaded", "Settings", "default_database", "load"]

PREFIX = "TRIMTAB_"
_ELSEWHERE = frozenset({"TRIMTAB_CACHE", "TRIMTAB_CONFIG", "TRIMTAB_SERVER", "TRIMTAB_SIGNING_PASSWORD"})
"""Variables of this prefix that other rooms and commands read."""
_SERVICE_LINK = re.compile(r"TRIMTAB_(SERVICE_.*|PORT_\d+_.*|PORT=tcp://.*)", re.DOTALL)
"""Those that Kubernetes sets in a pod beside a service named trimtab."""


def default_database() -> str:
    """SQLite in the user's folder of states."""
    return f"sqlite:///{user_state_path('trimtab') / 'trimtab.db'}"


class Settings(BaseSettings):
    """What a server is told; the description of each is its documentation."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True, env_ignore_empty=True)

    model: str = Field("", description="The embedded model's name, an HF folder, or a hub id.")
    bundles: tuple[Path, ...] = Field(
        (), description="Bundle files that this server loads beside the registry's, pinned."
    )
    host: str = Field("127.0.0.1", description="Address to listen on; any but loopback needs a key.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    grpc_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="Serve gRPC on this port too; 0 takes any free one."
    )
    tls_cert: Path | None = Field(
        None, description="Speak TLS, on both ports, with this certificate (PEM, with its chain)."
    )
    tls_key: Path | None = Field(None, description="The certificate's key (PEM).")
    tls_client_ca: Path | None = Field(
        None, description="Callers must show a certificate of this authority (PEM): mutual TLS."
    )
    served_model_name: str | None = Field(None, description="The id that requests name; the model by default.")
    on_failure: Literal["closed", "open"] = Field(
        "closed",
        description="For requests that do not say: a reply that was not steered as asked is an error, or says so.",
    )
    allow_bundle_upload: bool = Field(
        False, description="Callers may load, replace and remove bundles of this one server, past the registry."
    )
    api_key: SecretStr | None = Field(None, description="The operator's own key, which may do everything.")
    database: str = Field(
        default_factory=default_database,
        description="sqlite:///FILE, or postgresql://USER:PASSWORD@HOST/NAME for several replicas.",
    )
    secret: SecretStr | None = Field(
        None,
        description="Keys the digests of API keys; the same on every replica. With SQLite a file beside it by default.",
    )
    signatures: Literal["optional", "strict"] = Field("optional", description="`strict` loads signed bundles only.")
    trusted_keys: tuple[Path, ...] = Field((), description="PEM public keys whose signatures count.")
    poll_seconds: Annotated[float, Field(ge=0.02, le=0.5)] = Field(
        0.2, description="How often a replica asks the database whether anything has changed."
    )
    stale_after_seconds: Annotated[float, Field(gt=0.5)] = Field(
        10.0, description="Without word from the database for this long, a replica is not ready and steers nothing."
    )
    graders: tuple[str, ...] = Field(
        (),
        description="Graders that experiments may name: TOML files, by their stem, or Python functions, module:function.",
    )
    openfeature_provider: str | None = Field(
        None,
        description="module:function that makes the OpenFeature provider of experiments that are assigned by one.",
    )
    experiment_seconds: Annotated[float, Field(ge=0.1)] = Field(
        5.0, description="How often experiments that run are looked at: rolled back, or ramped up."
    )
    purge_after_days: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="What archived experiments measured is deleted after so many days; never, unless this is given.",
    )
    max_requests: Annotated[int, Field(ge=1)] = Field(
        256, description="Generation requests at a time, waiting ones included; more are a 503."
    )
    log_format: Literal["text", "json"] = Field("text", description="`json` writes one object a line.")
    otlp_endpoint: str | None = Field(None, description="Traces go to this OTLP/HTTP collector, http://HOST:4318.")
    engine_flags: tuple[str, ...] = Field(
        (), description="Flags of `vllm serve`; on the command line those after `--`."
    )

    @property
    def served_name(self) -> str:
        """The id that requests name."""
        return self.served_model_name or self.model

    @property
    def operator_key(self) -> str | None:
        """The operator's own key, in plain."""
        return None if self.api_key is None else self.api_key.get_secret_value()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Values are merged by `load`, which keeps where each came from."""
        return (init_settings,)


class Loaded(NamedTuple):
    """Settings, and the source of each: `flag`, `environment`, the file's path, or `default`."""

    settings: Settings
    sources: dict[str, str]


def load(flags: Mapping[str, Any], *, config: Path | None = None, environ: Mapping[str, str] | None = None) -> Loaded:
    """The settings; `flags` are those that were given, by name.

    Raises:
        Unsupported: a setting is unknown or wrong, or the file cannot be read; all of it at once.
    """
    given_environ = os.environ if environ is None else environ
    environ = {
        k: v
        for k, v in given_environ.items()
        if not (_SERVICE_LINK.fullmatch(k) or _SERVICE_LINK.fullmatch(f"{k}={v}"))
    }
    problems = list(_unknown(environ))
    if config is None and environ.get("TRIMTAB_CONFIG"):
        config = Path(environ["TRIMTAB_CONFIG"])
    try:
        given = {str(config): _of_file(config) if config is not None else {}}
        given["environment"] = _of_environment(environ)
    except (OSError, ValueError, SettingsError) as e:
        raise Unsupported(f"settings: {e}") from e
    given["flag"] = dict(flags)
    sources = dict.fromkeys(Settings.model_fields, "default")
    values: dict[str, Any] = {}
    for source, found in given.items():
        values |= found
        sources |= dict.fromkeys(found, source)
    try:
        settings = Settings(**values)
    except ValidationError as e:
        for error in e.errors():
            name = str(error["loc"][0])
            near = (
                difflib.get_close_matches(name, Settings.model_fields, n=1) if name not in Settings.model_fields else []
            )
            hint = f"; did you mean {near[0]}?" if near else ""
            message = "is no setting" if error["type"] == "extra_forbidden" else error["msg"]
            problems.append(f"{name} ({sources.get(name, 'default')}): {message}{hint}")
    if problems:
        raise Unsupported("settings: " + "; ".join(problems))
    return Loaded(settings, sources)


def _unknown(environ: Mapping[str, str]) -> list[str]:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | _ELSEWHERE
    found = []
    for name in sorted(environ):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            found.append(f"{name} (environment) is no setting" + (f"; did you mean {near[0]}?" if near else ""))
    return found


def _of_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in environ.items() if value}
    return {name: value for name, value in source().items() if name in Settings.model_fields}


def _of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise Unsupported(f"the settings file {path} does not exist")
    return TomlConfigSettingsSource(Settings, toml_file=path)()
