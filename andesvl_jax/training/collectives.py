"""What the devices of a compiled program say to each other: collectives by kind, from its HLO text."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|calls|called_computation|true_computation|false_computation)=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"compare\(.*?%([\w.\-]+)\), direction=LT")
_SHARED = re.compile(r"channel_id=\d+|metadata=\{.*?\}")  # by the pieces of one collective
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """`shape` as HLO writes what one device receives ("f32[64,24]"), its `bytes`, and how often a run executes it."""

    kind: str
    shape: str
    bytes: int
    times: int


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a compiled program (`compiled.as_text()`); those in loops of known length count each round.

    A TPU program spreads one gather over what runs beside it, loops too; its pieces, one to a computation, share a channel and
    where in the source they come from, and count as one.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = None
    for line in hlo.splitlines():
        start = _COMPUTATION.match(line)
        if start:
            name = start[2]
            entry = name if start[1] else entry
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)
    found: dict[str, Collective] = {}

    def walk(computation: str, times: int) -> None:
        seen: Counter[str] = Counter()  # what one source line says in each layer, all of a shard_map's on one channel
        for line in bodies.get(computation, ()):
            collective = _COLLECTIVE.search(line)
            if collective:
                name = " ".join(_SHARED.findall(line)) or computation
                seen[name] += 1
                name = f"{name} {seen[name]}"
                if name not in found or times < found[name].times:
                    shape = _received(collective[1], asynchronous=bool(collective[3]), kind=collective[2])
                    found[name] = Collective(collective[2], shape, _bytes(shape), times)
                continue
            rounds = _rounds(line, bodies)
            for called in _CALLED.findall(line):
                walk(called, times * rounds)

    if entry is not None:
        walk(entry, 1)
    return list(found.values())


def by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """{kind: {"count", "bytes"}} of one run, kinds that do not occur left out."""
    totals: dict[str, dict[str, int]] = {}
    for c in found:
        total = totals.setdefault(c.kind, {"count": 0, "bytes": 0})
        total["count"] += c.times
        total["bytes"] += c.times * c.bytes
    return totals


def _rounds(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a line's computations run: a loop's known length, or the constant that its condition counts up to; else 1."""
    known, condition = _TRIPS.search(line), _CONDITION.search(line)
    if known or condition is None:
        return int(known[1]) if known else 1
    tests = "\n".join(bodies.get(condition[1], ()))
    bound = _BOUND.search(tests)
    value = bound and re.search(rf"%{re.escape(bound[1])} = s32\[\]\S* constant\((\d+)\)", tests)
    return int(value[1]) if value else 1


def _received(shape: str, asynchronous: bool, kind: str) -> str:
    """A started collective's shape lists what goes in, then what comes out (all-reduce: only that); layouts are cut off."""
    parts = [f"{dtype}[{sizes}]" for dtype, sizes in _SHAPE.findall(shape)]
    if asynchronous and kind != "all-reduce":
        parts = [p for p in parts if not p.startswith(("u32[]", "s32[]"))]
        parts = parts[len(parts) // 2 :]
    return ", ".join(parts)


def _bytes(shape: str) -> int:
    bits = lambda dtype: _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])  # noqa: E731  # s32, u8, f8e4m3fn
    return sum(bits(dtype) * prod(map(int, filter(None, sizes.split(",")))) // 8 for dtype, sizes in _SHAPE.findall(shape))
