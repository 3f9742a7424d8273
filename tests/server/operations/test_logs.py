import json
import subprocess
import sys

CODE = """
import logging
from trimtab.server.operations import logs
from trimtab.server.service import current
logs.configure("{format}")
current.request_id.set("abc")
logging.getLogger("trimtab").info("request", extra={{"route": "GET /v1/models", "status": 200}})
"""


def run(log_format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(format=log_format)], capture_output=True, text=True, check=True
    )
    return done.stderr.splitlines()


def test_json_is_one_object_a_line() -> None:
    (ours,) = (json.loads(line) for line in run("json"))
    assert (ours["message"], ours["level"], ours["logger"]) == ("request", "INFO", "trimtab")
    assert (ours["route"], ours["status"], ours["request_id"]) == ("GET /v1/models", 200, "abc")


def test_text_names_the_request() -> None:
    (ours,) = run("text")
    assert ours.endswith("INFO trimtab: request route=GET /v1/models status=200 request_id=abc")
