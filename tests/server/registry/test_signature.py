from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.bundles import random_bundle
from trimtab.server.database.database import Database
from trimtab.server.database.schema import bundle_version
from trimtab.server.errors import InvalidBundle, Unsupported
from trimtab.server.registry.signature import Signatures, sign
from trimtab.server.registry.store import Registry

DATA = random_bundle().to_bytes()
ME = "cli:me"


def keys(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def test_what_a_trusted_key_signed_is_valid(tmp_path: Path) -> None:
    _, other = keys(tmp_path, "other")
    private, public = keys(tmp_path, "release")
    signatures = Signatures("strict", (other, public))
    assert signatures.check("calm", DATA, sign(DATA, private)) == public


def test_strict_refuses_the_unsigned_and_optional_takes_it() -> None:
    assert Signatures("optional").check("calm", DATA, None) is None
    with pytest.raises(InvalidBundle, match="not signed"):
        Signatures("strict", (Path("x"),)).check("calm", DATA, None)


@pytest.mark.parametrize("policy", ["optional", "strict"])
def test_a_signature_that_is_there_must_be_valid(tmp_path: Path, policy: str) -> None:
    private, public = keys(tmp_path, "release")
    stranger, _ = keys(tmp_path, "stranger")
    signatures = Signatures("strict" if policy == "strict" else "optional", (public,))
    good = sign(DATA, private)
    for data, signature in (
        (DATA + b"x", good),
        (DATA, sign(DATA, stranger)),
        (DATA, "{}"),
        (DATA, ""),
        (DATA, good[:-9]),
    ):
        with pytest.raises(InvalidBundle, match="not signed by a key that this server trusts"):
            signatures.check("calm", data, signature)


def test_the_registry_asks_at_upload_and_again_when_it_gives_the_bundle_out(database: Database, tmp_path: Path) -> None:
    """Whoever can write to the database can still not slip in a bundle."""
    private, public = keys(tmp_path, "release")
    registry = Registry(database, Signatures("strict", (public,)))
    with pytest.raises(InvalidBundle, match="not signed"):
        registry.upload(DATA, actor=ME)
    version, _ = registry.upload(DATA, actor=ME, signature=sign(DATA, private))
    assert registry.bundle(registry.promote("calm", 1, actor=ME)).content_hash == version.content_hash
    with database.engine.begin() as connection:
        connection.execute(bundle_version.update().values(signature=None))
    with pytest.raises(InvalidBundle, match="not signed"):
        registry.bundle(registry.find("calm", 1))


def test_a_draft_from_before_the_policy_is_not_promoted_unsigned(database: Database, tmp_path: Path) -> None:
    _, public = keys(tmp_path, "release")
    Registry(database).upload(DATA, actor=ME)
    with pytest.raises(InvalidBundle, match="not signed"):
        Registry(database, Signatures("strict", (public,))).promote("calm", 1, actor=ME)


def test_strict_without_a_key_to_trust_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="--trusted-key"):
        Signatures("strict").require_keys()
    with pytest.raises(Unsupported, match="is no file"):
        Signatures("optional", (tmp_path / "none.pem",)).require_keys()


def test_a_key_that_cannot_sign_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(Unsupported, match="does not sign"):
        sign(DATA, tmp_path / "key.pem")
