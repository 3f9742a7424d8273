"""The plugin fits the installed vLLM, and patches it once."""

import pytest

from trimtab.server.engine import pin, plugin
from trimtab.server.errors import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_installed_vllm_has_everything_that_is_patched() -> None:
    pin.check()


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin, "VLLM_VERSION", "0.99.0")
    with pytest.raises(Unsupported, match=r"patches vLLM 0\.99\.0 and this is 0\.32"):
        pin.check()


def test_a_symbol_that_moved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin, "PATCHED", ("vllm.v1.core.sched.scheduler:Scheduler.gone",))
    with pytest.raises(Unsupported, match=r"no vllm\.v1\.core\.sched\.scheduler:Scheduler\.gone"):
        pin.check()


def test_registering_again_patches_nothing() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    plugin.register()
    first = Scheduler.update_from_output
    plugin.register()
    assert Scheduler.update_from_output is first
    assert plugin.registered()
