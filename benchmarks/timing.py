"""What both benchmarks share: two sides in turns, medians, read bandwidth of this machine, rows and how they are printed."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

import numpy as np

from andesvl_jax.config import CONFIGS, AndesVLConfig
from andesvl_jax.errors import UserError

QUIET = 0.9  # share of the cores below which timings are not worth comparing
REST_S = 0.3  # between two timings, so that one side's threads have stopped spinning before the other side starts
Row = dict[str, Any]  # {"what": str, "value": float, "unit": str, "peer": float | None, "ratio": float | None}


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(fn: Callable[[], Any]) -> float:
    """Wall-clock time of one call in seconds. fn must not return before its result is computed."""
    began = time.perf_counter()
    fn()
    return time.perf_counter() - began


def in_turns(*sides: Callable[[], float], runs: int) -> tuple[float, ...]:
    """Medians in seconds of `runs` timings of each side, taken A B A B. Each function returns the seconds that count."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(runs):
        for side, found in zip(sides, times, strict=True):
            time.sleep(REST_S)
            found.append(side())
    return tuple(statistics.median(found) for found in times)


def read_bandwidth(gibibytes: float = 1.0, runs: int = 5) -> float:
    """Bytes per second at which all cores together read main memory: the best of `runs` sums, and of `runs` inner products of
    BLAS, over float32 arrays of this size together."""
    x = np.ones(int(gibibytes * 2**30) // 4, np.float32)
    parts = np.array_split(x, cores())
    halves = [np.array_split(part, 2) for part in parts if len(part) % 2 == 0]

    with ThreadPoolExecutor(len(parts)) as pool:
        sums = min(seconds(lambda: list(pool.map(np.sum, parts))) for _ in range(runs))
        products = min(seconds(lambda: list(pool.map(lambda pair: np.dot(*pair), halves))) for _ in range(runs))
    return x.nbytes / min(sums, products)


def share_of_cores(wall_s: float = 1.0) -> float:
    """CPU seconds that one busy thread per core gets, of those it asks for: near 1 on a quiet machine."""
    x = np.ones(1 << 16, np.float32)  # stays in cache
    until = time.perf_counter() + wall_s

    def work() -> None:
        while time.perf_counter() < until:
            np.sum(x)

    began, spent = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(lambda _: work(), range(cores())))
    return (time.process_time() - spent) / (time.perf_counter() - began) / cores()


def fastest_threads(set_threads: Callable[[int], None], fn: Callable[[], Any], runs: int = 2) -> int:
    """Sets and returns the number of threads, one or one per core, with which `fn` is faster (best of `runs` calls)."""
    times = {}
    for threads in sorted({1, cores()}):
        set_threads(threads)
        fn()
        times[threads] = min(seconds(fn) for _ in range(runs))
    best = min(times, key=times.__getitem__)
    set_threads(best)
    return best


def quiet_row(share_before: float) -> Row:
    """What the timings beside this row are worth: the smaller share before and after. Warns on standard error if it is low."""
    share = min(share_before, share_of_cores())
    if share < QUIET:
        print(
            f"warning: other work holds the cores (this process gets {share:.0%} of them); repeat on a quiet machine.",
            file=sys.stderr,
        )
    return row("share of the cores this process gets", share, "of 1")


def row(what: str, value: float, unit: str, peer: float | None = None, faster: float | None = None) -> Row:
    """One line of the result. `faster`: how many times as fast as the peer this project is, where the row is a speed."""
    return {"what": what, "value": value, "unit": unit, "peer": peer, "ratio": faster}


def config_by_name(name: str, configs: Mapping[str, AndesVLConfig] = CONFIGS) -> AndesVLConfig:
    """A configuration in float32 end to end. Raises UserError for an unknown name."""
    if name not in configs:
        raise UserError(f"--config is {name!r}, expected one of {', '.join(configs)}.")
    return configs[name].replace(dtype="float32", param_dtype="float32")


def table(result: dict[str, Any]) -> str:
    """The rows of a result as aligned text: what, this project, PyTorch, unit, how many times as fast."""
    lines = [f"{result['name']:<44s} {'andesvl_jax':>12s} {'PyTorch':>12s} {'unit':<14s} {'times as fast':>13s}"]
    for r in result["rows"]:
        peer = "" if r["peer"] is None else _number(r["peer"])
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        lines.append(f"{r['what']:<44s} {_number(r['value']):>12s} {peer:>12s} {r['unit']:<14s} {ratio:>13s}")
    return "\n".join(lines)


def _number(x: float) -> str:
    if x == 0 or isinstance(x, int):
        return f"{x:,d}" if isinstance(x, int) else "0"
    return f"{x:.2e}" if abs(x) < 1e-2 else f"{x:,.1f}" if abs(x) >= 10 else f"{x:.2f}"


def main(run: Callable[..., dict[str, Any]], default: str, description: str) -> int:
    """The command line of one benchmark. Returns 0, or 2 after a sentence on standard error."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=default, help="a configuration by name (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes and two runs: shows that it works, not how fast")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object as the last line")
    args = parser.parse_args()
    try:
        result = run(args.config, quick=args.quick)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if args.json:
        print(json.dumps(result))
    return 0
