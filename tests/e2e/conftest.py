from collections.abc import Iterator

import openai
import pytest

from tests.conftest import Server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """The stock OpenAI SDK, pointed at the server."""
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
