"""The paper's tables, one command each, on any of its manifests (crds/examples/paper/) or on a manifest of yours.

    python -m tests.benchmarks.paper main   -f desk/medmcqa.yaml    # both models alone, the baselines, CoWest
    python -m tests.benchmarks.paper drafts -f desk/medmcqa.yaml    # three draft forms
    python -m tests.benchmarks.paper pairs  -f desk/medmcqa.yaml    # number of preference pairs
    python -m tests.benchmarks.paper models -f desk/medmcqa.yaml --weak hf://... --strong gpt-3.5-turbo

`--plan` says what it may cost at most and runs nothing. The work folder is kept: an interrupted study goes on where it
stopped, and no call whose answer was received is paid twice, over all four studies of one manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cowest_cli import engine, jobs, preflight
from cowest_serving.collaborate import DEFAULT_PROMPTS
from cowest_serving.contract import Pair, dump
from cowest_training.contract import Evaluator, load_report
from cowest_training.evaluator import exact_match, extracted, find_label
from cowest_training.statistics import macro_f1
from tests.benchmarks.study import Study, _jsonl

STEPS = Path(__file__).with_name("paper_steps.py")
FORMS = {"Explanation": "train.jsonl", "Knowledge": "train-knowledge.jsonl", "Answer": "train-answer.jsonl"}
PAIR_COUNTS = (250, 500, 1000, 2000)
OUR_NLL = 0.2  # the product's default, beside the paper's loss
ROUND = 1


@dataclass(frozen=True)
class Figures:
    """One line of a table."""

    arm: str
    n: int
    score: float
    low: float
    high: float
    second: float | None  # the paper's other metric: exact match beside token F1, macro-F1 beside accuracy
    hurt_rate: float
    strong_calls: int  # paid now: what an earlier arm had asked costs nothing
    pairs: int | None = None


class PaperStudy(Study):
    """One manifest in its work folder. Steps, pairs and evaluations are those of the long study."""

    def __init__(self, manifest: Path, work: Path) -> None:
        declared = jobs.load(manifest)
        self.declared = declared.document
        self.domain, self.seed = manifest.stem, declared.job.spec.training.seed
        self.evaluator = declared.job.spec.feedback.evaluator
        self.work = work / manifest.stem
        self.work.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------ the tables
    def main(self) -> Iterator[Figures]:
        """Each model alone, what others make of the two, and CoWest."""
        job = self.job()
        start, dataset = self.begin(job)
        yield self.figures("strong alone", "sft", "solo")
        yield self.figures("weak alone, SFT", "sft", "weak")
        yield self.figures("collaboration, SFT draft", "sft", "candidate")
        yield self.supericl()
        feedback = self.feedback("feedback", job, start, dataset)
        yield from self.positives(job, start, feedback)
        yield from self.rlwf(job, start, dataset)
        yield from self.aligned("CoWest, the paper's rule and loss", "cowest", job, start, feedback)
        ours = self.job(rule="BestVersusWorst", nll=OUR_NLL)
        feedback = self.feedback("feedback-ours", ours, start, dataset)
        yield from self.aligned("CoWest, best versus worst with NLL", "ours", ours, start, feedback)

    def drafts(self) -> Iterator[Figures]:
        """What the weak model writes: an explanation, knowledge, or the bare answer."""
        for form in FORMS:
            job, name = self.job(form=form), _name("", form)
            start, dataset = self.begin(job, form)
            yield self.figures(f"{form}, SFT draft", f"sft{name}", "candidate")
            feedback = self.feedback(f"feedback{name}", job, start, dataset)
            yield from self.aligned(f"{form}, CoWest", f"cowest{name}", job, start, feedback)

    def pairs(self) -> Iterator[Figures]:
        """The same model tuned on more and more of the same pairs."""
        job = self.job()
        start, dataset = self.begin(job)
        feedback = self.feedback("feedback", job, start, dataset)
        yield replace(self.figures("no pairs: SFT draft", "sft", "candidate"), pairs=0)
        available = self.count(feedback)
        for count in [*(n for n in PAIR_COUNTS if n < available), available]:
            name = f"cowest-{count}-pairs"
            yield from self.aligned(f"{count} pairs", name, job, start, self.subset(feedback, count, name))

    def models(self, weak: Sequence[str], strong: Sequence[str]) -> Iterator[Figures]:
        """Each weak model with each strong one behind the manifest's endpoint. The manifest's own are the first."""
        spec = self.declared["spec"]
        for weak_model in dict.fromkeys([spec["weak"]["model"], *weak]):
            for strong_model in dict.fromkeys([spec["strong"]["model"], *strong]):
                job = self.job(weak=weak_model, strong=strong_model)
                name = self.of_models(weak_model, strong_model)
                start, dataset = self.begin(job, name=name)
                both = f"{_short(weak_model)} x {strong_model}"
                yield self.figures(f"{both}: strong alone", f"sft{name}", "solo")
                yield self.figures(f"{both}: weak alone, SFT", f"sft{name}", "weak")
                yield self.figures(f"{both}: SFT draft", f"sft{name}", "candidate")
                feedback = self.feedback(f"feedback{name}", job, start, dataset)
                yield from self.aligned(f"{both}: CoWest", f"cowest{name}", job, start, feedback)

    # ------------------------------------------------------------ parts of a table
    def job(
        self, form: str = "Explanation", rule: str = "SignOfGain", nll: float = 0.0, weak: str = "", strong: str = ""
    ) -> dict[str, Any]:
        """The manifest with what this arm changes; its own prompts where it does not change the form."""
        document = deepcopy(dict(self.declared))
        spec = document["spec"]
        spec["data"]["train"] = self.train(form)
        if form != spec["collaboration"]["draft"]:
            asked = asdict(DEFAULT_PROMPTS[form])
            spec["collaboration"] |= {"draft": form, "prompts": {**asked, "solo": self.solo_prompt()}}
        spec["feedback"]["rule"] = rule
        spec["training"]["preference"]["nllWeight"] = str(nll)
        spec["weak"]["model"] = weak or spec["weak"]["model"]
        spec["strong"]["model"] = strong or spec["strong"]["model"]
        return document

    def solo_prompt(self) -> str:
        """The strong model alone is asked the same whatever the draft form is."""
        return str(self.declared["spec"]["collaboration"]["prompts"]["solo"])

    def train(self, form: str) -> str:
        """Rows whose explanations have that form, beside the manifest's own as `convert.py` writes them."""
        uri = str(self.declared["spec"]["data"]["train"])
        own = self.declared["spec"]["collaboration"]["draft"]
        if form == own:
            return uri
        if not uri.endswith(f"/{FORMS[own]}"):
            raise SystemExit(
                f"{uri}: wanted a file called {FORMS[own]}, with {FORMS[form]} beside it. Convert the data."
            )
        return uri.removesuffix(FORMS[own]) + FORMS[form]

    def of_models(self, weak: str, strong: str) -> str:
        """Part of a step's name; "" for the manifest's own models, whose steps the other tables share."""
        spec = self.declared["spec"]
        if (weak, strong) == (spec["weak"]["model"], spec["strong"]["model"]):
            return ""
        return "-" + hashlib.sha256(f"{weak}\n{strong}".encode()).hexdigest()[:10]

    def begin(self, job: Mapping[str, Any], form: str = "Explanation", name: str = "") -> tuple[Pair, str]:
        """The pair after supervised tuning, measured against the strong model alone; and the collected data set."""
        spec, name = job["spec"], _name(name, form)
        weak = hashlib.sha256(spec["weak"]["model"].encode()).hexdigest()[:10]
        tuned_name = f"weak-{weak}{_name('', form)}"  # one a weak model, whatever the strong one is
        sft = self._step(tuned_name, "sft", job, data=spec["data"]["train"], model=spec["weak"]["model"])
        start = self._pair(job, sft)
        self._evaluate(f"sft{name}", job, start, None)
        collected = self._step(f"collect{_name('', form)}", "collect", job, train=spec["data"]["train"],
                               **{"held-out": spec["data"]["heldOut"], "round": ROUND})  # fmt: skip
        return start, collected

    def feedback(self, name: str, job: Mapping[str, Any], start: Pair, dataset: str) -> str:
        return self._step(
            name, "feedback", job, files={"pair": dump(start)}, dataset=dataset, calls=self.calls, round=ROUND
        )

    def aligned(self, arm: str, name: str, job: Mapping[str, Any], start: Pair, pairs: str) -> Iterator[Figures]:
        """The start tuned by DPO and measured; no row where there is nothing to learn from."""
        if not (count := self.count(pairs)):
            print(f"{self.domain}: {arm}: no preference pair, so there is no row", flush=True)
            return
        tuned = self._step(name, "dpo", job, model=start.weak_uri, feedback=pairs)
        yield replace(self.judged(arm, name, job, start, tuned), pairs=count)

    def judged(self, arm: str, name: str, job: Mapping[str, Any], start: Pair, model: str) -> Figures:
        """A tuned weak model as a pair, measured beside the pair that it began as."""
        candidate = replace(start, weak_digest=self._digest(model), weak_uri=model)
        self._evaluate(name, job, candidate, start)
        return self.figures(arm, name, "candidate")

    def positives(self, job: Mapping[str, Any], start: Pair, feedback: str) -> Iterator[Figures]:
        """The preferred drafts learnt as they are."""
        if count := self.count(feedback):
            rows = self.positive_rows(feedback)
            tuned = self._step("positives", "sft", job, data=rows, model=start.weak_uri)
            yield replace(self.judged("SFT on positives", "positives", job, start, tuned), pairs=count)

    def positive_rows(self, feedback: str) -> str:
        """A row for each preferred draft: the paper's rule may make several pairs of one query."""
        rows = {row["id"]: row for row in _jsonl(self.work / "collect" / "dataset.jsonl")}
        taught = [
            {**rows[pair["query_id"]], "id": f"{pair['query_id']}-{number}", "explanation": pair["chosen"]}
            for number, pair in enumerate(_jsonl(_folder(feedback) / "pairs.jsonl"))
        ]
        path = self.work / "positives-rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in taught), "utf-8")
        return path.as_uri()

    def supericl(self) -> Figures:
        """Its small model gives bare answers, so it is tuned on those."""
        job = self.job(form="Answer")
        start, _ = self.begin(job, "Answer")
        out = self.work / "supericl"
        spec = job["spec"]
        if not (out / "figures.json").exists():
            self.own_step(
                "supericl", job, start, out, train=spec["data"]["train"], **{"held-out": spec["data"]["heldOut"]}
            )
        seen = json.loads((out / "figures.json").read_text("utf-8"))
        items = pq.read_table(out / "items.parquet").to_pydict()
        return Figures("SuperICL", second=self.second(items["candidate_answer"], items["reference"]), **seen)

    def rlwf(self, job: Mapping[str, Any], start: Pair, dataset: str) -> Iterator[Figures]:
        """A judge tuned on half of the queries ranks the drafts of the other half; no call of the strong model."""
        labelled, ranked = (self.work / name / "pairs.jsonl" for name in ("rlwf-labelled", "rlwf-ranked"))
        if not labelled.exists():
            self.own_step("self-scored", job, start, labelled.parent, dataset=dataset)
        if not self.count(labelled.as_uri()):
            print(f"{self.domain}: RLWF: drafts that score alike teach no judge, so there is no row", flush=True)
            return
        judge = self._step("rlwf-judge", "dpo", job, model=start.weak_uri, feedback=labelled.as_uri())
        if not ranked.exists():
            self.own_step("weak-ranked", job, start, ranked.parent, dataset=dataset, judge=judge)
        yield from self.aligned("RLWF", "rlwf", job, start, ranked.as_uri())

    def own_step(self, verb: str, job: Mapping[str, Any], pair: Pair, out: Path, **flags: Any) -> None:
        files = {"job": self.work / "files" / f"{verb}-job.json", "pair": self.work / "files" / f"{verb}-pair.json"}
        jobs.write_json(files["job"], job)
        jobs.write_json(files["pair"], dump(pair))
        given = {**files, "calls": self.calls, "out": out, **flags}
        self._call([sys.executable, STEPS, verb, *(part for k, v in given.items() for part in (f"--{k}", v))], verb)

    def subset(self, feedback: str, count: int, name: str) -> str:
        """`count` of the pairs, drawn so that a larger set holds the smaller ones."""
        lines = [line for line in (_folder(feedback) / "pairs.jsonl").read_text("utf-8").split("\n") if line]
        lines.sort(key=lambda line: hashlib.sha256(f"{self.seed}/{line}".encode()).digest())
        path = self.work / f"{name}.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines[:count]), "utf-8")
        return path.as_uri()

    @property
    def calls(self) -> Path:
        return self.work / "calls.sqlite"

    # ------------------------------------------------------------ figures
    def figures(self, arm: str, name: str, column: str) -> Figures:
        folder = self.work / f"{name}-evaluate"
        seen = load_report(json.loads((folder / "report.json").read_text("utf-8"))).arm(column)
        items = pq.read_table(folder / "items.parquet", columns=["reference", f"{column}_answer"]).to_pydict()
        second = self.second(items[f"{column}_answer"], items["reference"])
        return Figures(arm, seen.n, seen.score, seen.low, seen.high, second, seen.hurt_rate, seen.strong_calls)

    def second(self, answers: Sequence[str], references: Sequence[str]) -> float | None:
        return second_metric(self.evaluator, answers, references)

    def count(self, pairs: str) -> int:
        path = _folder(pairs)
        lines = (path if path.suffix == ".jsonl" else path / "pairs.jsonl").read_text("utf-8").split("\n")
        return sum(bool(line.strip()) for line in lines)


def second_metric(evaluator: Evaluator, answers: Sequence[str], references: Sequence[str]) -> float | None:
    """What the paper shows beside the evaluator's score; None where it shows nothing."""
    said = [extracted(evaluator.extract, answer or "") for answer in answers]
    if evaluator.type == "TokenF1":
        return sum(map(exact_match, said, references)) / max(1, len(said))
    if evaluator.type == "Choice":
        choices = evaluator.choices or ()
        gold = [find_label(reference, choices) or "" for reference in references]
        return macro_f1([find_label(answer, choices) for answer in said], gold, choices)
    return None


def _name(name: str, form: str) -> str:
    return name if form == "Explanation" else f"{name}-{form.lower()}"


def _short(uri: str) -> str:
    """The last part of a model's address, without the revision."""
    return re.split(r"[/@]", uri.rstrip("/").removeprefix("hf://").split("@")[0])[-1]


def _folder(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


# ---------------------------------------------------------------- what it may cost
def bound(table: str, queries: int, held_out: int, drafts: int, weak: int = 1, strong: int = 1) -> int:
    """Calls of the strong model at most, with an empty book: equal questions are asked once."""
    answers, solo = drafts * queries, queries
    match table:
        case "main":  # solo, SFT draft, SFT draft of bare answers; then five arms
            return 3 * held_out + answers + solo + 5 * held_out
        case "drafts":
            return held_out + solo + len(FORMS) * (answers + 2 * held_out)
        case "pairs":
            return 2 * held_out + answers + solo + (len(PAIR_COUNTS) + 1) * held_out
        case "models":
            return strong * (held_out + solo) + weak * strong * (answers + 2 * held_out)
        case _:
            raise ValueError(table)


def plan(manifest: Path, table: str, weak: int, strong: int) -> dict[str, Any]:
    """The bound, priced by what a call of this manifest costs on average in `cowest plan`."""
    declared = jobs.load(manifest)
    spec = declared.job.spec
    facts = preflight.facts_of(declared.document, str(manifest))
    parts = engine.estimates(declared.job, facts)
    queries = min(facts.rows, spec.feedback.max_queries)
    calls = bound(table, queries, facts.held_out, spec.feedback.drafts_per_query, weak, strong)
    money = (
        None if spec.strong.prices is None else calls * sum(p.money or 0 for p in parts) / sum(p.calls for p in parts)
    )
    return {"table": table, "calls": calls, "money": money, "currency": parts[0].currency, "queries": queries,
            "heldOut": facts.held_out}  # fmt: skip


# ---------------------------------------------------------------- the tables as text
def text_of(table: str, study: PaperStudy, rows: Sequence[Figures]) -> str:
    names = {"TokenF1": ("token F1", "EM"), "Choice": ("accuracy", "macro-F1")}
    first, second = names.get(study.evaluator.type, (study.evaluator.type, ""))
    lines = [
        f"# {study.domain}: {table}",
        "",
        f"| arm | n | {first} | 95 % | {second} | hurt rate | pairs | strong calls |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        other = "" if row.second is None else f"{100 * row.second:.2f}"
        pairs = "" if row.pairs is None else row.pairs
        lines.append(
            f"| {row.arm} | {row.n} | {100 * row.score:.2f} | {100 * row.low:.1f} to {100 * row.high:.1f} | {other} |"
            f" {100 * row.hurt_rate:.1f} | {pairs} | {row.strong_calls} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("main", "drafts", "pairs", "models"))
    parser.add_argument("-f", "--file", type=Path, required=True, help="the manifest")
    parser.add_argument("--work", type=Path, default=Path(".paper"), help="kept: the same command goes on from here")
    parser.add_argument("--weak", action="append", default=[], metavar="URI", help="models: one more weak model")
    parser.add_argument("--strong", action="append", default=[], metavar="NAME",
                        help="models: one more strong model, behind the manifest's endpoint")  # fmt: skip
    parser.add_argument("--plan", action="store_true", help="say what it may cost at most; run nothing")
    options = parser.parse_args(argv)
    if options.plan:
        print(json.dumps(plan(options.file, options.table, len(options.weak) + 1, len(options.strong) + 1)))
        return 0
    os.environ.update(jobs.keys_environment(jobs.load(options.file).job, None))
    study = PaperStudy(options.file, options.work.resolve())
    tables: Mapping[str, Callable[[], Iterator[Figures]]] = {
        "main": study.main,
        "drafts": study.drafts,
        "pairs": study.pairs,
        "models": lambda: study.models(options.weak, options.strong),
    }
    rows = list(tables[options.table]())
    out = study.work / options.table
    out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")
    out.with_suffix(".md").write_text(text_of(options.table, study, rows), "utf-8")
    print(json.dumps({"table": options.table, "rows": len(rows), "out": str(out.with_suffix(".md"))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
