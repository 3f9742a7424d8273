"""A plugin for vLLM, of the tests alone: its processes wait for each other asleep.

A reader of vLLM's queues between processes spins for a second after each message: of two engines on two cores, which is what
`make test` runs, in the way of the models that the spinning waits for. Asleep soon after, readers are woken by the notice that
vLLM sends with each write in any case. Not at once: a notice that follows another within a millisecond is dropped, for ZeroMQ
still takes the pipe of one for full, and a reader that had read the first and slept was woken by nobody for five seconds.
tests/conftest.py puts this folder on the path of the processes that tests start; vLLM finds it by the metadata beside this file.
"""

from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

SPIN_SECONDS = 0.01


def register() -> None:
    """What vLLM calls in each of its processes, before it makes queues."""
    made = SpinCondition.__init__
    if made.__defaults__ != (SPIN_SECONDS,):
        assert made.__defaults__ == (1,), "vLLM's SpinCondition takes other arguments"
        made.__defaults__ = (SPIN_SECONDS,)
