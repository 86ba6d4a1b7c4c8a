"""Measuring variants of the same work fairly: each in a process of its own, taking turns."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor


def in_new_process(function: Callable, *arguments):
    """What ``function(*arguments)`` returns in a process that does nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def take_turns(start: Callable, measure: Callable, variants: dict[str, tuple], rounds: int) -> dict[str, list]:
    """What ``measure()`` returned in each round, by variant.

    Every variant gets a new process, which first calls ``start(*arguments)`` with the arguments that ``variants`` has
    for it, one after the other; what ``measure`` needs from there it finds in variables of its module.
    """
    context = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, context) for name in variants}
    for name, arguments in variants.items():
        pools[name].submit(start, *arguments).result()
    results = {name: [] for name in variants}
    for _ in range(rounds):
        for name, pool in pools.items():
            results[name].append(pool.submit(measure).result())
    for pool in pools.values():
        pool.shutdown()
    return results
