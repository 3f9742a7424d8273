"""A plugin for vLLM, of the tests alone: its processes wait for each other asleep.

A reader of vLLM's queues between processes spins for a second after each message: of two engines on two cores, which is what
`make test` runs, in the way of the models that the spinning waits for. Asleep from the first moment, readers are woken by the
message that vLLM sends with each write in any case. tests/conftest.py puts this folder on the path of the processes that tests
start; vLLM finds it by the metadata beside this file.
"""

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SPIN_SECONDS = 0.0


def register() -> None:
    """What vLLM calls in each of its processes, before it makes queues."""
    made = SpinCondition.__init__
    if made.__defaults__ != (SPIN_SECONDS,):
        assert made.__defaults__ == (1,), "vLLM's SpinCondition takes other arguments"
        made.__defaults__ = (SPIN_SECONDS,)
