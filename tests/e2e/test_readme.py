"""The README says what the code does: its JSON is accepted, its Python parses, and no field of a bundle goes unmentioned."""

import ast
import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from trimtab.attribution.bundle import Header, LatentRecord, ModelIdentity, RecommendedEdit, SAEIdentity, VectorRecord
from trimtab.client import Applied
from trimtab.server.steering import Edit, Gate, PositionWindow, Scope, Steering, parse_steering

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_each_steering_example_is_accepted() -> None:
    examples = [json.loads(block) for block in blocks("json")]
    steering = [example["steering"] for example in examples if "steering" in example]
    assert len(steering) >= 2
    for field in steering:
        parse_steering(field)


def test_the_proof_example_is_readable() -> None:
    (proof,) = [example for example in map(json.loads, blocks("json")) if "status" in example]
    assert Applied.of({"steering": proof}).status == "applied"


def test_python_blocks_parse() -> None:
    assert blocks("python")
    for block in blocks("python"):
        ast.parse(block)


@pytest.mark.parametrize(
    "record",
    [
        *(Header, ModelIdentity, SAEIdentity, LatentRecord, VectorRecord, RecommendedEdit),
        *(Steering, Edit, Scope, PositionWindow, Gate),
    ],
)
def test_every_field_is_documented(record: type[BaseModel]) -> None:
    missing = [name for name in record.model_fields if not re.search(rf"`(?:\w+\.)?{name}(?:\[\])?`", README)]
    assert missing == []
