from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.bundles import random_bundle
from trimtab.server.database.audit import verify
from trimtab.server.database.database import Database
from trimtab.server.database.schema import blob
from trimtab.server.errors import Conflict, InvalidBundle, InvalidRequest, Tampered, UnknownBundle
from trimtab.server.registry.store import Registry
from trimtab.server.registry.version import split

CALM, CALMER = random_bundle(seed=0), random_bundle(seed=1)
ME = "cli:me"


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


def test_versions_are_numbered_by_name(registry: Registry) -> None:
    uploads = [CALM, CALMER, random_bundle(name="wild", seed=2)]
    stored = [registry.upload(bundle.to_bytes(), actor=ME)[0] for bundle in uploads]
    assert [version.reference for version in stored] == ["calm:v1", "calm:v2", "wild:v1"]
    assert registry.list() == tuple(stored)
    assert registry.list(name="calm") == tuple(stored[:2])
    assert {version.state for version in stored} == {"draft"}


def test_the_same_bytes_are_the_same_version(registry: Registry, database: Database) -> None:
    first, is_new = registry.upload(CALM.to_bytes(), actor=ME)
    assert is_new
    assert registry.upload(CALM.to_bytes(), actor="cli:another") == (first, False)
    assert database.sequence() == 1


def test_what_is_stored_is_what_was_uploaded(registry: Registry) -> None:
    version, _ = registry.upload(CALM.to_bytes(), actor=ME)
    assert registry.data(version) == CALM.to_bytes()
    assert registry.bundle(version).content_hash == version.content_hash == CALM.content_hash


def test_stored_bytes_that_were_changed_are_never_given_out(registry: Registry, database: Database) -> None:
    version, _ = registry.upload(CALM.to_bytes(), actor=ME)
    with database.engine.begin() as connection:
        connection.execute(blob.update().values(data=CALMER.to_bytes()))
    with pytest.raises(Tampered, match="not those that were uploaded"):
        registry.bundle(version)


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", CALM.to_bytes()[:-3], b"x" * 100])
def test_bytes_that_are_no_bundle_are_refused(registry: Registry, data: bytes) -> None:
    with pytest.raises(InvalidBundle):
        registry.upload(data, actor=ME)
    assert registry.list() == ()


def test_a_version_goes_from_draft_to_active_to_revoked(registry: Registry) -> None:
    registry.upload(CALM.to_bytes(), actor=ME)
    assert registry.promote("calm", 1, actor=ME).state == "active"
    revoked = registry.revoke("calm", 1, actor=ME, reason="makes it rude", running="finish")
    assert (revoked.state, revoked.reason, revoked.running) == ("revoked", "makes it rude", "finish")


def test_revoked_is_for_good(registry: Registry) -> None:
    registry.upload(CALM.to_bytes(), actor=ME)
    registry.revoke("calm", 1, actor=ME, reason="rude")
    with pytest.raises(Conflict, match="for good"):
        registry.promote("calm", 1, actor=ME)
    with pytest.raises(Conflict, match=r"calm:v1, which was revoked \(rude\)"):
        registry.upload(CALM.to_bytes(), actor=ME)


def test_a_draft_is_no_default(registry: Registry) -> None:
    registry.upload(CALM.to_bytes(), actor=ME)
    with pytest.raises(Conflict, match="only an active version"):
        registry.set_default("calm", 1, actor=ME)


def test_a_name_has_one_default_and_none_once_that_is_revoked(registry: Registry) -> None:
    """Another version never takes over by itself."""
    for bundle in (CALM, CALMER):
        version, _ = registry.upload(bundle.to_bytes(), actor=ME)
        registry.promote("calm", version.number, actor=ME, default=True)
    assert [version.number for version in registry.list() if version.is_default] == [2]
    registry.set_default("calm", 1, actor=ME)
    assert [version.number for version in registry.list() if version.is_default] == [1]
    registry.revoke("calm", 1, actor=ME, reason="rude")
    assert [version.number for version in registry.list() if version.is_default] == []


def test_a_revocation_needs_a_reason(registry: Registry) -> None:
    registry.upload(CALM.to_bytes(), actor=ME)
    with pytest.raises(InvalidRequest, match="reason"):
        registry.revoke("calm", 1, actor=ME, reason=" ")


@pytest.mark.parametrize("reason", ["x" * 1001, "a\0b"])
def test_reasons_are_bounded(registry: Registry, reason: str) -> None:
    with pytest.raises(InvalidRequest, match="reason"):
        registry.upload(CALM.to_bytes(), actor=ME, reason=reason)


def test_what_is_not_there_is_unknown_and_the_message_says_what_is(registry: Registry) -> None:
    registry.upload(CALM.to_bytes(), actor=ME)
    with pytest.raises(UnknownBundle, match="it holds v1 of calm"):
        registry.promote("calm", 2, actor=ME)
    with pytest.raises(UnknownBundle, match="none of that name"):
        registry.find("wild", 1)


def test_every_change_is_recorded_with_its_actor(registry: Registry, database: Database) -> None:
    registry.upload(CALM.to_bytes(), actor="key:1", reason="first")
    registry.promote("calm", 1, actor="key:2", default=True)
    registry.promote("calm", 1, actor="key:2", default=True)  # changes nothing
    registry.revoke("calm", 1, actor="key:3", reason="rude")
    entries = database.entries()
    assert [(entry.actor, entry.action) for entry in entries] == [
        ("key:1", "bundle.upload"),
        ("key:2", "bundle.promote"),
        ("key:2", "bundle.set_default"),
        ("key:3", "bundle.revoke"),
    ]
    assert {entry.subject for entry in entries} == {"calm:v1"}
    verify(entries)


def test_uploads_at_once_get_numbers_of_their_own(registry: Registry) -> None:
    data = [random_bundle(seed=seed).to_bytes() for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        numbers = [v.number for v, _ in pool.map(lambda d: registry.upload(d, actor=ME), data)]
    assert sorted(numbers) == list(range(1, 9))


@pytest.mark.parametrize(
    "reference", ["calm", "calm:3", "calm:v0", "calm:v01", "calm:v-1", ":v1", "calm:v1 ", "a/b:v1", ""]
)
def test_what_is_no_reference_is_refused(reference: str) -> None:
    with pytest.raises(InvalidRequest):
        split(reference)


def test_a_reference_is_a_name_and_a_number() -> None:
    assert split("calm-2.b:v12") == ("calm-2.b", 12)
