"""Several engines' runs side by side, in turns of a tenth of a second: what a machine does meanwhile, it does to all of them.

A run of many seconds after another run compares two moods of the machine, which may differ by a tenth. So all of a round's runs
are begun at once, and each engine's processes are stopped (SIGSTOP) while another has its turn. A run's seconds are those of
its own turns. Turns are short because moods are: in turns of half a second two plain vLLMs differed by two to four percent from
round to round (standard deviation), in these by one, and by half of one once the worker had a core of its own. Whoever has no
turn, or no part in the round, is stopped: vLLM's processes go on polling for a second after they are done.
"""

import time
from collections.abc import Iterable, Sequence

from tests.bench.engines import Ask, Engine, Took

__all__ = ["TURN_SECONDS", "run_in_turns"]

TURN_SECONDS = 0.1


def run_in_turns(asked: Sequence[tuple[Engine, Ask]], there: Iterable[Engine] = ()) -> list[Took]:
    """What each engine took for its ask; each engine has one, and all others that are `there` are stopped meanwhile. Time to the
    first token is not told: it would be that of all."""
    everybody = {engine.name: engine for engine in (*there, *(engine for engine, _ in asked))}.values()
    seconds = [0.0] * len(asked)
    took: dict[int, Took] = {}
    begun: set[int] = set()
    forward = True
    try:
        for engine in everybody:
            engine.pause()
        while left := [i for i in range(len(asked)) if i not in took]:
            # There and back again, so that nobody is always before the same neighbour.
            for i in left if forward else reversed(left):
                engine, ask = asked[i]
                started = time.perf_counter()
                if i not in begun:
                    engine.begin(ask)
                    begun.add(i)
                engine.resume()
                if engine.answers(TURN_SECONDS):
                    seconds[i] += time.perf_counter() - started
                    took[i] = Took(*engine.answer())._replace(seconds=seconds[i], first_token=None)
                engine.pause()
                if i not in took:
                    seconds[i] += time.perf_counter() - started
            forward = not forward
    finally:
        for engine in everybody:
            engine.resume()
    return [took[i] for i in range(len(asked))]
