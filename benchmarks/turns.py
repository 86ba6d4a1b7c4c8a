"""Measuring variants of the same work fairly: each in a process of its own, taking turns."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Collection, Hashable
from concurrent.futures import ProcessPoolExecutor

SPAWN = multiprocessing.get_context("spawn")


def in_new_process(function: Callable, *arguments):
    """What ``function(*arguments)`` returns in a process that does nothing else."""
    with ProcessPoolExecutor(1, SPAWN) as pool:
        return pool.submit(function, *arguments).result()


class Variants:
    """Processes that have been started, one for each variant.

    Args:
        start: what each process calls first, with the arguments that ``variants`` has for it; what ``take_turns`` needs
            from there, it finds in variables of its module.
        variants: by name, or by any other key.
        at_once: how many start beside each other.

    Attributes:
        failed: the errors of variants that could not be started, by name; they take no turns.
    """

    def __init__(self, start: Callable, variants: dict[Hashable, tuple], at_once: int = 1):
        self.failed: dict[Hashable, Exception] = {}
        self.pools: dict[Hashable, ProcessPoolExecutor] = {}
        names = list(variants)
        for i in range(0, len(names), at_once):
            pools = {name: ProcessPoolExecutor(1, SPAWN) for name in names[i : i + at_once]}
            starts = {name: pool.submit(start, *variants[name]) for name, pool in pools.items()}
            for name, started in starts.items():
                try:
                    started.result()
                    self.pools[name] = pools[name]
                except Exception as error:
                    traceback.print_exception(error)
                    print(f"{name} failed to start: {error}", file=sys.stderr, flush=True)
                    self.failed[name] = error
                    pools[name].shutdown()

    def __enter__(self) -> "Variants":
        return self

    def __exit__(self, *_) -> None:
        for pool in self.pools.values():
            pool.shutdown()

    def take_turns(self, measure: Callable, rounds: int = 1, names: Collection | None = None) -> dict[Hashable, list]:
        """What ``measure()`` returned in each round, by variant; by default of all that were started."""
        results = {name: [] for name in (self.pools if names is None else names)}
        for _ in range(rounds):
            for name, found in results.items():
                found.append(self.pools[name].submit(measure).result())
        return results


def take_turns(start: Callable, measure: Callable, variants: dict[str, tuple], rounds: int) -> dict[str, list]:
    """What ``measure()`` returned in each round, by variant, all of which must start."""
    with Variants(start, variants) as started:
        for error in started.failed.values():
            raise error
        return started.take_turns(measure, rounds)
