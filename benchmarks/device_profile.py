"""What a device did during some steps: its kernels, how busy it was, and where it stood still."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHORTEST_GAP = 2.0  # microseconds; kernels that follow one another at once have less between them
WAITS_AND_ALLOCATIONS = ("Synchronize", "cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaMallocHost")


@dataclass(frozen=True)
class Interval:
    """A kernel or copy on the device, from ``start`` to ``end`` in microseconds."""

    name: str
    start: float
    end: float


def profiled(run_steps: Callable[[int], None], num_steps: int, on_gpu: bool) -> dict:
    """``summary`` of ``num_steps`` steps on a GPU, or of the operations of the CPU, where nested ones count twice.

    The profile ends with a wait of its own. Nothing is known where the driver keeps its counters to itself.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run_steps(num_steps)
        if on_gpu:
            torch.cuda.synchronize()
    events = profiler.events()
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU
    intervals = [
        Interval(event.name, event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == device and not event.is_user_annotation  # which spans kernels, and the gaps between
    ]
    calls = [event.name for event in events if event.device_type == DeviceType.CPU]
    return summary(intervals, calls, num_steps) if intervals else {}


def summary(intervals: list[Interval], host_calls: list[str], num_steps: int) -> dict:
    """
    Args:
        intervals: what the device did.
        host_calls: names of what the host did.
        num_steps: how many steps that was.

    Returns:
        ``busy_share``, the share of the time from the first to the last interval in which the device did something,
        and ``busy_ms_per_step``; ``kernels_per_step``; ``gaps_per_step`` and ``gap_ms_per_step``, of those that are
        longer than kernels in a row have between them; ``host_calls_per_step``, those that wait or allocate;
        ``heaviest``, the ten names that took the most time, each with its milliseconds per step, calls per step and
        share of all kernels' time.
    """
    intervals = sorted(intervals, key=lambda one: one.start)
    busy, gaps, end = 0.0, [], intervals[0].start
    totals, counts = defaultdict(float), defaultdict(int)
    for one in intervals:
        if one.start - end > SHORTEST_GAP:
            gaps.append(one.start - end)
        busy += max(0.0, one.end - max(one.start, end))
        end = max(end, one.end)
        totals[one.name] += one.end - one.start
        counts[one.name] += 1
    waits = defaultdict(int)
    for name in host_calls:
        if any(part in name for part in WAITS_AND_ALLOCATIONS):
            waits[name] += 1
    heaviest = sorted(totals, key=totals.get, reverse=True)[:10]
    all_time = sum(totals.values())
    return {
        "busy_share": busy / (end - intervals[0].start),
        "busy_ms_per_step": busy / 1000 / num_steps,
        "kernels_per_step": len(intervals) / num_steps,
        "gaps_per_step": len(gaps) / num_steps,
        "gap_ms_per_step": sum(gaps) / 1000 / num_steps,
        "host_calls_per_step": {name: number / num_steps for name, number in waits.items()},
        "heaviest": [
            {
                "name": name,
                "ms": totals[name] / 1000 / num_steps,
                "calls": counts[name] / num_steps,
                "share": totals[name] / all_time,
            }
            for name in heaviest
        ],
    }


def as_text(found: dict) -> str:
    """A ``summary`` in lines."""
    if not found:
        return "the profiler has seen nothing of the device"
    waits = ", ".join(f"{name} {number:g}" for name, number in found["host_calls_per_step"].items()) or "none"
    lines = [
        f"busy {100 * found['busy_share']:.1f} %; per step {found['kernels_per_step']:g} kernels, "
        f"{found['gaps_per_step']:g} gaps of {found['gap_ms_per_step']:.3f} ms together",
        f"calls of the host that wait or allocate, per step: {waits}",
    ]
    lines += [
        f"{one['ms']:9.3f} ms {100 * one['share']:5.1f} % {one['calls']:6g} x {one['name'][:90]}"
        for one in found["heaviest"]
    ]
    return "\n".join(lines)
