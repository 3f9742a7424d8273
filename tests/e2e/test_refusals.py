"""What the server does not do, it refuses with a sentence; a request is never quietly unsteered."""

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.bundles import random_bundle
from tests.conftest import TRIMTAB, Server
from trimtab.attribution.bundle import ModelIdentity

MODEL = "smollm2-135m-instruct"
EDIT = {"bundle": "calm", "latent": 7, "operation": "add", "amount": 1.0}


def refused(server: Server, status: int, code: str, param: str | None = None, /, **fields: Any) -> dict[str, Any]:
    document = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, **fields}
    response = server.post("/v1/chat/completions", document)
    error: dict[str, Any] = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param
    return error


def test_an_unknown_bundle_is_a_404(server: Server) -> None:
    error = refused(server, 404, "unknown_bundle", "steering.bundle", steering={"bundle": "clam"})
    assert "loaded: calm" in error["message"]


def test_a_latent_that_the_bundle_lacks_is_named(server: Server) -> None:
    error = refused(server, 400, "invalid_steering", steering={"edits": [EDIT, {**EDIT, "latent": 70000}]})
    assert error["violations"][0]["field"] == "steering.edits[1].latent"
    assert "which holds 3 (7, 8, 9)" in error["message"]


def test_an_unknown_model_is_a_404(server: Server) -> None:
    refused(server, 404, "model_not_found", "model", model="gpt-4o")


def test_the_sdk_raises_its_own_types(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model=f"{MODEL}@clam", prompt="hi")
    assert (error.value.code, error.value.param) == ("unknown_bundle", "model")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(
            model=MODEL, prompt="hi", extra_body={"steering": {"bundle": "calm", "strength": "high"}}
        )


@pytest.mark.parametrize("name", ["steer", "sterring", "Steering"])
def test_a_misspelt_steering_is_no_unsteered_200(server: Server, name: str) -> None:
    error = refused(server, 400, "invalid_steering", name, **{name: {"bundle": "calm"}})
    assert "did you mean `steering`" in error["message"]


def test_all_that_is_wrong_comes_at_once(server: Server) -> None:
    steering = {"edits": [{**EDIT, "amont": 1}, {**EDIT, "operation": "smooth"}], "strength": 1000}
    error = refused(server, 400, "invalid_steering", steering=steering, cache_salt="x")
    fields = {violation["field"] for violation in error["violations"]}
    assert fields == {"steering.edits[0].amont", "steering.edits[1].operation", "steering.strength", "cache_salt"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("cache_salt", "a"), ("kv_transfer_params", {"do_remote_prefill": True}), ("extra_body", {"steering": {}})],
)
def test_fields_of_the_servers_own_are_refused(server: Server, field: str, value: Any) -> None:
    refused(server, 400, "invalid_request", field, **{field: value})


def test_a_plan_cannot_be_smuggled_in(server: Server) -> None:
    wire = json.dumps({"hash": "sha256:0", "rows": []})
    refused(server, 400, "invalid_steering", "vllm_xargs.trimtab", vllm_xargs={"trimtab": wire})


def test_beam_search_cannot_be_steered(server: Server) -> None:
    refused(server, 400, "invalid_steering", "use_beam_search", use_beam_search=True, n=2, steering={"bundle": "calm"})


def test_vllms_own_checks_keep_their_field(server: Server) -> None:
    refused(server, 400, "invalid_request", "temperature", temperature=-1)
    refused(server, 400, "invalid_request", "prompt_logprobs", prompt_logprobs=-5)
    refused(server, 400, "invalid_request", "max_tokens", max_tokens=100_000)


def test_a_field_that_vllm_looks_into_unseen_is_no_error_of_the_server(server: Server) -> None:
    """A list where vLLM asks an object for a key was a 500."""
    refused(server, 400, "invalid_request", "body", structured_outputs=[])


def post_text(server: Server, text: str | bytes, media: str = "application/json") -> tuple[int, dict[str, Any]]:
    response = httpx.post(
        server.base_url + "/v1/completions", content=text, headers={"content-type": media}, timeout=60
    )
    return response.status_code, response.json()["error"]


def test_nan_is_refused_by_its_path(server: Server) -> None:
    text = f'{{"model": "{MODEL}", "prompt": "hi", "steering": {{"bundle": "calm", "strength": NaN}}}}'
    status, error = post_text(server, text)
    assert (status, error["param"]) == (400, "steering.strength")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"steering": {"bundle": "calm"}, "steering": {}}', '{"a":' * 9000]
)
def test_what_is_no_json_object_is_refused(server: Server, text: str) -> None:
    assert post_text(server, text)[0] == 400


def test_text_that_no_tokenizer_takes_is_refused(server: Server) -> None:
    assert post_text(server, f'{{"model": "{MODEL}", "prompt": "\\ud800"}}')[0] == 400
    body, media = rb'{"model": "\ud800", "tokens": []}', {"content-type": "application/json"}
    # The refusal of a model that nobody serves repeats its name, which cannot be written: a 500 before.
    assert httpx.post(server.base_url + "/v1/detokenize", content=body, headers=media, timeout=60).status_code == 400


def test_a_form_is_refused(server: Server) -> None:
    status, error = post_text(server, "{}", "text/plain")
    assert (status, error["param"]) == (400, "content-type")


def test_a_body_too_large_is_a_413(server: Server) -> None:
    status, error = post_text(server, b" " * (9 << 20))
    assert (status, error["code"]) == (413, "request_too_large")


def test_what_is_over_a_bound_is_refused_before_anything_is_made_of_it(server: Server) -> None:
    for headers in ({f"x-{i}": "" for i in range(101)}, {"x-long": "x" * (33 << 10)}):
        reply = httpx.get(f"{server.base_url}/v1/models", headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (431, "headers_too_large")
    status, error = post_text(server, '{"prompt": ' + "[" * 64 + "]" * 64 + "}")
    assert (status, "nested more than 64 deep" in error["message"]) == (400, True)
    refused(server, 400, "invalid_steering", "steering.edits", steering={"edits": [EDIT] * 65})


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/tokenize", "/pause", "/v1/responses/resp_1", "/v1/models/", "/health", "/"]
)
def test_a_route_that_is_not_ours_is_not_there(server: Server, path: str) -> None:
    response = httpx.get(server.base_url + path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_another_method_is_refused(server: Server) -> None:
    response = httpx.get(server.base_url + "/v1/chat/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


def test_two_requests_of_one_id_do_not_meet(server: Server) -> None:
    headers = {"x-request-id": "mine"}
    ask = {"model": MODEL, "prompt": "hi", "max_tokens": 2, "request_id": "mine"}
    replies = [httpx.post(server.base_url + "/v1/completions", json=ask, headers=headers, timeout=60) for _ in range(2)]
    assert [reply.headers["x-request-id"] for reply in replies] == ["mine", "mine"]
    assert len({reply.json()["id"] for reply in replies}) == 2
    assert "mine" not in replies[0].json()["id"]


def test_a_server_does_not_start_on_a_bundle_of_another_model(embedded_identity: ModelIdentity, tmp_path: Path) -> None:
    random_bundle(embedded_identity.model_copy(update={"fingerprint": "sha256:other"}), layer=14).save(
        tmp_path / "other.tt"
    )
    command = [str(TRIMTAB), "serve", MODEL, "--bundle", str(tmp_path / "other.tt"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "bundle 'calm' was made for" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # `tests/server/service/test_flags.py` has them all, without a process
def test_a_server_does_not_start_on_a_flag_that_breaks_steering(tmp_path: Path) -> None:
    command = [str(TRIMTAB), "serve", MODEL, "--port", "0", "--", "--api-server-count", "2", "--tokenizer", "gpt2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "--api-server-count is refused" in done.stderr
    assert "--tokenizer is refused" in done.stderr
