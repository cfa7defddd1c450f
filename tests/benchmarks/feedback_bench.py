"""What a usable pair costs in strong calls beside the full protocol; how long 10,000 calls take under 429s and a crash.

    python -m tests.benchmarks.feedback_bench [--queries 600] [--calls 10000] [--peer-calls 600]

**Calls.** Recorded drafts of both shipped domains (`recorded/`: the first queries of round 1, greedy and eight sampled
at temperature 1, by the weak model after `sft`) are put where the feedback step looks for drafts, and the step runs as
a round runs it, against the domain's stand-in. Full protocol, nothing deduplicated: N answers, 1 solo and N + 1
pointwise judgements by the strong model, best against worst: 2N + 2 calls a query. Ours: `calls: Deciding`,
`judging: Listwise` and what the manifest defaults to. The stand-in judges as the domain's rule does; a judge that errs
is printed beside it. Agreement: share of the kept pairs that the full protocol puts in the same order.

**Makespan.** The feedback step makes 10,000 calls of a stand-in in a process of its own that takes 32 at once and
answers 429 beyond (`busy_strong.py`), told that it may have 48; half-way it is killed with SIGKILL and started again.
Ideal: the seconds of all answers / 32. distilabel does the same beside it, with fewer calls, in its own environment.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import importlib.util
import json
import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from cowest_cli.processes import free_port
from cowest_operator import manifest
from cowest_serving.collaborate import refine_messages
from cowest_serving.contract import Pair, Prompts, dump, parse
from cowest_training import feedback
from cowest_training.asking import Drafts, Recipe, drafts_folder
from cowest_training.contract import Evaluator, Row, StepSettings
from cowest_training.data import read_rows
from cowest_training.evaluator import RuleScorer, extracted
from tests.benchmarks.gateway import tools
from tests.benchmarks.gateway.processes import Unavailable
from tests.fakes import Call, ScriptedModel

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "recorded"
DOMAINS = ("freight", "icd10")
DRAWN = 9  # drafts that are recorded of a query: the greedy one and eight sampled
SIZES = (4, 8)
DISTILABEL = "1.5.3"
# What it needs, as old as itself (January 2025): with those of today it does not start.
OF_ITS_TIME = (
    "openai<2",
    "huggingface_hub<0.30",
    "datasets<4",
    "pandas<3",
    "numpy<2.3",
    "pydantic<2.11",
    "setuptools<80",
)
AT_ONCE, DECLARED, SECONDS = 32, 48, 0.8
STANDSTILL = 150  # seconds, with the start of a peer that imports much
DRAFTS = 4  # of a query of the makespan: with solo it makes five calls
NOBODY = "sha256:" + "0" * 64  # digest of a weak model that never has to draw


# ---------------------------------------------------------------- the domains
@dataclass(frozen=True)
class Domain:
    name: str
    spec: Mapping[str, Any]  # of its shipped manifest
    rows: Sequence[Row]
    drafts: Mapping[str, Sequence[str]]  # by query
    answers: Callable[[Sequence[Mapping[str, Any]]], str]  # its strong stand-in

    @property
    def prompts(self) -> Prompts:
        return Prompts(**self.spec["collaboration"]["prompts"])

    @property
    def evaluator(self) -> Evaluator:
        return parse(Evaluator, self.spec["feedback"]["evaluator"])


def domain(name: str, queries: int) -> Domain:
    example = ROOT / "crds" / "examples" / name
    spec = yaml.safe_load((example / "job.yaml").read_text("utf-8"))["spec"]
    with gzip.open(RECORDED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][:queries]
    rows = [Row(each["id"], each["query"], _user(each["query"]), each["reference"]) for each in lines]
    strong = _module(example / "strong.py")
    answers = strong.answer if name == "freight" else strong.TASTES["standard"]
    return Domain(name, spec, rows, {each["id"]: each["drafts"] for each in lines}, answers)


def _user(text: str) -> tuple[Mapping[str, Any], ...]:
    return ({"role": "user", "content": text},)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"strong_of_{path.parent.name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def record(name: str, folder: Path) -> None:
    """`folder`: data/train.jsonl of the domain and sft/, the weak model tuned on it."""
    from cowest_serving.model_files import model_digest

    spec = yaml.safe_load((ROOT / "crds" / "examples" / name / "job.yaml").read_text("utf-8"))["spec"]
    sft = folder / "sft"
    pair = Pair(model_digest(sft), sft.as_uri(), Prompts(**spec["collaboration"]["prompts"]), "Explanation", "", "")
    rows = feedback.choose_queries(read_rows(str(folder / "data" / "train.jsonl")), 600, 0, 1)
    with tempfile.TemporaryDirectory() as kept:
        drafts = Drafts(Recipe(pair, DRAWN, 1.0, spec["collaboration"]["draftMaxTokens"], "0/1"), rows, Path(kept))
        found = {id_: each for number in range(len(drafts.batches)) for id_, each in drafts.draw(number).items()}
    RECORDED.mkdir(exist_ok=True)
    with gzip.GzipFile(RECORDED / f"{name}.jsonl.gz", "wb", mtime=0) as file:
        for row in rows:
            texts = [draft.text for draft in found[row.id]]
            line = {"id": row.id, "query": row.query, "reference": row.reference, "drafts": texts}
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")


# ---------------------------------------------------------------- the strong model, which judges too
_REFERENCE = re.compile(r"<reference>\n(.*?)\n</reference>", re.DOTALL)
_ANSWERS = re.compile(r'<answer(?: number="(\d+)")?>\n(.*?)\n</answer>', re.DOTALL)


class Strong:
    """Answers as the domain's stand-in, and judges as the domain's rule; wrongly in `noise` of the verdicts."""

    def __init__(self, of: Domain, noise: float = 0.0) -> None:
        self._of, self._noise = of, noise
        self._scorer = RuleScorer(of.evaluator)
        self._rule = self._scorer._rule

    def __call__(self, call: Call) -> str:
        prompt = call.last
        if not prompt.startswith("You grade"):
            return self._of.answers(call.body["messages"])
        reference = _REFERENCE.search(prompt)
        assert reference
        verdicts = [(number, self.verdict(text, reference[1], "listwise")) for number, text in _ANSWERS.findall(prompt)]
        return "\n".join(f"{number}: {'ACCEPT' if score else 'REJECT'}" for number, score in verdicts)

    def verdict(self, part: str, reference: str, asked: str) -> float:
        """Of what `extract` takes from an answer. Each way of asking errs by itself."""
        right = self._rule(part, reference)
        drawn = hashlib.sha256(f"{asked}/{part}/{reference}".encode()).digest()
        return 1 - right if int.from_bytes(drawn[:4], "big") / 2**32 < self._noise else right


# ---------------------------------------------------------------- calls of a usable pair
@dataclass(frozen=True)
class Outcome:
    """Of one protocol on one domain."""

    calls: int
    pairs: Mapping[str, tuple[str, str]]  # query -> chosen, rejected draft
    scores: Mapping[str, Mapping[str, float]]  # query -> draft -> score, of the full protocol


def full(of: Domain, n: int, strong: Strong, judged: bool, asked: str = "pointwise") -> Outcome:
    """Each draft is asked and each answer judged, however many are equal."""
    pairs, scores = {}, {}
    margin = float(of.spec["feedback"].get("minMargin", 0.5))
    for row in of.rows:
        found = []
        for text in drafts_of(of, row, n):
            answer = of.answers(refine_messages(row.messages, text, of.prompts))
            part = extracted(of.evaluator.extract, answer)
            found.append(strong.verdict(part, row.reference, asked))
        texts = drafts_of(of, row, n)
        scores[row.id] = dict(zip(texts, found, strict=True))
        best, worst = found.index(max(found)), found.index(min(found))
        if found[best] - found[worst] >= margin:
            pairs[row.id] = texts[best], texts[worst]
    return Outcome(len(of.rows) * (2 * n + 2 if judged else n + 1), pairs, scores)


def drafts_of(of: Domain, row: Row, n: int) -> Sequence[str]:
    """All sampled at temperature 1: the greedy one is recorded, and left out here."""
    return of.drafts[row.id][1 : n + 1]


def ours(of: Domain, n: int, strong: Strong, judged: bool) -> Outcome:
    with ScriptedModel(strong).in_thread() as server, tempfile.TemporaryDirectory() as folder:
        wanted = {**of.spec["feedback"], "draftsPerQuery": n, "minPairs": 1, "maxQueries": len(of.rows)}
        if judged:
            judge = {"type": "Judge", "endpoint": server.url, "model": "strong"}
            wanted |= {"evaluator": {**judge, **_given("extract", of.evaluator.extract)}, "judging": "Listwise"}
            wanted |= SPARING
        step = Step(Path(folder), {**of.spec, "feedback": wanted}, server.url, of.prompts)
        step.give(of.rows, {row.id: drafts_of(of, row, n) for row in of.rows})
        step.run()
        paid = len(server.paid)
        return Outcome(paid, {each["query_id"]: (each["chosen"], each["rejected"]) for each in step.pairs()}, {})


SPARING: Mapping[str, Any] = {"calls": "Fewest"}


def _given(name: str, value: Any) -> dict[str, Any]:
    return {} if value is None else {name: value}


@dataclass(frozen=True)
class Compared:
    calls_full: float  # of a usable pair
    calls_ours: float
    kept: int
    usable: int  # by the full protocol
    agreeing: int
    pairs: int

    @property
    def ratio(self) -> float:
        return self.calls_ours / self.calls_full


def compare(parts: Sequence[tuple[Outcome, Outcome]]) -> Compared:
    """(full, ours) of each domain, together."""
    usable = kept = agreeing = pairs = 0
    for whole, some in parts:
        usable += len(whole.pairs)
        kept += len(whole.pairs.keys() & some.pairs.keys())
        pairs += len(some.pairs)
        agreeing += sum(whole.scores[id_][good] > whole.scores[id_][bad] for id_, (good, bad) in some.pairs.items())
    calls_full, calls_ours = (sum(each[i].calls for each in parts) for i in (0, 1))
    return Compared(calls_full / usable, calls_ours / pairs, kept, usable, agreeing, pairs)


class Step:
    """The feedback step over given drafts, in a folder of its own."""

    def __init__(self, folder: Path, spec: Mapping[str, Any], url: str, prompts: Prompts) -> None:
        self.folder, self.calls = folder, folder / "calls"
        strong = {**spec["strong"], "endpoint": url, "model": "strong"}
        job = {"apiVersion": "cowest.dev/v1alpha1", "kind": "CollaborationJob", "metadata": {"name": "bench"}}
        document = {**job, "spec": {**spec, "strong": strong}}
        whole = manifest.loads(yaml.safe_dump(document, sort_keys=False)).job["spec"]
        self.settings = parse(StepSettings, whole)
        self.pair = Pair(NOBODY, "file:///nowhere", prompts, "Explanation", url, "strong")
        (folder / "job.json").write_text(json.dumps(whole), "utf-8")
        (folder / "pair.json").write_text(json.dumps(dump(self.pair)), "utf-8")

    def give(self, rows: Sequence[Row], drafts: Mapping[str, Sequence[str]]) -> None:
        """Rows, and the drafts on disk as a run before would have left them."""
        lines = [{"id": row.id, "query": row.query, "reference": row.reference} for row in rows]
        data = self.folder / "rows.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        wanted, seed = self.settings.feedback, self.settings.training.seed
        recipe = Recipe(
            self.pair, wanted.drafts_per_query, wanted.temperature, self.settings.collaboration.draft_max_tokens,
            f"{seed}/1",
        )  # fmt: skip
        chosen = feedback.choose_queries(read_rows(str(data)), wanted.max_queries, seed, 1)
        batches = Drafts(recipe, chosen, drafts_folder(self.calls)).batches
        path = drafts_folder(self.calls) / f"{recipe.digest(chosen).removeprefix('sha256:')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for number, batch in enumerate(batches):
                found = [
                    [row.id, i, i, text, len(text.split()), "stop"]
                    for row in batch
                    for i, text in enumerate(drafts[row.id])
                ]
                file.write("\n" + json.dumps({"batch": number, "drafts": found, "refused": {}}))

    @property
    def flags(self) -> list[str]:
        named = {
            "job": self.folder / "job.json", "pair": self.folder / "pair.json", "dataset": self.folder / "rows.jsonl",
            "calls": self.calls, "round": 1, "out": self.folder / "out",
        }  # fmt: skip
        return [str(part) for name, value in named.items() for part in (f"--{name}", value)]

    def run(self) -> None:
        feedback.main(self.flags)

    def pairs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out" / "pairs.jsonl").read_text("utf-8").splitlines()]


# ---------------------------------------------------------------- makespan
@dataclass(frozen=True)
class Makespan:
    seconds: float  # from the first call to the last answer
    ideal: float
    repeated: int
    resent: int
    refused: int

    @property
    def over_ideal(self) -> float:
        return self.seconds / self.ideal


class Busy:
    """`busy_strong.py` as a process."""

    def __init__(self, log: Path) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, str(Path(__file__).with_name("busy_strong.py")), "--port", str(port)]
        with log.open("ab") as out:
            self.process = subprocess.Popen([*command, "--at-once", str(AT_ONCE), "--seconds", str(SECONDS)],
                                            stdout=out, stderr=out)  # fmt: skip
        for _ in range(200):
            with contextlib.suppress(OSError):
                self.stats()
                return
            time.sleep(0.05)
        raise RuntimeError(f"the stand-in did not start, see {log}")

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/stats", timeout=10) as response:
            return dict(json.load(response))

    def note_kill(self) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/killed", method="POST"), timeout=10).close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def makespan(command: Sequence[str], calls: int, log: Path, strong: Busy, *, killed: bool = True) -> Makespan:
    """A command that makes so many calls; killed once half of them are answered, and started again."""
    working = start(command, log)
    try:
        if killed:
            while strong.stats()["answered"] < calls / 2:
                if working.poll() is not None:
                    raise RuntimeError(f"it ended before it was killed: {_end_of(log)}")
                time.sleep(0.1)
            _kill(working)
            strong.note_kill()
            working = start(command, log)
        _wait(working, log, strong)
    finally:
        _kill(working)
    seen = strong.stats()
    return Makespan(
        seen["last"] - seen["first"], seen["work_seconds"] / AT_ONCE, seen["repeated"], seen["resent"], seen["refused"]
    )


def _wait(working: subprocess.Popen[bytes], log: Path, strong: Busy) -> None:
    """Until it ends; at most so long without an answer."""
    answered, since = 0, time.monotonic()
    while working.poll() is None:
        if (seen := strong.stats()["answered"]) > answered:
            answered, since = seen, time.monotonic()
        if time.monotonic() - since > STANDSTILL:
            raise RuntimeError(f"it stood still after {answered} answers: no call in {STANDSTILL} s")
        time.sleep(0.5)
    if working.returncode:
        raise RuntimeError(f"it ended with {working.returncode}: {_end_of(log)}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(log: Path) -> str:
    return " ".join(log.read_text("utf-8", errors="replace").split())[-400:]


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    paths = [ROOT / name for name in ("operator", "serving", "training", ".")]
    environment = {**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


def our_makespan(calls: int, folder: Path) -> Makespan:
    spec = yaml.safe_load((ROOT / "crds" / "examples" / "freight" / "job.yaml").read_text("utf-8"))["spec"]
    queries = calls // (DRAFTS + 1)
    log, strong = folder / "ours.log", Busy(folder / "strong.log")
    try:
        wanted = {**spec["feedback"], "draftsPerQuery": DRAFTS, "maxQueries": queries, "calls": "All", "minPairs": 1}
        declared = {**spec, "feedback": wanted, "strong": {**spec["strong"], "maxConcurrency": DECLARED}}
        step = Step(folder, declared, f"{strong.url}/v1", Prompts(**spec["collaboration"]["prompts"]))
        rows = [Row(f"q{n}", f"question {n}", _user(f"question {n}"), "1") for n in range(queries)]
        step.give(rows, {row.id: [f"draft {i} of {row.id}" for i in range(DRAFTS)] for row in rows})
        found = makespan([sys.executable, "-m", "cowest_training.feedback", *step.flags], calls, log, strong)
        with contextlib.closing(sqlite3.connect(step.calls)) as book:
            (kept,) = book.execute("SELECT count(*) FROM calls").fetchone()
        if kept != calls:
            raise RuntimeError(f"wanted {calls} calls in the book, saw {kept}")
        return found
    finally:
        strong.stop()


PEER = """
import sys
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

if __name__ == "__main__":
    url, calls, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rows = [{"instruction": f"question {n}"} for n in range(calls)]
    with Pipeline(name="bench", cache_dir=sys.argv[4]) as pipeline:
        model = OpenAILLM(model="strong", base_url=url, api_key="none", max_retries=6, timeout=60)
        LoadDataFromDicts(data=rows, batch_size=batch) >> TextGeneration(llm=model, input_batch_size=batch)
    pipeline.run(use_cache=True)
"""


def peer_makespan(calls: int, folder: Path, *, killed: bool) -> Makespan:
    """distilabel asks a batch at once and waits for all of it: no more at once than the endpoint takes."""
    python = tools.venv(f"distilabel-{DISTILABEL}", f"distilabel[openai]=={DISTILABEL}", *OF_ITS_TIME) / "python"
    name = "killed" if killed else "undisturbed"
    script, strong = folder / "peer.py", Busy(folder / f"strong-{name}.log")
    script.write_text(PEER, "utf-8")
    command = [str(python), str(script), f"{strong.url}/v1", str(calls), str(AT_ONCE), str(folder / name)]
    try:
        return makespan(command, calls, folder / f"peer-{name}.log", strong, killed=killed)
    finally:
        strong.stop()


# ---------------------------------------------------------------- what is printed
def say(*parts: object) -> None:
    print(*parts, flush=True)


def calls_table(domains: Sequence[Domain]) -> dict[int, Compared]:
    """The bars are of the judge that does not err; the others are printed."""
    bars: dict[int, Compared] = {}
    say("| evaluator | drafts | calls a usable pair: full | ours | ratio | agreement | usable pairs kept |")
    say("|---|---|---|---|---|---|---|")
    for noise, judged in ((0.0, True), (0.05, True), (0.0, False)):
        for n in SIZES:
            parts = []
            for each in domains:
                strong = Strong(each, noise)
                parts.append((full(each, n, strong, judged), ours(each, n, strong, judged)))
                tell(f"{_named(noise, judged)}, {each.name}", n, compare(parts[-1:]))
            seen = compare(parts)
            tell(f"**{_named(noise, judged)}, both**", n, seen)
            if noise:
                again = [(whole, full(each, n, Strong(each, noise), judged, "again"))
                         for (whole, _), each in zip(parts, domains, strict=True)]  # fmt: skip
                tell("the full protocol judged again, both", n, compare(again))
            if judged and not noise:
                bars[n] = seen
    return bars


def _named(noise: float, judged: bool) -> str:
    return (f"judge, errs in {100 * noise:.0f} %" if noise else "judge") if judged else "rule (N + 1)"


def tell(name: str, n: int, seen: Compared) -> None:
    say(f"| {name} | {n} | {seen.calls_full:.2f} | {seen.calls_ours:.2f} | {seen.ratio:.3f} |"
        f" {100 * seen.agreeing / max(1, seen.pairs):.1f} % of {seen.pairs} |"
        f" {100 * seen.kept / max(1, seen.usable):.1f} % of {seen.usable} |")  # fmt: skip


def makespans(calls: int, peer_calls: int, folder: Path) -> Makespan:
    say(f"\n{calls} calls of {SECONDS} s (log-normal), {AT_ONCE} taken at once, {DECLARED} declared, killed half-way:")
    say("| | makespan | ideal | over ideal | repeated paid calls | sent again | 429s |")
    say("|---|---|---|---|---|---|---|")
    measured = our_makespan(calls, folder)
    _tell_makespan("ours", measured)
    for killed in (False, True) if peer_calls else ():
        name = f"distilabel {DISTILABEL}, {peer_calls} calls, {'killed' if killed else 'not killed'}"
        try:
            _tell_makespan(name, peer_makespan(peer_calls, folder, killed=killed))
        except (Unavailable, RuntimeError) as error:
            say(f"| {name} | not measured: {error} | | | | | |")
    return measured


def _tell_makespan(name: str, seen: Makespan) -> None:
    say(f"| {name} | {seen.seconds:.1f} s | {seen.ideal:.1f} s | {seen.over_ideal:.3f} | {seen.repeated} |"
        f" {seen.resent} | {seen.refused} |")  # fmt: skip


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--queries", type=int, default=600, help="of each domain")
    flags.add_argument("--calls", type=int, default=10_000, help="of the makespan; 0: none")
    flags.add_argument("--peer-calls", type=int, default=600, help="of distilabel; 0: none")
    flags.add_argument("--record", nargs=2, metavar=("DOMAIN", "FOLDER"), help="draw the drafts anew and end")
    args = flags.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends too
    if args.record:
        record(args.record[0], Path(args.record[1]))
        return 0
    found = calls_table([domain(name, args.queries) for name in DOMAINS])
    result: dict[str, Any] = {f"calls_ratio_n{n}": round(seen.ratio, 4) for n, seen in found.items()}
    pairs, kept = sum(seen.pairs for seen in found.values()), sum(seen.kept for seen in found.values())
    result["label_agreement"] = round(sum(seen.agreeing for seen in found.values()) / pairs, 4)
    result["usable_kept"] = round(kept / sum(seen.usable for seen in found.values()), 4)
    if args.calls:
        with tempfile.TemporaryDirectory() as folder:
            measured = makespans(args.calls, args.peer_calls, Path(folder))
        result |= {"makespan_over_ideal": round(measured.over_ideal, 4), "repeated_paid_calls": measured.repeated}
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    say(f"\nCPU: {sum(each.ru_utime + each.ru_stime for each in used):.0f} s.")
    say(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
