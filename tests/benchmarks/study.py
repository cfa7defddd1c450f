"""The long comparison: methods, pair rules and strong stand-ins on both shipped domains and several seeds.

    python tests/benchmarks/study.py --out docs/study.md [--seeds 0,1,2] [--domains freight,icd10] [--jobs 2]

Every figure comes from the step commands that a round runs, in a work folder that is kept: an interrupted study goes on
where it stopped. `--arm NAME` runs one arm alone. `--write-only` writes the table from what is there; `--page-only`
writes the page anew from its JSON and its notes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cowest_cli import jobs
from cowest_operator import api, promotion
from cowest_serving.contract import Pair, dump, parse
from cowest_training.contract import EvaluationReport, load_report

ROOT = Path(__file__).resolve().parents[2]
TASTES = ("standard", "sceptic", "terse")
ROUNDS = 2


@dataclass(frozen=True)
class Arm:
    taste: str = "standard"  # of the strong stand-in
    rule: str = "BestVersusWorst"  # how pairs are made
    rounds: int = ROUNDS
    method: str = "DPO"
    preference: Mapping[str, Any] = field(default_factory=dict)  # changes; None: what the method has of its own
    flipped: float = 0.0  # share of the pairs that stand the wrong way round


ARMS: Mapping[str, Arm] = {
    "best versus worst": Arm(),
    "paper's rule (sign of gain)": Arm(rule="SignOfGain"),
    "paper's rule, as many pairs": Arm(rule="SameNumber", rounds=1),
    "shuffled pairs": Arm(rule="Shuffled", rounds=1),
    "SFT on positives only": Arm(rule="Positives", rounds=1),
    "sceptic": Arm(taste="sceptic", rounds=1),
    "terse": Arm(taste="terse"),
    **{method: Arm(method=method, preference={"beta": None}) for method in ("IPO", "SimPO", "KTO", "GRPO")},
    "early stop": Arm(preference={"validationPercent": 10}),
    "10 % of labels flipped": Arm(rounds=1, flipped=0.1),
    "10 % of labels flipped, robust": Arm(rounds=1, flipped=0.1, preference={"labelFlipRate": "0.1"}),
    "20 % of labels flipped": Arm(rounds=1, flipped=0.2),
    "20 % of labels flipped, robust": Arm(rounds=1, flipped=0.2, preference={"labelFlipRate": "0.2"}),
}


def name_of(arm: str) -> str:
    """Of its files."""
    return arm.replace(" ", "-").translate(str.maketrans("", "", "()',%"))


class Study:
    """One domain and one seed."""

    def __init__(self, domain: str, seed: int, work: Path, arms: Sequence[str] = tuple(ARMS)) -> None:
        self.example = ROOT / "crds" / "examples" / domain
        self.domain, self.seed, self.arms = domain, seed, arms
        self.work = work / domain / f"seed{seed}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.endpoints: dict[str, str] = {}

    def run(self) -> None:
        data = self.work / "data"
        if not (data / "held_out.jsonl").exists():
            self._call([sys.executable, self.example / "make_data.py", "--out", data, "--seed", self.seed], "data")
        (self.work / "job.yaml").write_text((self.example / "job.yaml").read_text("utf-8"), "utf-8")
        with contextlib.ExitStack() as stack:
            for taste in TASTES:
                self.endpoints[taste] = stack.enter_context(self._strong(taste))
            self._all()

    def _all(self) -> None:
        base = self._job("standard", "BestVersusWorst")
        spec = base["spec"]
        sft = self._step("sft", "sft", base, data=spec["data"]["train"], model=spec["weak"]["model"])
        start = {taste: self._pair(self._job(taste, "BestVersusWorst"), sft) for taste in TASTES}
        for taste in TASTES:
            self._evaluate(f"sft-{taste}", self._job(taste, "BestVersusWorst"), start[taste], None)
        dataset = self._step("collect", "collect", base, **{"train": spec["data"]["train"],
                             "held-out": spec["data"]["heldOut"], "round": 1})  # fmt: skip
        for name in self.arms:
            self._arm(name_of(name), ARMS[name], start[ARMS[name].taste], dataset)

    def _arm(self, name: str, arm: Arm, start: Pair, dataset: str) -> None:
        pair, job = start, self.job_of(arm)
        for number in range(1, arm.rounds + 1):
            feedback = self._step(
                f"{arm.taste}-{job['spec']['feedback']['rule']}-{pair.weak_digest[7:15]}-feedback", "feedback", job,
                files={"pair": dump(pair)}, dataset=dataset, calls=self.work / "calls.sqlite", round=number,
            )  # fmt: skip
            tuned = self._tune(name, arm, number, job, pair, feedback)
            candidate = replace(pair, weak_digest=self._digest(tuned), weak_uri=tuned)
            self._evaluate(f"{name}-r{number}", job, candidate, pair)
            pair = candidate

    def _tune(self, name: str, arm: Arm, number: int, job: Mapping[str, Any], pair: Pair, feedback: str) -> str:
        if arm.rule == "Positives":
            return self._step(
                f"{name}-r{number}", "sft", job, data=self._positives(feedback, name), model=pair.weak_uri
            )
        if arm.rule == "Shuffled":
            feedback = self._shuffled(feedback, name)
        if arm.rule == "SameNumber":
            feedback = self._fewer(feedback, name)
        if arm.flipped:
            feedback = self._flipped(feedback, name, arm.flipped)
        return self._step(f"{name}-r{number}", "dpo", job, model=pair.weak_uri, feedback=feedback)

    def _positives(self, feedback: str, name: str) -> str:
        """The chosen drafts as explanations to learn."""
        rows = {row["id"]: row for row in _jsonl(self.work / "collect" / "dataset.jsonl")}
        path = self.work / f"{name}.jsonl"
        lines = []
        for pair in _jsonl(Path(feedback.removeprefix("file://")) / "pairs.jsonl"):
            row = rows[pair["query_id"]]
            kept = {k: row[k] for k in ("id", "query", "messages", "reference", "group") if row.get(k) is not None}
            if "query" in kept:
                kept.pop("messages", None)
            lines.append(json.dumps({**kept, "explanation": pair["chosen"]}))
        path.write_text("\n".join(dict.fromkeys(lines)) + "\n", "utf-8")
        return path.as_uri()

    def _shuffled(self, feedback: str, name: str) -> str:
        """The same pairs with a fair coin for which draft is preferred: a control that must not gain."""
        coin, pairs = random.Random(self.seed), []
        for pair in _jsonl(Path(feedback.removeprefix("file://")) / "pairs.jsonl"):
            if coin.random() < 0.5:
                pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
            pairs.append(pair)
        return self._with_pairs(feedback, name, "shuffled", pairs)

    def _flipped(self, feedback: str, name: str, share: float) -> str:
        """The same pairs with a share of them turned round, by the seed: an evaluator that errs."""
        pairs = list(_jsonl(Path(feedback.removeprefix("file://")) / "pairs.jsonl"))
        for pair in random.Random(self.seed).sample(pairs, round(share * len(pairs))):
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        return self._with_pairs(feedback, name, f"flipped-{share}", pairs)

    def _fewer(self, feedback: str, name: str) -> str:
        """As many of the pairs as best-versus-worst made of the same drafts, in their order: is it rule or number?"""
        source = Path(feedback.removeprefix("file://"))
        other = source.with_name(source.name.replace("SignOfGain", "BestVersusWorst"))
        pairs = list(_jsonl(source / "pairs.jsonl"))
        number = min(len(pairs), sum(1 for _ in _jsonl(other / "pairs.jsonl")))
        kept = sorted(random.Random(self.seed).sample(range(len(pairs)), number))
        return self._with_pairs(feedback, name, "fewer", [pairs[i] for i in kept])

    def _with_pairs(self, feedback: str, name: str, what: str, pairs: list[dict[str, Any]]) -> str:
        """A feedback step's output with other pairs."""
        source, target = Path(feedback.removeprefix("file://")), self.work / f"{name}-feedback"
        target.mkdir(exist_ok=True)
        (target / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
        manifest = json.loads((source / "manifest.json").read_text("utf-8"))
        manifest["digest"] = f"sha256:{what}-" + manifest["digest"].removeprefix("sha256:")
        (target / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        return target.as_uri()

    # ------------------------------------------------------------ steps
    def _job(self, taste: str, rule: str) -> dict[str, Any]:
        declared = jobs.load(self.work / "job.yaml")
        document = deepcopy(dict(declared.document))
        spec = document["spec"]
        spec["strong"]["endpoint"] = self.endpoints[taste]
        spec["strong"]["model"] += f"-{taste}"
        spec["feedback"]["rule"] = rule
        spec["training"]["seed"] = self.seed
        return document

    def job_of(self, arm: Arm) -> dict[str, Any]:
        job = self._job(arm.taste, "SignOfGain" if arm.rule in ("SignOfGain", "SameNumber") else "BestVersusWorst")
        training = job["spec"]["training"]
        training["method"] = arm.method
        changed = {**training["preference"], **arm.preference}
        training["preference"] = {key: value for key, value in changed.items() if value is not None}
        return job

    def _pair(self, job: Mapping[str, Any], model: str) -> Pair:
        parsed = api.parse_job(job)
        spec = parsed.spec
        digest = self._digest(model)
        return Pair(digest, model, parsed.prompts, spec.collaboration.draft, spec.strong.endpoint, spec.strong.model)

    def _digest(self, uri: str) -> str:
        manifest = json.loads((Path(uri.removeprefix("file://")) / "manifest.json").read_text("utf-8"))
        return str(manifest["digest"])

    def _evaluate(self, name: str, job: Mapping[str, Any], candidate: Pair, control: Pair | None) -> None:
        files = {"candidate": dump(candidate)} | ({"control": dump(control)} if control else {})
        flags: dict[str, Any] = {"held-out": job["spec"]["data"]["heldOut"], "calls": self.work / "calls.sqlite"}
        if control is None:
            flags["control"] = "solo"
        self._step(f"{name}-evaluate", "evaluate", job, files=files, **flags)

    def _step(
        self, name: str, module: str, job: Mapping[str, Any], files: Mapping[str, Any] | None = None, **flags: Any
    ) -> str:
        out = self.work / name
        jobs.write_json(self.work / "files" / f"{name}-job.json", job)
        command: list[Any] = [sys.executable, "-P", "-m", f"cowest_training.{module}", "--out", out.as_uri(),
                              "--job", self.work / "files" / f"{name}-job.json"]  # fmt: skip
        for flag, content in (files or {}).items():
            path = self.work / "files" / f"{name}-{flag}.json"
            jobs.write_json(path, content)
            command += [f"--{flag}", path]
        for flag, value in flags.items():
            command += [f"--{flag}", value]
        self._call(command, name)
        return out.as_uri()

    def _call(self, command: list[Any], name: str) -> None:
        begun = time.monotonic()
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w", encoding="utf-8") as out:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
            code = subprocess.run(
                [str(c) for c in command], stdout=out, stderr=out, env=environment, check=False
            ).returncode
        if code:
            raise SystemExit(f"{self.domain} seed {self.seed}: {name} ended with code {code}; see {log}")
        print(f"{self.domain} seed {self.seed}: {name} in {time.monotonic() - begun:.0f} s", flush=True)

    @contextlib.contextmanager
    def _strong(self, taste: str) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(self.example / "strong.py"), "--port", str(port), "--taste", taste]
        with (self.work / f"strong-{taste}.log").open("wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1))
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            child.terminate()
            child.wait(10)


def _wait(probe: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            probe()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


# ---------------------------------------------------------------- the table
def read_reports(work: Path) -> dict[str, EvaluationReport]:
    return {
        path.parent.name.removesuffix("-evaluate"): load_report(json.loads(path.read_text("utf-8")))
        for path in sorted(work.glob("*-evaluate/report.json"))
    }


def rows_of(domain: str, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """One row an arm: figures of its last round, and what the gate said to it."""
    reports = read_reports(work)
    if "sft-standard" not in reports:
        return
    sft = reports["sft-standard"]
    common = {"domain": domain, "seed": seed, "n": sft.against_control.n, "strong": sft.strong_version}
    for name, arm in (("solo", "solo"), ("weak alone (SFT)", "weak"), ("collaboration with SFT", "candidate")):
        seen = sft.arm(arm)
        yield {**common, "arm": name, "round": 0, "score": seen.score, "low": seen.low, "high": seen.high,
               "hurt_rate": seen.hurt_rate}  # fmt: skip
    gate = parse(api.Gate, json.loads((work / "files" / "sft-job.json").read_text("utf-8"))["spec"]["gate"])
    for arm, declared in ARMS.items():
        name = name_of(arm)
        base = reports.get(f"sft-{declared.taste}")
        for number in range(1, declared.rounds + 1):
            report = reports.get(f"{name}-r{number}")
            if report is None or base is None:
                continue
            served = parse(
                Pair, json.loads((work / "files" / f"{name}-r{number}-evaluate-control.json").read_text("utf-8"))
            )
            case = promotion.Offline(
                gate, 5.0, api.Status(stable=served, serving="Pair", looks=number - 1), report.candidate, report
            )
            refusal = promotion.first_refusal(case)
            seen = report.arm("candidate")
            yield {
                **common,
                "arm": arm,
                "round": number,
                "score": seen.score,
                "low": seen.low,
                "high": seen.high,
                "hurt_rate": seen.hurt_rate,
                "sft": base.arm("candidate").score,
                "sft_hurt_rate": base.arm("candidate").hurt_rate,
                "weak_alone": report.arm("weak").score,
                "difference": report.against_control.difference,
                "p_value": report.against_control.p_better,
                "gate": refusal.reason if refusal else "passed",
            }


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    out.write_text(page(rows, out), "utf-8")


def page(rows: list[dict[str, Any]], out: Path) -> str:
    """The table, and below it the notes that stand beside `out`."""
    text = [
        "# Study: methods, pair rules and strong stand-ins",
        "",
        "Written by `make study` (`tests/benchmarks/study.py`) from the reports of the step commands; the rows are in",
        "`study.json`. The strong models are stand-ins: programs behind the OpenAI protocol, frozen before anything",
        "was tuned; the study proves the loop, not the quality of any language model. `score` is the pair's score on",
        "held-out queries with its 95 % interval; `over SFT` is against collaboration with the SFT draft and the same",
        "strong model; `p` is one-sided against the pair before; `gate` is what the offline gate says.",
        "",
        "| domain | seed | arm | round | score | 95 % | over SFT | p | hurt rate | weak alone | gate |",
        "|---|--:|---|--:|--:|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        over = f"{100 * (row['score'] - row['sft']):+.1f}" if "sft" in row else ""
        p = f"{row['p_value']:.1g}" if "p_value" in row else ""
        weak = f"{100 * row['weak_alone']:.1f}" if "weak_alone" in row else ""
        text.append(
            f"| {row['domain']} | {row['seed']} | {row['arm']} | {row['round']} | {100 * row['score']:.1f} |"
            f" {100 * row['low']:.1f} to {100 * row['high']:.1f} | {over} | {p} | {100 * row['hurt_rate']:.1f} |"
            f" {weak} | {row.get('gate', '')} |"
        )
    notes = out.with_name("study-notes.md")
    if notes.exists():
        text += ["", notes.read_text("utf-8").rstrip()]
    return "\n".join(text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "study.md")
    parser.add_argument("--work", type=Path, default=ROOT / ".study")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--domains", default="freight,icd10")
    parser.add_argument(
        "--arm", action="append", choices=ARMS, metavar="ARM", help="only this one; may be said several times"
    )
    parser.add_argument("--jobs", type=int, default=2, help="domains and seeds at a time, one thread each")
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--page-only", action="store_true")
    options = parser.parse_args()
    if options.page_only:
        options.out.write_text(
            page(json.loads(options.out.with_suffix(".json").read_text("utf-8")), options.out), "utf-8"
        )
        return 0
    cases = [(d, int(s)) for s in options.seeds.split(",") for d in options.domains.split(",")]
    work = options.work.resolve()
    if not options.write_only:
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in [pool.submit(Study(d, s, work, options.arm or tuple(ARMS)).run) for d, s in cases]:
                done.result()
    rows = [row for d, s in sorted(cases) for row in rows_of(d, s, work / d / f"seed{s}")]
    write(options.out, rows)
    print(json.dumps({"rows": len(rows), "out": str(options.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
