"""What the gateway costs beside its peers: CPU of a call, added latency, streams, the pair's overhead, records.

    python -m tests.benchmarks.gateway.bench [--rounds 7] [--seconds 2] [--peers portkey,nginx] [--parts cpu,trace]

Everything runs on loopback: gateways on core 0, load and stub endpoints (Go) on core 1. Ours makes its two upstream
calls, a peer one. Rounds go forth and back over the targets (ABBA); who is not measured is stopped meanwhile; every
second round begins with new processes. Each figure is the median of the rounds' ratios. The last line is one JSON
object; a peer that could not be measured is null there, and `reasons` says why. See docs/gateway-benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.gateway import targets
from tests.benchmarks.gateway.load import Ask, Stubs, Window, chat, measure
from tests.benchmarks.gateway.processes import Unavailable
from tests.benchmarks.gateway.targets import Place, Target

GATEWAY, LOAD = 0, 1  # cores
CONNECTIONS = 32
SETTLE = 0.7  # seconds after a window that count as well: records are shipped then
PARTS = ("cpu", "latency", "stream", "pair", "trace")
PEERS = ("litellm_python", "litellm_rust", "portkey", "rust_router", "nginx")
RUST_MODE = "answers chat completions in Python although the deployment says `rust: true`: no header x-litellm-rust"


# ---------------------------------------------------------------- what is known so far
@dataclass
class Findings:
    """Values by name, one a round; and why others are missing."""

    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def ratio(self, name: str, above: str, below: str) -> None:
        """The median of the rounds' ratios."""
        pairs = zip(self.rounds.get(above, []), self.rounds.get(below, []), strict=False)
        self._sum_up(name, [one / other for one, other in pairs if other])

    def difference(self, name: str, one: str, other: str) -> None:
        pairs = zip(self.rounds.get(one, []), self.rounds.get(other, []), strict=False)
        self._sum_up(name, [first - second for first, second in pairs])

    def _sum_up(self, name: str, values: Sequence[float]) -> None:
        if not values:
            self.facts[name] = None
            return
        self.facts[name] = _short(statistics.median(values))
        if len(values) > 1:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
            self.facts.setdefault("iqr", {})[name] = [_short(low), _short(high)]

    def medians(self) -> dict[str, float]:
        return {name: _short(statistics.median(values)) for name, values in sorted(self.rounds.items())}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


# ---------------------------------------------------------------- the field
class Field:
    """All targets that run side by side, each stopped unless it is measured."""

    def __init__(self, place: Place, peers: Sequence[str], found: Findings) -> None:
        self.place, self.found = place, found
        stubs = place.stubs
        self._makers: dict[str, Callable[[], Target]] = {
            "cowest": lambda: targets.cowest(place, targets.pair_routing(stubs, "plain", "plain")),
            "cowest_paced": lambda: targets.cowest(place, targets.pair_routing(stubs, "paced", "paced")),
            "litellm_python": lambda: targets.litellm(place, rust=False),
            "litellm_rust": lambda: targets.litellm(place, rust=True),
            "portkey": lambda: targets.portkey(place),
            "rust_router": lambda: targets.vllm_router(place),
            "nginx": lambda: targets.nginx(place),
        }
        self._peers = list(peers)
        self.running: dict[str, Target] = {}

    def choose(self) -> None:
        """Of two Rust routers the cheaper one; LiteLLM's Rust mode only where it is one."""
        if "litellm_rust" in self._peers:
            self._try_rust_mode()
        if "rust_router" in self._peers:
            self._choose_router()

    def _try_rust_mode(self) -> None:
        try:
            with stopping(self._makers["litellm_rust"]()) as target:
                seen = measure(target.plain, LOAD, ["-seconds", "0.5", "-watch", "X-Litellm-Rust"])
            if "true" in seen["headers"].get("X-Litellm-Rust", {}):
                return
            why = f"LiteLLM {target.version} {RUST_MODE}"
        except Unavailable as error:
            why = str(error)
        self._without("litellm_rust", why)

    def _choose_router(self) -> None:
        costs: dict[str, float] = {}
        makers = {"vllm-router": targets.vllm_router, "smg": targets.smg}
        for name, maker in makers.items():
            try:
                with stopping(maker(self.place)) as target:
                    costs[name] = cpu_of(target, target.paced, 200, 2.0)[0]
            except Unavailable as error:
                self.found.reasons[name] = str(error)
        if not costs:
            self._without("rust_router", "neither vllm-router nor smg runs")
            return
        cheapest = min(costs, key=lambda name: costs[name])
        self.found.facts["rust_router"] = {"chosen": cheapest, "cpu_us": {n: _short(c) for n, c in costs.items()}}
        self._makers["rust_router"] = lambda: makers[cheapest](self.place)

    def _without(self, peer: str, why: str) -> None:
        self.found.reasons[peer] = why
        self._peers.remove(peer)
        print(f"{peer} is left out: {why}", file=sys.stderr, flush=True)

    def renew(self) -> None:
        """New processes for all."""
        self.stop()
        for name in ("cowest", "cowest_paced", *list(self._peers)):
            try:
                target = self.running[name] = self._makers[name]()
            except Unavailable as error:
                self._without(name, str(error))
                continue
            self.found.facts.setdefault("versions", {})[name] = f"{target.name} {target.version}"
            warm(target)
            _pause(target)

    def stop(self) -> None:
        for target in self.running.values():
            for tree in target.trees():
                tree.stop()
        self.running = {}

    @contextmanager
    def only(self, name: str) -> Iterator[Target]:
        target = self.running[name]
        for tree in target.trees():
            tree.go_on()
        try:
            yield target
        finally:
            _pause(target)

    def peers(self) -> list[str]:
        return [name for name in self.running if not name.startswith("cowest")]


def _pause(target: Target) -> None:
    for tree in target.trees():
        tree.pause()


@contextmanager
def stopping(target: Target) -> Iterator[Target]:
    try:
        yield target
    finally:
        for tree in target.trees():
            tree.stop()


def warm(target: Target) -> None:
    """What a process loads at its first calls, streams and shipped records is no cost of the calls that are counted."""
    for ask in (target.paced, target.plain):
        if ask:
            measure(ask, LOAD, ["-seconds", "1"], 4)
    measure(target.plain, LOAD, ["-seconds", "0.3", "-stream"])
    time.sleep(SETTLE)


DISTURBED: list[float] = []  # shares of the gateway's core that others had, a window each


def busy_us(core: int) -> float:
    """What the core has worked so far, for whomever."""
    found = re.search(rf"^cpu{core} (.*)", Path("/proc/stat").read_text(), re.M)
    assert found is not None
    user, nice, system, _, _, *rest = map(int, found[1].split()[:8])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") * 1e6


def cpu_of(target: Target, ask: Ask | None, rate: float, seconds: float) -> tuple[float, dict[str, Any]]:
    """Microseconds of CPU a call at a fixed rate, of the whole process tree until it is at rest again."""
    assert ask is not None
    begun, busy = time.monotonic(), busy_us(GATEWAY)
    flags = ["-rate", str(rate), "-seconds", str(seconds), "-watch", "X-Cowest-Mode", "-watch", "X-Cowest-Trace"]
    with Window(ask, LOAD, *flags, connections=CONNECTIONS) as window:
        time.sleep(0.1)
        before = target.tree.cpu_us()
        seen = window.run()
        time.sleep(SETTLE)
        used = target.tree.cpu_us() - before
        others = busy_us(GATEWAY) - busy - used
        DISTURBED.append(max(0.0, others / (time.monotonic() - begun) / 1e6))
        return used / max(1, seen["calls"]), seen


# ---------------------------------------------------------------- the parts
def there_and_back(names: Iterable[str]) -> list[str]:
    order = list(names)
    return [*order, *reversed(order)]


@dataclass(frozen=True)
class Rates:
    """Calls a second: half of what the slowest of a group can do, so that nobody is measured drowning."""

    slow: float
    fast: float
    slow_peers: tuple[str, ...]

    def of(self, peer: str) -> float:
        return self.slow if peer in self.slow_peers else self.fast


def find_rates(field: Field, found: Findings) -> Rates:
    ceilings: dict[str, float] = {}
    for name in field.running:
        with field.only(name) as target:
            ask = target.paced or target.plain
            seen = measure(ask, LOAD, ["-seconds", "2"], CONNECTIONS)
            ceilings[name] = seen["calls"] / seen["seconds"]
    stub = measure(Ask((chat(field.place.stubs.v1("plain")),)), LOAD, ["-seconds", "1"], CONNECTIONS)
    capacity = stub["calls"] / stub["seconds"]
    slow_peers = tuple(name for name in ceilings if name.startswith("litellm"))
    slow = min((ceilings[name] for name in slow_peers), default=0.0) / 2
    fast = min(ceiling for name, ceiling in ceilings.items() if name not in slow_peers and name != "cowest") / 2
    rates = Rates(max(1.0, round(slow)), max(1.0, round(fast)), slow_peers)
    found.facts["ceilings_per_second"] = {name: round(value) for name, value in ceilings.items()}
    found.facts["rates_per_second"] = {"litellm": rates.slow, "others": rates.fast}
    found.facts["stub_calls_per_second"] = round(capacity)
    found.facts["mock_bound"] = capacity < 5 * 2 * rates.fast
    return rates


def cpu_round(field: Field, found: Findings, rates: Rates, seconds: float) -> None:
    peers = field.peers()
    used: dict[str, list[float]] = defaultdict(list)
    groups = {
        "fast": [p for p in peers if p not in rates.slow_peers],
        "slow": [p for p in peers if p in rates.slow_peers],
    }
    for group, members in groups.items():
        if not members:
            continue
        for name in there_and_back(["cowest_paced", *members]):
            with field.only(name) as target:
                rate = rates.slow if group == "slow" else rates.fast
                cost, seen = cpu_of(target, target.paced or target.plain, rate, seconds)
                noted(found, name, seen)
                used[f"cpu_us.{name}" + (f".{group}" if name == "cowest_paced" else "")].append(cost)
    for name, costs in used.items():
        found.rounds[name].append(statistics.mean(costs))
    for name in ("cowest_paced", *peers):
        found.rounds[f"rss_mb.{name}"].append(field.running[name].tree.rss_bytes() / 1e6)


def noted(found: Findings, name: str, seen: dict[str, Any]) -> None:
    """An answer that failed, or one of ours that was not the pair's or not durable, would spoil the comparison."""
    found.failures[name] += seen["failures"]
    if name.startswith("cowest"):
        good = seen["calls"] - seen["failures"]
        headers = seen["headers"]
        if "X-Cowest-Mode" in headers:
            found.failures[f"{name}.not_pair"] += good - headers["X-Cowest-Mode"].get("Pair", 0)
            found.failures[f"{name}.not_durable"] += good - headers["X-Cowest-Trace"].get("durable", 0)
    elif seen["calls"] and seen["calls"] == seen["failures"]:
        found.reasons.setdefault(name, f"all calls failed: {seen['kinds']}")


def latency_round(field: Field, found: Findings, seconds: float, stream: bool) -> None:
    """One call at a time. Added is what a gateway takes more than its upstream calls made directly."""
    stub = chat(field.place.stubs.v1("plain"))
    direct = {"direct": Ask((stub,)), "direct_twice": Ask((stub, stub))}
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    flags = ["-seconds", str(seconds), *(["-stream"] if stream else [])]
    for name in there_and_back([*direct, "cowest", *field.peers()]):
        if name in direct:
            seen = measure(direct[name], LOAD, flags)
        else:
            with field.only(name) as target:
                seen = measure(target.plain, LOAD, flags)
            key = f"{name}.stream" if stream else name
            noted(found, key, seen)
        for kind in ("ttft", "frame") if stream else ("latency",):
            values[kind][name].extend(seen[f"{kind}_us"] or [])
    for kind, by_name in values.items():
        for name, samples in by_name.items():
            base = direct_of(name)
            if len(samples) < 2 or not base:
                continue
            for q, label in ((0.5, "p50"), (0.99, "p99")):
                below = quantile(by_name[base if kind != "frame" else "direct"], q)
                found.rounds[f"added_{kind}_{label}_us.{name}"].append(max(1.0, quantile(samples, q) - below))


def direct_of(name: str) -> str:
    """The upstream calls of a target, made without it; none for those calls themselves."""
    return "" if name.startswith("direct") else "direct_twice" if name.startswith("cowest") else "direct"


def quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def pair_part(place: Place, peers: Sequence[str], found: Findings, rounds: int) -> None:
    """Weak 50 ms, then strong 200 ms: all that a gateway adds to the sum, as one measures that directly."""
    stubs = place.stubs
    routing = targets.pair_routing(stubs, "slow_weak", "slow_strong")
    makers: dict[str, Callable[[], Target]] = {"pair": lambda: targets.cowest(place, routing)}
    if "litellm_python" in peers and "litellm_python" not in found.reasons:
        makers["litellm_pair"] = lambda: targets.litellm(place, rust=False)
    makers["ray_pair"] = lambda: again(lambda: targets.ray(place, routing))
    asks = {"ideal": Ask((chat(stubs.v1("slow_weak")), chat(stubs.v1("slow_strong"))))}
    running: dict[str, Target] = {}
    with ExitStack() as all_of_them:
        for name, maker in makers.items():
            try:
                running[name] = all_of_them.enter_context(stopping(maker()))
                asks[name] = running[name].slow or running[name].plain
                measure(asks[name], LOAD, ["-seconds", "1"], 2)
            except Unavailable as error:
                found.reasons[name] = str(error)
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        for target in running.values():
            if target.name != "ray":  # its parts would take each other for dead
                _pause(target)
        for _ in range(rounds):
            pair_round(asks, running, found)
    for name in makers:
        found.ratio(f"{name}_over_ideal", f"pair_us.{name}", "pair_us.ideal")


def again(maker: Callable[[], Target]) -> Target:
    """Ray gives its parts 30 s to start, which a busy machine may not have the first time."""
    try:
        return maker()
    except Unavailable:
        return maker()


def pair_round(asks: dict[str, Ask], running: dict[str, Target], found: Findings) -> None:
    samples: dict[str, list[float]] = defaultdict(list)
    for name in there_and_back(asks):
        trees = [] if name not in running or running[name].name == "ray" else running[name].trees()
        for tree in trees:
            tree.go_on()
        seen = measure(asks[name], LOAD, ["-seconds", "2"])
        found.failures[name] += seen["failures"]
        samples[name] += seen["latency_us"]
        for tree in trees:
            tree.pause()
    for name, values in samples.items():
        if values:
            found.rounds[f"pair_us.{name}"].append(statistics.median(values))


def trace_part(place: Place, found: Findings, rounds: int, rate: float, seconds: float) -> None:
    """The same process with durable records, with records in memory, and with none; then the puts of a longer while."""
    routing = targets.pair_routing(place.stubs, "paced", "paced")
    names: tuple[targets.Records, ...] = ("spool", "memory", "none")
    with ExitStack() as all_of_them:
        running = {n: all_of_them.enter_context(stopping(targets.cowest(place, routing, n))) for n in names}
        for target in running.values():
            warm(target)
            _pause(target)
        for _ in range(rounds):
            used: dict[str, list[float]] = defaultdict(list)
            for name in there_and_back(names):
                target = running[name]
                target.tree.go_on()
                cost, seen = cpu_of(target, target.paced, rate, seconds)
                found.failures[f"records_{name}"] += seen["failures"]
                used[name].append(cost)
                target.tree.pause()
            for name, costs in used.items():
                found.rounds[f"records_cpu_us.{name}"].append(statistics.mean(costs))
        running["spool"].tree.go_on()
        before = place.stubs.puts()
        _, seen = cpu_of(running["spool"], running["spool"].paced, rate, max(10.0, 8 * seconds))
        time.sleep(2 * SETTLE)
        found.facts["puts_per_1000_calls"] = _short((place.stubs.puts() - before) / seen["calls"] * 1000)
    found.ratio("trace_tax", "records_cpu_us.spool", "records_cpu_us.none")
    found.ratio("spool_over_memory", "records_cpu_us.spool", "records_cpu_us.memory")


def disk(folder: Path, found: Findings, times: int = 500) -> None:
    """How long a durable answer waits for the disk at least, whoever writes."""
    waits = []
    with (folder / "probe").open("ab", buffering=0) as file:
        for _ in range(times):
            file.write(b"x" * 4096)
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            waits.append((time.perf_counter() - begun) * 1e6)
            time.sleep(0.002)
    found.facts["fdatasync_us"] = {"p50": _short(quantile(waits, 0.5)), "p99": _short(quantile(waits, 0.99))}


# ---------------------------------------------------------------- the whole
def compare(field: Field, found: Findings, options: argparse.Namespace) -> Rates:
    field.choose()
    field.renew()
    rates = find_rates(field, found)
    for number in range(options.rounds):
        if number and number % options.fresh_every == 0:
            field.renew()
        if "cpu" in options.parts:
            cpu_round(field, found, rates, options.seconds)
        if "latency" in options.parts:
            latency_round(field, found, options.seconds / 2, stream=False)
        if "stream" in options.parts:
            latency_round(field, found, options.seconds * 0.6, stream=True)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    field.stop()
    return rates


def sum_up(found: Findings) -> None:
    for peer in PEERS:
        ours = "cpu_us.cowest_paced." + ("slow" if peer.startswith("litellm") else "fast")
        found.ratio(f"cpu_vs_{peer}", f"cpu_us.{peer}", ours)
    for peer in PEERS:
        found.ratio(f"p99_vs_{peer}", f"added_latency_p99_us.{peer}", "added_latency_p99_us.cowest")
        found.ratio(f"ttft_p99_vs_{peer}", f"added_ttft_p99_us.{peer}", "added_ttft_p99_us.cowest")
    for label in ("p50", "p99"):
        ours, theirs = f"added_frame_{label}_us.cowest", f"added_frame_{label}_us.nginx"
        found.difference(f"frame_{label}_over_nginx_us", ours, theirs)


FIRST = (
    *("cpu_vs_litellm_python", "cpu_vs_litellm_rust", "cpu_vs_portkey", "cpu_vs_rust_router", "cpu_vs_nginx"),
    *("p99_vs_litellm_python", "ttft_p99_vs_litellm_python", "frame_p50_over_nginx_us", "frame_p99_over_nginx_us"),
    *("pair_over_ideal", "litellm_pair_over_ideal", "ray_pair_over_ideal", "trace_tax", "puts_per_1000_calls"),
)


def main() -> int:
    options = parser().parse_args()
    found = Findings()
    begun = time.monotonic()
    if (os.cpu_count() or 1) < 2:
        sys.exit("wanted two cores, one for the gateway and one for the load; saw one")
    os.sched_setaffinity(0, {LOAD})
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="gateway-bench-") as name:
        work = Path(name)
        ends = {"plain": "", "paced": "delay=10ms", "slow_weak": "delay=50ms", "slow_strong": "delay=200ms"}
        stubs = Stubs(work / "stubs.log", LOAD, **ends)
        place = Place(work, stubs, GATEWAY)
        field = Field(place, options.peers, found)
        disk(work, found)
        try:
            rate = options.rate
            if {"cpu", "latency", "stream"} & set(options.parts):
                rate = compare(field, found, options).fast
            if "pair" in options.parts:
                pair_part(place, options.peers, found, options.rounds)
            if "trace" in options.parts:
                trace_part(place, found, options.rounds, rate, options.seconds)
        except KeyboardInterrupt:
            found.reasons["interrupted"] = "the rounds before the interruption count"
        finally:
            field.stop()
            stubs.tree.stop()
    sum_up(found)
    found.facts["machine"] = machine()
    found.facts["core_taken_by_others"] = _short(statistics.median(DISTURBED)) if DISTURBED else None
    found.facts["minutes"] = round((time.monotonic() - begun) / 60, 1)
    print(json.dumps({"medians": found.medians()}, indent=1))
    print(json.dumps(result(found)))
    return 0


def machine() -> str:
    model = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)
    name = model[1] if model else platform.machine()
    return f"{os.cpu_count()} cores {name}, Linux {platform.release()}, Python {platform.python_version()}"


def result(found: Findings) -> dict[str, Any]:
    first = {name: found.facts.get(name) for name in FIRST}
    failed = {name: count for name, count in found.failures.items() if count}
    rest = {name: value for name, value in found.facts.items() if name not in first}
    return {**first, "failures": failed, "reasons": found.reasons, **rest}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = lambda known: lambda text: _some(text, known)  # noqa: E731
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--seconds", type=float, default=2.0, help="of a window of CPU; the others go by it")
    flags.add_argument("--fresh-every", type=int, default=2, help="rounds after which all processes are new")
    flags.add_argument("--peers", type=some(PEERS), default=PEERS, help=f"some of {','.join(PEERS)}")
    flags.add_argument("--parts", type=some(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    flags.add_argument("--rate", type=float, default=200, help="of records, where no part before finds one")
    flags.add_argument("--folder", type=Path, help="on the disk to be used; default: a temporary one")
    return flags


def _some(text: str, known: Sequence[str]) -> tuple[str, ...]:
    given = tuple(part for part in text.split(",") if part)
    if unknown := sorted(set(given) - set(known)):
        raise argparse.ArgumentTypeError(f"wanted some of {', '.join(known)}, saw {', '.join(unknown)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
