from typing import Any

import pytest

from trimtab.server.errors import Overloaded, RateLimited
from trimtab.server.keys.key import Caller, Policy
from trimtab.server.keys.limits import Limits


def caller(name: str = "key:a", **policy: Any) -> Caller:
    return Caller(name, frozenset({"infer"}), Policy(**policy))


def test_a_key_has_so_many_requests_at_a_time_and_a_place_is_free_again() -> None:
    limits, who = Limits(100), caller(concurrent_requests=2)
    with limits.place(who), limits.place(who):
        with pytest.raises(RateLimited, match="2 requests at a time"), limits.place(who):
            pass
        with limits.place(caller("key:b")):
            assert limits.n_running == 3
    with limits.place(who):
        assert limits.n_running == 1
    assert limits.n_running == 0


def test_a_request_that_fails_gives_its_place_back() -> None:
    limits = Limits(1)
    with pytest.raises(ZeroDivisionError), limits.place(caller()):
        raise ZeroDivisionError
    assert limits.n_running == 0


def test_a_key_may_ask_so_often_a_minute_and_is_told_when_again() -> None:
    limits, who = Limits(100), caller(requests_per_minute=3)
    for _ in range(3):
        with limits.place(who):
            pass
    with pytest.raises(RateLimited, match="3 times a minute") as error, limits.place(who):
        pass
    assert 1 <= error.value.retry_after_seconds <= 61
    with limits.place(caller("key:b", requests_per_minute=3)):
        pass


def test_a_full_server_is_overloaded_and_takes_nothing_off_anybodys_quota() -> None:
    limits, who = Limits(1), caller(requests_per_minute=1)
    with limits.place(caller("key:b")), pytest.raises(Overloaded, match="1 requests in hand"), limits.place(who):
        pass
    with limits.place(who):
        pass
