"""The registry over HTTP and over gRPC, on a real database: one golden table, the same answers, the same audit log."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from grpc_status import rpc_status

from tests.bundles import random_bundle
from tests.server.service.test_replica import OCTETS, Service
from trimtab.server.database.audit import verify
from trimtab.server.database.database import Database
from trimtab.server.registry.store import MAX_BUNDLE_BYTES, digest_of
from trimtab.server.service.rpc.server import RPC
from trimtab.v1 import registry_service_pb2 as v1
from trimtab.v1.registry_service_pb2_grpc import RegistryServiceStub

TABLE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "registry_cases.json").read_text())
NONE = cast(Any, None)
SPELT = {"chunk": "body", "reference": "version", "make_default": "default"}
"""Fields of the messages, as the HTTP API calls them."""


@dataclass
class Both:
    """A service by both its transports."""

    service: Service
    stub: Any

    async def http(self, step: dict[str, Any]) -> Any:
        """What a step comes to over HTTP."""
        match step["verb"]:
            case "upload":
                reply = await self.service.http.post("/admin/v1/bundles", content=data_of(step), headers=OCTETS)
            case "list":
                reply = await self.service.http.get("/admin/v1/bundles")
            case verb:
                reply = await self.service.http.post(f"/admin/v1/bundles/{step['reference']}/{verb}", json=step["body"])
        if reply.status_code >= 400:
            error = reply.json()["error"]
            return {"code": error["code"], "fields": fields_of(error)}
        found = reply.json()
        return found["data"] if step["verb"] == "list" else found | {"is_new": reply.status_code == 201}

    async def grpc(self, step: dict[str, Any]) -> Any:
        """What a step comes to over gRPC."""
        fields = {"make_default" if name == "default" else name: value for name, value in step.get("body", {}).items()}
        if "running" in fields:
            fields["running"] = f"RUNNING_{fields['running'].upper()}"
        try:
            match step["verb"]:
                case "upload":
                    reply = await self.stub.UploadBundle(parts(data_of(step)))
                    return shown(reply.version) | {"is_new": reply.is_new}
                case "list":
                    return [
                        shown(version) for version in (await self.stub.ListVersions(v1.ListVersionsRequest())).versions
                    ]
                case "promote":
                    call = self.stub.Promote(v1.PromoteRequest(reference=step["reference"], **fields))
                case "default":
                    call = self.stub.SetDefault(v1.SetDefaultRequest(reference=step["reference"], **fields))
                case "revoke":
                    call = self.stub.Revoke(v1.RevokeRequest(reference=step["reference"], **fields))
            return shown(await call)
        except grpc.aio.AioRpcError as e:
            return refusal(e)


def data_of(step: dict[str, Any]) -> bytes:
    return step["bytes"].encode() if "bytes" in step else random_bundle(seed=step["seed"]).to_bytes()


def parts(data: bytes, digest: str | None = None) -> list[v1.UploadBundleRequest]:
    """A file in pieces, and its end."""
    pieces = [v1.UploadBundleRequest(chunk=data[start : start + 1000]) for start in range(0, len(data), 1000)]
    return [*pieces, v1.UploadBundleRequest(end=v1.UploadEnd(digest=digest or digest_of(data)))]


def shown(version: v1.BundleVersion) -> dict[str, Any]:
    """A message in the words of the HTTP API."""
    fields = {field.name: getattr(version, field.name) for field in v1.BundleVersion.DESCRIPTOR.fields}
    fields["state"] = v1.VersionState.Name(version.state).removeprefix("VERSION_STATE_").lower()
    running = v1.Running.Name(version.running).removeprefix("RUNNING_").lower()
    fields["running"] = None if running == "unspecified" else running
    fields["not_loaded"] = version.not_loaded if version.HasField("not_loaded") else None
    return fields | {"n_bytes": fields.pop("byte_count"), "signed": fields.pop("is_signed")}


def refusal(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    info, bad = details.ErrorInfo(), details.BadRequest()
    status = rpc_status.from_call(cast(Any, error))
    assert status is not None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    return {
        "code": info.reason.lower(),
        "fields": sorted(SPELT.get(v.field, v.field) for v in bad.field_violations),
    }


def fields_of(error: dict[str, Any]) -> list[str]:
    return sorted(v["field"] for v in error.get("violations", ())) or [error["param"]]


@pytest.fixture
async def both(tmp_path: Path) -> AsyncIterator[Both]:
    database = Database(f"sqlite:///{tmp_path / 'trimtab.db'}")
    database.migrate()
    service = Service(database)
    await service.replica.start()
    rpc = RPC(service.generation, NONE, NONE, service.gate, service.replica)
    port = await rpc.start("127.0.0.1", 0, None)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Both(service, RegistryServiceStub(channel))
    await rpc.stop()
    await service.http.aclose()
    await service.replica.close()


@pytest.mark.parametrize("transport", ["http", "grpc"])
async def test_every_step_comes_to_what_the_table_says(both: Both, transport: str) -> None:
    for step in TABLE["steps"]:
        found = await getattr(both, transport)(step)
        if "code" in step:
            assert found == {"code": step["code"], "fields": step["fields"]}, step
        elif step["verb"] == "list":
            assert [{name: row[name] for name in ("reference", "state")} for row in found] == step["shows"]
        else:
            assert {name: found[name] for name in step["shows"]} == step["shows"], step
            assert "is_new" not in step or found["is_new"] is step["is_new"]
    entries = both.service.replica.database.entries()
    verify(entries)
    changes = [entry for entry in entries if entry.action.startswith("bundle.")]
    assert [f"{entry.action} {entry.subject}" for entry in changes] == TABLE["audit"]
    assert {entry.actor for entry in changes} == {"anonymous"}


async def test_both_transports_show_a_version_alike(both: Both) -> None:
    await both.service.publish(random_bundle())
    over_http, over_grpc = await both.http({"verb": "list"}), await both.grpc({"verb": "list"})
    assert over_http == over_grpc
    assert over_http[0]["state"] == "active"


@pytest.mark.parametrize(
    ("sent", "field"),
    [
        (parts(b"abc")[:-1], "end"),
        ([], "end"),
        (parts(b"abc", "sha256:" + "0" * 64), "end.digest"),
        (parts(b"abc", digest_of(b"ab")), "end.digest"),
        ([*parts(b"abc"), *parts(b"abc")], "end"),
        ([v1.UploadBundleRequest()], "part"),
    ],
)
async def test_an_upload_that_is_not_whole_stores_nothing(both: Both, sent: Any, field: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await both.stub.UploadBundle(sent)
    assert refusal(caught.value) == {"code": "invalid_request", "fields": [field]}
    assert await both.grpc({"verb": "list"}) == []


async def test_an_upload_is_bounded_while_it_comes(both: Both) -> None:
    piece = v1.UploadBundleRequest(chunk=bytes(4 << 20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await both.stub.UploadBundle([piece] * ((MAX_BUNDLE_BYTES // len(piece.chunk)) + 1))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_signature_is_kept_with_its_version(both: Both) -> None:
    sent = parts(random_bundle().to_bytes())
    sent[-1].end.signature = "a signature"
    assert (await both.stub.UploadBundle(sent)).version.is_signed


async def test_with_keys_the_verbs_open_for_their_scopes_and_the_log_names_the_key(both: Both) -> None:
    made: dict[str, Any] = {}
    for scope in ("admin", "author", "infer"):
        reply = await both.service.http.post("/admin/v1/keys", json={"label": scope, "scopes": [scope]})
        made[scope] = reply.json()
        both.service.http.headers["authorization"] = f"Bearer {made['admin']['key']}"

    async def outcome(scope: str, call: Any, request: Any) -> str:
        metadata = (("authorization", f"Bearer {made[scope]['key']}"),)
        try:
            await call(request, metadata=metadata)
        except grpc.aio.AioRpcError as e:
            return e.code().name
        return "OK"

    upload = parts(random_bundle().to_bytes())
    promotion = v1.PromoteRequest(reference="calm:v1")
    assert [await outcome(scope, both.stub.UploadBundle, upload) for scope in ("infer", "author")] == [
        "PERMISSION_DENIED",
        "OK",
    ]
    assert [await outcome(scope, both.stub.Promote, promotion) for scope in ("author", "admin")] == [
        "PERMISSION_DENIED",
        "OK",
    ]
    by = {entry.action: entry.actor for entry in both.service.replica.database.entries()}
    assert by["bundle.upload"] == f"key:{made['author']['id']}"
    assert by["bundle.promote"] == f"key:{made['admin']['id']}"
