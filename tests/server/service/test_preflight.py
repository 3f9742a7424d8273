import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.bundles import random_bundle
from trimtab.attribution.bundle import Bundle, BundleError, ModelIdentity
from trimtab.attribution.fingerprint import model_fingerprint, tokenizer_digest
from trimtab.server.database.database import Database
from trimtab.server.errors import Unsupported
from trimtab.server.keys.secret import open_secret
from trimtab.server.keys.store import Keys
from trimtab.server.service.preflight import preflight
from trimtab.server.settings import Settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder that is whole as far as a start-up looks."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "num_hidden_layers": 3}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": []}))
    save_file({"w": np.ones((2, 2), np.float32)}, model / "model.safetensors")
    return model


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    identity = ModelIdentity(
        id="model",
        architecture="LlamaForCausalLM",
        d_model=4,
        n_layers=3,
        fingerprint=model_fingerprint(folder),
        tokenizer=tokenizer_digest(folder),
    )
    return random_bundle(identity)


def settings(folder: Path, *bundles: Path, **changes: Any) -> Settings:
    database = f"sqlite:///{folder.parent / 'trimtab.db'}"
    return Settings(**{"model": str(folder), "bundles": bundles, "port": 0, "database": database, **changes})


def start(given: Settings, said: list[str] | None = None) -> dict[str, Bundle]:
    with preflight(given, ([] if said is None else said).append) as ready:
        return ready.bundles


def test_a_good_start_holds_its_port_and_its_bundles(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    bundle.save(tmp_path / "calm.tt")
    with preflight(settings(folder, tmp_path / "calm.tt"), lambda _: None) as ready:
        assert ready.bundles.keys() == {"calm"}
        ready.sock.listen()
        port = ready.sock.getsockname()[1]
        with pytest.raises(Unsupported, match=f"cannot listen on 127.0.0.1 port {port}"):
            start(settings(folder, port=port))


def test_a_missing_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No such file"):
        start(settings(folder, tmp_path / "none.tt"))


def test_a_truncated_bundle_is_refused(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cut.tt").write_bytes(bundle.to_bytes()[:-7])
    with pytest.raises(BundleError, match="not a whole trimtab bundle"):
        start(settings(folder, tmp_path / "cut.tt"))


def test_weights_are_no_bundle(folder: Path) -> None:
    with pytest.raises(BundleError, match="not a trimtab bundle"):
        start(settings(folder, folder / "model.safetensors"))


def test_a_bundle_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    random_bundle().save(tmp_path / "calm.tt")
    with pytest.raises(BundleError, match="was made for tiny"):
        start(settings(folder, tmp_path / "calm.tt"))


def test_two_bundles_of_one_name_are_refused(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    for name in ("a.tt", "b.tt"):
        bundle.save(tmp_path / name)
    with pytest.raises(BundleError, match="two bundles are named 'calm'"):
        start(settings(folder, tmp_path / "a.tt", tmp_path / "b.tt"))


def make_key(folder: Path) -> None:
    database = Database(settings(folder).database)
    database.migrate()
    Keys(database, open_secret(database, None)).create(label="app", scopes=frozenset({"infer"}), actor="cli:me")
    database.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_reach_the_server_only_with_a_key(folder: Path, host: str) -> None:
    with pytest.raises(Unsupported, match="there is no API key"):
        start(settings(folder, host=host))


def test_a_key_of_the_database_or_the_operators_lets_other_machines_in(folder: Path) -> None:
    start(settings(folder, host="0.0.0.0", api_key="0123456789abcdef"))
    make_key(folder)
    said: list[str] = []
    start(settings(folder, host="0.0.0.0"), said)
    assert said == ["keys are asked for: no operator's key, and 1 of the database"]


def test_a_start_without_a_key_says_so(folder: Path) -> None:
    said: list[str] = []
    start(settings(folder), said)
    assert "no API key" in said[0]


def test_strict_signatures_need_a_key_to_trust(folder: Path) -> None:
    with pytest.raises(Unsupported, match="--trusted-key"):
        start(settings(folder, signatures="strict"))


def test_a_database_of_another_release_is_refused(folder: Path) -> None:
    start(settings(folder))
    database = Database(settings(folder).database)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'r9999'")
    database.close()
    with pytest.raises(Unsupported, match="later release"):
        start(settings(folder))


def test_a_guessable_key_is_refused(folder: Path) -> None:
    with pytest.raises(Unsupported, match="shorter than 16"):
        start(settings(folder, api_key="secret"))


def test_a_key_is_not_shown(folder: Path) -> None:
    assert "sesame" not in repr(settings(folder, api_key="open-sesame-open"))


def test_a_folder_that_is_no_decoder_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    with pytest.raises(Unsupported, match=r"config\.json does not describe a decoder"):
        start(settings(folder))


@pytest.mark.parametrize(("width", "depth"), [("n_embd", "n_layer"), ("d_model", "n_layers")])
def test_a_model_may_name_its_width_and_depth_otherwise(folder: Path, width: str, depth: str) -> None:
    """A folder of GPT-2, GPT-J, Bloom or DBRX was refused as no decoder."""
    config = {"architectures": ["GPT2LMHeadModel"], width: 4, depth: 3}
    (folder / "config.json").write_text(json.dumps(config))
    with preflight(settings(folder), lambda _: None) as ready:
        assert (ready.identity.d_model, ready.identity.n_layers) == (4, 3)


def test_a_disabled_plugin_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    with pytest.raises(Unsupported, match="leaves out the plugin `trimtab`"):
        start(settings(folder))


def test_the_port_is_free_again_after_the_end(folder: Path) -> None:
    with preflight(settings(folder), lambda _: None) as ready:
        port = ready.sock.getsockname()[1]
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", port))
