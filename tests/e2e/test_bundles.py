"""Bundles come and go while the server runs: nothing stops, and a request keeps the rows it was admitted with."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.bundles import random_bundle
from tests.conftest import Server
from tests.e2e.test_generation import metric, wait_for
from trimtab.attribution.bundle import Bundle, ModelIdentity, RecommendedEdit
from trimtab.client import ConflictError, InvalidBundleError, Latent, Steering, Trimtab, UnknownBundleError

MODEL = "smollm2-135m-instruct"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}


@pytest.fixture
def client(server: Server) -> Iterator[Trimtab]:
    with Trimtab(server.base_url, max_retries=0) as client:
        yield client
        for bundle in client.steering.bundles():
            if bundle.name != "calm":
                client.steering.unpin(bundle.name)
                client.steering.unload(bundle.name)


@pytest.fixture(scope="module")
def wild(embedded_identity: ModelIdentity) -> Bundle:
    """A bundle that no server has seen."""
    return random_bundle(embedded_identity, name="wild", layer=9, seed=3)


@pytest.fixture(scope="module")
def wilder(embedded_identity: ModelIdentity) -> Bundle:
    """Another version of it."""
    return random_bundle(embedded_identity, name="wild", layer=9, seed=4)


def text(client: Trimtab, steering: Steering | None) -> str:
    reply = client.completions.create(prompt="The sea is", steering=steering, extra_body={"ignore_eos": True}, **GREEDY)
    return str(reply.choices[0].text)


def test_an_uploaded_bundle_steers_the_next_request(client: Trimtab, wild: Bundle) -> None:
    with pytest.raises(UnknownBundleError):
        client.steering.validate(Steering(bundle="wild"))
    loaded = client.steering.load(wild.to_bytes())
    assert (loaded.name, loaded.content_hash, loaded.pinned) == ("wild", wild.content_hash, False)
    reply = client.completions.create(prompt="The sea is", steering=Steering(bundle="wild"), **GREEDY)
    assert reply.steering.hook_points["blocks.9.resid_post"].completion_tokens == reply.usage.completion_tokens
    assert f"{MODEL}@wild" in [model.id for model in client.openai.models.list()]
    assert client.steering.load(wild.to_bytes()) == loaded


def test_an_unloaded_bundle_is_refused_at_once(client: Trimtab, wild: Bundle) -> None:
    client.steering.load(wild.to_bytes())
    client.steering.unload("wild")
    with pytest.raises(UnknownBundleError):
        client.completions.create(prompt="The sea is", steering=Steering(bundle="wild"), **GREEDY)
    with pytest.raises(UnknownBundleError):
        client.steering.unload("wild")
    assert [bundle.name for bundle in client.steering.bundles()] == ["calm"]


def test_a_request_in_flight_keeps_the_rows_of_a_bundle_that_is_unloaded(
    server: Server, client: Trimtab, wild: Bundle
) -> None:
    """For longer than any grace."""
    client.steering.load(wild.to_bytes())
    ask = {"model": MODEL, "prompt": "The sea is", "max_tokens": 100, "ignore_eos": True, "temperature": 0}
    steered = ask | {"steering": {"bundle": "wild"}, "stream": True}
    with httpx.stream("POST", server.base_url + "/v1/completions", json=steered, timeout=120) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        client.steering.unload("wild")
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    proof = json.loads(events[-2])["steering"]
    assert (proof["status"], proof["completion_tokens"]) == ("applied", 100)
    assert proof["plan"] == first["steering"]["plan"]


def test_more_requests_than_fit_wait_for_their_turn_and_are_all_steered(
    server: Server, client: Trimtab, wild: Bundle
) -> None:
    """The server runs 16 at a time; each of 32 has a plan of its own, and their bundle is unloaded while most still wait."""
    client.steering.load(wild.to_bytes())
    before = metric(server, "trimtab_admission_seconds_count")

    def ask(i: int) -> Any:
        steering = {"edits": [{"bundle": "wild", "latent": 7, "operation": "add", "amount": 1.0 + i}]}
        return server.post(
            "/v1/completions", {**GREEDY, "prompt": "Once", "max_tokens": 12, "steering": steering}
        ).json()

    with ThreadPoolExecutor(32) as pool:
        replies = [pool.submit(ask, i) for i in range(32)]
        wait_for(lambda: metric(server, "trimtab_admission_seconds_count") >= before + len(replies))
        client.steering.unload("wild")
        done = [reply.result() for reply in replies]
    # Whoever was not admitted before the bundle went was refused; nobody was answered unsteered.
    applied = [reply for reply in done if "steering" in reply]
    assert all(reply["steering"]["status"] == "applied" for reply in applied)
    assert len({reply["steering"]["plan"] for reply in applied}) == len(applied) >= 16
    refused = {reply["error"]["code"] for reply in done if "steering" not in reply}
    assert refused <= {"unknown_bundle", "invalid_request"}


def test_a_new_version_needs_to_be_asked_for_and_takes_over_whole(
    client: Trimtab, wild: Bundle, wilder: Bundle
) -> None:
    client.steering.load(wild.to_bytes())
    before = text(client, Steering(bundle="wild"))
    with pytest.raises(ConflictError, match="replace=true"):
        client.steering.load(wilder.to_bytes())
    assert text(client, Steering(bundle="wild")) == before
    assert client.steering.load(wilder.to_bytes(), replace=True).content_hash == wilder.content_hash
    assert text(client, Steering(bundle="wild")) != before
    client.steering.load(wild.to_bytes(), replace=True)
    assert text(client, Steering(bundle="wild")) == before


@pytest.mark.slow
def test_a_version_that_is_replaced_under_load_serves_or_its_successor_does(
    server: Server, client: Trimtab, wild: Bundle, wilder: Bundle
) -> None:
    """Symptom: a request that had been admitted, and was being tokenized when its bundle was replaced, was refused as naming a
    bundle that is not loaded; in a production server every deployment of a bundle would have failed a few requests.
    """
    client.steering.load(wild.to_bytes())
    said: dict[str, set[str]] = {}
    done = threading.Event()

    def ask() -> None:
        # Long enough to tokenize that a replacement meets some of them on their way.
        prompt = "The sea is calm. " * 120 + "It is"
        while not done.is_set():
            response = server.post(
                "/v1/completions", {**GREEDY, "max_tokens": 1, "prompt": [prompt] * 2, "steering": {"bundle": "wild"}}
            )
            reply = response.json()
            assert response.status_code == 200, reply
            said.setdefault(reply["steering"]["plan"], set()).add(reply["choices"][0]["text"])

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        for version in (wilder, wild) * 4:
            time.sleep(0.4)
            client.steering.load(version.to_bytes(), replace=True)
        done.set()
        for one in asking:
            one.result()
    assert len(said) == 2
    assert all(len(texts) == 1 for texts in said.values())


def test_a_bundle_that_comes_back_before_its_rows_are_gone_stays(client: Trimtab, wild: Bundle) -> None:
    for _ in range(3):
        client.steering.load(wild.to_bytes())
        client.steering.unload("wild")
    client.steering.load(wild.to_bytes())
    for _ in range(2):
        time.sleep(1.0)  # a release takes as long
        assert client.completions.create(prompt="The sea is", steering=Steering(bundle="wild"), **GREEDY).steering


def test_a_pinned_bundle_stays(client: Trimtab, wild: Bundle, wilder: Bundle) -> None:
    assert client.steering.load(wild.to_bytes(), pin=True).pinned
    with pytest.raises(ConflictError, match="pinned"):
        client.steering.unload("wild")
    with pytest.raises(ConflictError, match="pinned"):
        client.steering.load(wilder.to_bytes(), replace=True)
    with pytest.raises(ConflictError, match="pinned"):  # what the server was started with is
        client.steering.unload("calm")
    assert not client.steering.unpin("wild").pinned
    client.steering.unload("wild")


def test_loading_changes_nothing_for_a_stream_beside_it(client: Trimtab, wild: Bundle) -> None:
    ask: dict[str, Any] = {**GREEDY, "prompt": "The sea is", "max_tokens": 24, "extra_body": {"ignore_eos": True}}
    calm = Steering(edits=[Latent("calm", 7).add(30.0)])
    alone = client.completions.create(steering=calm, **ask)
    words = []
    for i, chunk in enumerate(client.completions.create(steering=calm, stream=True, **ask)):
        words.append(chunk.choices[0].text)
        if i == 5:
            client.steering.load(wild.to_bytes())
        if i == 15:
            client.steering.unload("wild")
    assert "".join(words) == alone.choices[0].text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "empty or cut short"),
        (lambda data: data[:-5], "not a whole trimtab bundle"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "content hash"),
        (lambda data: b"\xff" * 200, "not a whole trimtab bundle"),
        (lambda data: b"\x80\x04K\x01.", "not a whole trimtab bundle"),  # a pickle
    ],
    ids=["nothing", "cut short", "one bit changed", "garbage", "a pickle"],
)
def test_bytes_that_are_no_bundle_are_refused(client: Trimtab, wild: Bundle, change: Any, message: str) -> None:
    with pytest.raises(InvalidBundleError, match=message) as caught:
        client.steering.load(change(wild.to_bytes()))
    assert (caught.value.status, caught.value.param) == (400, "body")


def test_a_bundle_of_another_model_is_refused(client: Trimtab, embedded_identity: ModelIdentity) -> None:
    other = embedded_identity.model_copy(update={"fingerprint": "sha256:other"})
    with pytest.raises(InvalidBundleError, match="was made for"):
        client.steering.load(random_bundle(other, name="foreign", layer=9).to_bytes())


def test_an_upload_that_is_no_upload_is_refused(server: Server, wild: Bundle) -> None:
    url = f"{server.base_url}/v1/steering/bundles"
    octets = {"content-type": "application/octet-stream"}
    assert httpx.post(url, content=wild.to_bytes(), headers={"content-type": "text/plain"}).status_code == 400
    assert httpx.post(f"{url}?replace=yes", content=wild.to_bytes(), headers=octets).status_code == 400
    assert httpx.post(f"{url}?overwrite=true", content=wild.to_bytes(), headers=octets).status_code == 400


def test_an_upload_that_is_too_large_is_refused_by_its_declared_length(server: Server) -> None:
    connection = http.client.HTTPConnection(server.base_url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/steering/bundles")
    connection.putheader("content-type", "application/octet-stream")
    connection.putheader("content-length", str(1 << 40))
    connection.endheaders()
    reply = connection.getresponse()
    assert (reply.status, json.loads(reply.read())["error"]["code"]) == (413, "request_too_large")
    connection.close()


def test_a_file_on_disk_is_an_upload(client: Trimtab, wild: Bundle, tmp_path: Path) -> None:
    wild.save(tmp_path / "wild.tt")
    assert client.steering.load((tmp_path / "wild.tt").read_bytes()).content_hash == wild.content_hash


def test_a_bundles_recommendation_is_told(client: Trimtab, wild: Bundle) -> None:
    assert isinstance(wild.header.edits[0], RecommendedEdit)
    edits = client.steering.load(wild.to_bytes()).edits
    assert [edit["operation"] for edit in edits] == ["add", "ablate"]


def test_the_stock_sdk_sees_a_refusal(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as stock:
        with pytest.raises(openai.ConflictError) as caught:
            stock.delete("/steering/bundles/calm", cast_to=object)
        assert caught.value.code == "conflict"
