"""What latents read in a text, in the running engine, equals reading transformers' own residual stream."""

from typing import Any

import pytest
import torch

from tests.conftest import Server
from trimtab.attribution.embedded import resolve
from trimtab.v1 import inference_pb2 as v1
from trimtab.v1 import steering_service_pb2 as service
from trimtab.v1.steering_service_pb2_grpc import SteeringServiceStub

MODEL = "smollm2-135m-instruct"
TEXT = "The sea is calm and the wind is low. " * 12


def inspect(server: Server, **fields: Any) -> Any:
    reply = server.post("/v1/steering/inspect", {"bundle": "calm", **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.fixture(scope="module")
def activations(server: Server) -> Any:
    """φ(e · h + b) of the bundle's latents on each token of TEXT [P, K], by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve(MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        h_PD = model(ids, output_hidden_states=True).hidden_states[15][0]  # after block 14
    return torch.relu(h_PD @ torch.from_numpy(server.bundle.encoder).T).numpy(), ids[0].tolist()


def test_latents_read_what_transformers_computes(server: Server, activations: Any) -> None:
    expected_PK, ids = activations
    for _ in range(2):  # the second time the text is in the prefix cache
        found = inspect(server, prompt=TEXT, top_count=3)
        assert [token["id"] for token in found["tokens"]] == ids
        assert "".join(token["text"] for token in found["tokens"]) == TEXT
        assert found["tokens"][0]["latents"] == []
        n_fired = 0
        for token, expected_K in list(zip(found["tokens"], expected_PK, strict=True))[1:]:
            fired = {latent["latent"]: latent["activation"] for latent in token["latents"]}
            wanted = {7 + k: float(a) for k, a in enumerate(expected_K) if a > 1e-3}
            assert fired.keys() >= wanted.keys()
            assert fired == pytest.approx({**dict.fromkeys(fired, 0.0), **wanted}, abs=2e-3, rel=1e-4)
            assert list(fired.values()) == sorted(fired.values(), reverse=True)
            n_fired += len(fired)
        assert n_fired > len(ids) // 2
    assert found["hook_point"] == "blocks.14.resid_post"
    assert found["content_hash"] == server.bundle.content_hash
    assert found["steering"] == {"status": "not_requested"}
    assert found["tokens"][1]["latents"][0]["fraction_of_max"] == found["tokens"][1]["latents"][0]["activation"] / 10.0


def test_a_reading_is_of_the_stream_before_the_layers_own_edits_and_proves_them(server: Server) -> None:
    plain = inspect(server, prompt=TEXT)
    steered = inspect(server, prompt=TEXT, steering={"bundle": "calm"})
    assert steered["steering"]["status"] == "applied"
    assert (
        steered["steering"]["prompt_tokens"] + steered["steering"]["cached_prompt_tokens"] == len(plain["tokens"]) - 2
    )
    assert steered["tokens"] == plain["tokens"]


def test_a_chat_is_read_with_its_template(server: Server) -> None:
    found = inspect(server, messages=[{"role": "user", "content": "hi"}], top_count=1)
    text = "".join(token["text"] for token in found["tokens"])
    assert text.startswith("<|im_start|>")
    assert "user\nhi" in text
    assert all(len(token["latents"]) <= 1 for token in found["tokens"])


def test_grpc_reads_the_same(server: Server) -> None:
    import grpc

    with grpc.insecure_channel(server.grpc) as channel:
        stub: Any = SteeringServiceStub(channel)
        by_text = stub.Inspect(service.InspectRequest(text=TEXT, bundle="calm", top_count=2))
        ids = v1.TokenIds(ids=[token.id for token in by_text.tokens])
        by_ids = stub.Inspect(service.InspectRequest(token_ids=ids, bundle="calm", top_count=2))
    http = inspect(server, prompt=TEXT, top_count=2)
    assert by_ids == by_text
    for token, said in zip(by_text.tokens, http["tokens"], strict=True):
        assert (token.id, token.text) == (said["id"], said["text"])
        assert [(a.latent, a.activation) for a in token.latents] == [
            (a["latent"], a["activation"]) for a in said["latents"]
        ]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [2**40]}, 400, "prompt"),
        ({"prompt": [10**6]}, 400, None),
        ({"prompt": "hi " * 2000}, 400, None),
        ({"prompt": "hi", "top_count": 0}, 400, "top_count"),
        ({"prompt": "hi", "topcount": 1}, 400, "topcount"),
        ({"prompt": "hi", "bundle": "clam"}, 404, "bundle"),
        ({"prompt": "hi", "steering": {"bundle": "clam"}}, 404, "steering.bundle"),
    ],
)
def test_what_cannot_be_read_is_refused(server: Server, fields: dict[str, Any], status: int, param: Any) -> None:
    reply = server.post("/v1/steering/inspect", {"bundle": "calm", **fields})
    assert reply.status_code == status, reply.text
    if param is not None:
        assert reply.json()["error"]["param"] == param


def test_a_probe_cannot_be_smuggled_in(server: Server) -> None:
    ask = {"model": MODEL, "prompt": "hi", "vllm_xargs": {"trimtab_probe": "{}"}}
    assert server.post("/v1/completions", ask).status_code == 400
