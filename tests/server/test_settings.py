import re
from pathlib import Path
from typing import Any

import pytest

from trimtab.server.errors import Unsupported
from trimtab.server.settings import Settings, load


def test_a_flag_counts_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    file = tmp_path / "trimtab.toml"
    file.write_text('port = 1\nhost = "::1"\nmax_requests = 7\ntrusted_keys = ["a.pem"]\n')
    environ = {"TRIMTAB_PORT": "2", "TRIMTAB_HOST": "127.0.0.2", "TRIMTAB_BUNDLES": '["x.tt", "y.tt"]', "HOME": "/"}
    settings, sources = load({"port": 3}, config=file, environ=environ)
    assert (settings.port, settings.host, settings.max_requests) == (3, "127.0.0.2", 7)
    assert (settings.bundles, settings.trusted_keys) == ((Path("x.tt"), Path("y.tt")), (Path("a.pem"),))
    shown = {name: sources[name] for name in ("port", "host", "max_requests", "log_format")}
    assert shown == {"port": "flag", "host": "environment", "max_requests": str(file), "log_format": "default"}


def test_the_file_may_be_named_in_the_environment(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("port = 1\n")
    assert load({}, environ={"TRIMTAB_CONFIG": str(tmp_path / "t.toml")}).settings.port == 1


@pytest.mark.parametrize(
    ("environ", "file", "message"),
    [
        ({"TRIMTAB_PROT": "1"}, None, "TRIMTAB_PROT .* did you mean TRIMTAB_PORT"),
        ({"TRIMTAB_PORT": "many"}, None, r"port \(environment\): .*integer"),
        ({"TRIMTAB_BUNDLES": "x.tt"}, None, "bundles"),
        ({}, "prot = 1", r"prot \(.*\): is no setting; did you mean port"),
        ({}, "port = ", "settings: "),
        ({}, "poll_seconds = 5", "poll_seconds"),
    ],
)
def test_what_is_no_setting_is_an_error(
    tmp_path: Path, environ: dict[str, str], file: str | None, message: str
) -> None:
    path = tmp_path / "t.toml"
    if file is not None:
        path.write_text(file)
    with pytest.raises(Unsupported, match=message):
        load({}, config=None if file is None else path, environ=environ)


def test_all_that_is_wrong_comes_at_once() -> None:
    with pytest.raises(Unsupported) as error:
        load({"port": -1}, environ={"TRIMTAB_HOTS": "x", "TRIMTAB_MAX_REQUESTS": "0"})
    assert all(word in str(error.value) for word in ("TRIMTAB_HOTS", "port (flag)", "max_requests (environment)"))


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="does not exist"):
        load({}, config=tmp_path / "none.toml", environ={})


def test_secrets_are_not_shown() -> None:
    settings = load({"api_key": "open-sesame-open", "secret": "sesame" * 8}, environ={}).settings
    assert "sesame" not in repr(settings)
    assert settings.operator_key == "open-sesame-open"


def test_every_setting_says_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_every_option_of_serve_is_a_setting() -> None:
    import inspect

    from trimtab.server.commands import serve

    renamed: dict[str, Any] = {"bundle": "bundles", "trusted_key": "trusted_keys"}
    options = set(inspect.signature(serve).parameters) - {"config"}
    assert {renamed.get(name, name) for name in options} <= set(Settings.model_fields)


def test_what_kubernetes_sets_beside_a_service_named_trimtab_is_no_setting() -> None:
    environ = {
        "TRIMTAB_PORT": "tcp://10.0.0.1:8000",
        "TRIMTAB_PORT_8000_TCP_ADDR": "10.0.0.1",
        "TRIMTAB_SERVICE_HOST": "10.0.0.1",
    }
    assert load({}, environ=environ).settings.port == 8000


def test_every_variable_that_the_code_reads_may_be_set_beside_a_server() -> None:
    """A shell with TRIMTAB_SERVER for the client could not start one."""
    root = Path(__file__).parents[2]
    code = [
        *(root / "server").rglob("*.py"),
        *(root / "clients/python").rglob("*.py"),
        *(root / "attribution").rglob("*.py"),
    ]
    names = {name for path in code for name in re.findall(r'"(TRIMTAB_[A-Z_]+)"', path.read_text())}
    assert {"TRIMTAB_SERVER", "TRIMTAB_CACHE"} <= names
    file_less = dict.fromkeys(names - {"TRIMTAB_CONFIG", "TRIMTAB_SERVICE_", "TRIMTAB_PORT_"}, "x")
    load({}, environ=file_less)
