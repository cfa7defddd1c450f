"""`cowest report`: one self-contained HTML page and one JSON file of what the loop did, from the artifacts alone."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cowest_cli import jobs
from cowest_cli.options import FileOrNone, HomeFolder, Output
from cowest_operator import api
from cowest_operator.promotion import MIN_SLICE, SOLO
from cowest_serving.contract import Prices, parse
from cowest_training.contract import ArmReport, EvaluationReport, StepError, load_report

EXAMPLES = 6


def report(
    file: FileOrNone = None,
    home: HomeFolder = None,
    html_: Annotated[Path, typer.Option("--html", help="Where the page goes.")] = Path("report.html"),
    json_: Annotated[Path | None, typer.Option("--json", help="Where the figures go as JSON.")] = None,
    domain: Annotated[str | None, typer.Option(help="A name for the domain (default: the job's name).")] = None,
    seed: Annotated[int | None, typer.Option(help="Shown beside the figures (default: training.seed).")] = None,
    seconds: Annotated[float | None, typer.Option(help="Wall time to show (default: from the events).")] = None,
    output: Output = "text",
) -> None:
    """Write what the loop did as a page that opens in any browser, and as JSON."""
    place = jobs.home_of(file, home)
    story = read_story(place)
    figures = build_figures(story, domain, seed, seconds)
    html_.parent.mkdir(parents=True, exist_ok=True)
    html_.write_text(build_page(story, figures), "utf-8")
    typer.echo(f"{html_}", err=True)
    if json_ is not None:
        jobs.write_json(json_, figures)
        typer.echo(f"{json_}", err=True)
    if output == "json":
        typer.echo(json.dumps(figures))


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class Story:
    """All that the page is made of."""

    document: Mapping[str, Any]
    status: api.Status
    evaluations: Mapping[int, EvaluationReport]  # by round
    items: Mapping[int, Sequence[Mapping[str, Any]]]  # of the same
    feedback: Mapping[int, Mapping[str, Any]]  # metrics of the feedback steps
    spent: Mapping[str, Any]
    live: Mapping[str, Any]  # as `spent`, of live answers
    events: Sequence[Mapping[str, Any]]


def read_story(place: jobs.Home) -> Story:
    document = jobs.read_json(place.job)
    if document is None:
        raise StepError(f"{place.root}: wanted the state of a job, saw none. Run it first with `cowest run -f ...`.")
    evaluations, items, feedback = {}, {}, {}
    for folder in sorted((place.store / "runs").glob("r[0-9]*")):
        number = int(folder.name.removeprefix("r"))
        if data := jobs.read_json(folder / "evaluate" / "report.json"):
            evaluations[number] = load_report(data)
            items[number] = _rows(folder / "evaluate" / "items.parquet")
        if manifest := jobs.read_json(folder / "feedback" / "manifest.json"):
            feedback[number] = manifest["metrics"]
    events = jobs.read_events(place)
    return Story(
        document, jobs.read_status(place), evaluations, items, feedback, _spent(place), _live(place, document), events
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist() if path.exists() else []
    return rows


def _spent(place: jobs.Home) -> Mapping[str, Any]:
    """Of the steps, from the book of paid calls."""
    from cowest_training.paid_calls import read_spent

    return asdict(read_spent(place.calls))


def _live(place: jobs.Home, document: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of live answers: from the traces that retention has left. A book counts them only where a day is limited."""
    import pyarrow.compute as pc

    from cowest_serving.traces import read_columns
    from cowest_training.paid_calls import Spent

    table = read_columns(place.store.as_uri(), ("answer_ms", "strong_input_tokens", "strong_output_tokens"))
    asked = table.filter(pc.is_valid(table["answer_ms"]))  # others never reached the strong model
    given, made = (pc.sum(asked[f"strong_{kind}_tokens"]).as_py() or 0 for kind in ("input", "output"))
    prices = _prices(document)
    return asdict(Spent(asked.num_rows, given, made, prices.of(given, made) if prices else 0.0))


def _prices(document: Mapping[str, Any]) -> Prices | None:
    given = document["spec"]["strong"].get("prices")
    return parse(Prices, given, "spec.strong.prices") if given else None


# ---------------------------------------------------------------- figures
def first_evaluation(story: Story) -> tuple[int, EvaluationReport] | None:
    return min(story.evaluations.items(), default=None)


def final_evaluation(story: Story) -> tuple[int, EvaluationReport] | None:
    """Of the pair that is stable now, as the gate saw it."""
    number = story.status.stable_round
    return (number, story.evaluations[number]) if number is not None and number in story.evaluations else None


def build_figures(story: Story, domain: str | None, seed: int | None, seconds: float | None) -> dict[str, Any]:
    """report.json: fractions with 95 % intervals, decisions, and the digest of what is stable."""
    first, final = first_evaluation(story), final_evaluation(story)
    arms: dict[str, Any] = {}
    if first:
        report = first[1]
        arms = {
            "solo": _arm(report.arm("solo")),
            "weak": _arm(report.arm("weak")),
            "sft": _arm(report.arm("candidate")),
        }
    if final:
        arms["final"] = _arm(final[1].arm("candidate"))
        arms["weak_final"] = _arm(final[1].arm("weak"))
    times = [event["time"] for event in story.events]
    elapsed = seconds if seconds is not None else (max(times) - min(times) if times else 0.0)
    stable = story.status.stable
    return {
        "domain": domain or story.document["metadata"]["name"],
        "seed": seed if seed is not None else story.document["spec"]["training"]["seed"],
        "seconds": round(elapsed),
        "arms": arms,
        "rounds": [
            {
                "number": outcome.number,
                "origin": outcome.origin,
                "decision": outcome.decision,
                "reason": outcome.reason,
                "message": outcome.message,
                "pairs": outcome.pairs,
                "p_value": outcome.p_value,
                "difference": outcome.difference,
                "live_difference": outcome.live_difference,
                "live_answers": outcome.live_answers,
            }
            for outcome in story.status.rounds
        ],
        "slices": [
            {"round": number, "control": seen.control, "groups": [asdict(part) for part in seen.slices]}
            for number, seen in sorted(story.evaluations.items())
            if seen.slices
        ],
        **({"calibration": beside} if (beside := calibrations(story)) else {}),
        "stable": {"digest": stable.digest if stable else None, "round": story.status.stable_round},
        "strong": {"model": final[1].strong_model, "version": final[1].strong_version} if final else {},
        "spent": dict(story.spent),
        "live": dict(story.live),
    }


def calibrations(story: Story) -> list[dict[str, Any]]:
    """How far the evaluator of each round agreed with people, where their labels were declared."""
    seen = ((number, report.calibration) for number, report in sorted(story.evaluations.items()))
    return [{"round": number, **asdict(found)} for number, found in seen if found]


def _arm(arm: ArmReport) -> dict[str, Any]:
    return {
        "accuracy": arm.score,
        "low": arm.low,
        "high": arm.high,
        "n": arm.n,
        "hurt_rate": arm.hurt_rate,
        **({} if arm.macro_f1 is None else {"macro_f1": arm.macro_f1}),
        "strong_calls": 0 if arm.name == "weak" else arm.n,  # that the arm's answers take
        "paid_calls": arm.strong_calls,  # of these, not answered from the book of paid calls
    }


# ---------------------------------------------------------------- the page
_STANDINGS: Mapping[str | None, str] = {
    None: "last promoted",
    "Passed": "last promoted",
    "Chosen": "promoted by a person",
    "NotPassed": "not promoted",
}


def arm_names(story: Story) -> dict[str, str]:
    """What each arm that is shown is called; the stable pair has no row of its own while it is the first one."""
    first, final, standing = first_evaluation(story), final_evaluation(story), _STANDINGS[story.status.standing]
    names = {"solo": "strong model alone", "weak": "first weak model alone", "sft": "pair, first weak model"}
    if first and final and first[0] == final[0]:
        return {**names, "sft": f"{names['sft']}, {standing}"}
    return {**names, "final": f"pair, {standing}", "weak_final": f"weak model of the pair {standing}, alone"}


def other_scales(story: Story) -> Iterator[str]:
    """Said where scores that stand side by side were not measured alike."""
    rounds = sorted(story.evaluations)
    for name, what in (("evaluator_digest", "another evaluator"), ("held_out_digest", "other held-out queries")):
        last = getattr(story.evaluations[rounds[-1]], name) if rounds else ""
        if before := [str(n) for n in rounds if getattr(story.evaluations[n], name) != last]:
            which = "round" if len(before) == 1 else "rounds"
            yield (
                f"Scores of {which} {', '.join(before)} were measured with {what} than those of round {rounds[-1]}:"
                " they stand on different scales, and a difference between them is neither a gain nor a loss."
            )


_STYLE = """
:root{--ink:#1b1f24;--soft:#5b6570;--line:#d7dce1;--good:#1a7f4b;--bad:#b3261e;--hold:#8a6100;--bar:#3f6fb5;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--soft:#9aa5b1;--line:#39424c;--good:#5cc98d;--bad:#ff8a80;
--hold:#e0b04a;--bar:#7ba6e6;--page:#14181d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:64rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}
h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
td.n{white-space:nowrap}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.Promoted{color:var(--good)}.RolledBack{color:var(--bad)}.Refused{color:var(--hold)}
p.soft,td.soft{color:var(--soft)}.wide{overflow-x:auto}
pre{white-space:pre-wrap;margin:0;font:13px/1.45 ui-monospace,monospace}
svg text{fill:var(--ink);font:13px system-ui,sans-serif}
"""


def _text(value: str) -> str:
    """As text of the page: what a model wrote is shown, and is never markup or a control character."""
    return html.escape("".join(c if c.isprintable() or c in "\n\t" else " " for c in value))


def build_page(story: Story, figures: Mapping[str, Any]) -> str:
    name = _text(str(figures["domain"]))
    version = figures["strong"].get("version") or "none given"
    names = arm_names(story)
    arms = {names[arm]: seen for arm, seen in figures["arms"].items() if arm in names}
    parts = [
        f"<h1>{name}: what the loop did</h1>",
        f'<p class="soft">seed {figures["seed"]}, {figures["seconds"]} s; strong model'
        f" {_text(str(figures['strong'].get('model')))}, version {_text(str(version))}</p>",
        f"<p>{_text(_summary(story))}</p>",
        "<h2>Arms on the held-out queries</h2>",
        *(f"<p>{_text(sentence)}</p>" for sentence in other_scales(story)),
        _bars(arms),
        _arms_table(arms),
        *_calibrations(figures.get("calibration", ())),
        *_slices(story),
        "<h2>Rounds</h2>",
        _rounds_table(story.status.rounds),
        "<h2>What changed in the drafts</h2>",
        *_examples(story),
        "<h2>Calls and money</h2>",
        _spent_table(story),
        *_feedback_table(story),
        "<h2>Events</h2>",
        _events(story.events),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}: CoWest report</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _summary(story: Story) -> str:
    return " ".join(f"{c.type}: {c.message}" for c in story.status.conditions)


def _bars(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """One bar an arm with its interval; the scale is 0 to 100 %."""
    left, width, step = 16 + 7 * max(map(len, arms), default=0), 490, 30  # a letter of 13 px is 7 wide at most
    rows = []
    for place, (name, arm) in enumerate(arms.items()):
        y = 8 + place * step
        x = [left + width * float(arm[key]) for key in ("accuracy", "low", "high")]
        rows.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{_text(name)}</text>'
            f'<rect x="{left}" y="{y}" width="{x[0] - left:.1f}" height="18" rx="2" fill="var(--bar)"/>'
            f'<path d="M{x[1]:.1f} {y + 9}H{x[2]:.1f}M{x[1]:.1f} {y + 4}v10M{x[2]:.1f} {y + 4}v10"'
            ' stroke="var(--ink)"/>'
            f'<text x="{x[2] + 8:.1f}" y="{y + 14}">{100 * arm["accuracy"]:.1f} %</text>'
        )
    size = f"{left + width + 80} {12 + step * len(arms)}"
    return f'<svg viewBox="0 0 {size}" role="img" aria-label="Accuracy of the arms">{"".join(rows)}</svg>'


def _table(head: Sequence[str], rows: Iterator[Sequence[str]], numbers: frozenset[int] = frozenset()) -> str:
    def cell(tag: str, place: int, text: str) -> str:
        return f"<{tag}{' class=n' if place in numbers else ''}>{text}</{tag}>"

    top = "".join(cell("th", i, _text(h)) for i, h in enumerate(head))
    body = "".join("<tr>" + "".join(cell("td", i, t) for i, t in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _arms_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    labelled = any("macro_f1" in arm for arm in arms.values())
    rows = (
        (
            _text(name),
            f"{100 * arm['accuracy']:.1f} %",
            f"{100 * arm['low']:.1f} to {100 * arm['high']:.1f} %",
            *([f"{100 * arm['macro_f1']:.1f} %" if "macro_f1" in arm else ""] if labelled else ()),
            str(arm["n"]),
            f"{100 * arm['hurt_rate']:.1f} %",
            str(arm["strong_calls"]),
            str(arm["paid_calls"]),
        )
        for name, arm in arms.items()
    )
    macro = ("macro-F1",) if labelled else ()
    head = ("arm", "score", "95 % interval", *macro, "queries", "hurt rate", "strong calls", "of these paid now")
    return _table(head, rows, frozenset(range(1, len(head))))


def _calibrations(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not found:
        return
    yield "<h2>The evaluator beside people</h2>"
    yield (
        "<p>Kappa is agreement beyond chance: 0 is chance, 1 is always. Opposite: the one calls right, or better, what"
        " the other calls wrong, or worse. Picked labels, of answers shown for a disagreement, are no sample.</p>"
    )
    rows = (
        (
            str(seen["round"]),
            str(seen["labels"]),
            f"{100 * seen['agreement']:.1f} %",
            f"{100 * seen['low']:.1f} to {100 * seen['high']:.1f} %",
            f"{seen['kappa']:.2f}",
            f"{seen['kappa_low']:.2f} to {seen['kappa_high']:.2f}",
            str(seen["opposite"]),
            f"{100 * seen['picked_agreement']:.1f} % of {seen['picked']}" if seen["picked"] else "",
        )
        for seen in found
    )
    head = (
        "round",
        "labels",
        "agreement",
        "95 % interval",
        "kappa",
        "95 % interval",
        "opposite",
        "agreement on picked",
    )
    yield _table(head, rows, frozenset(range(len(head))))


def _slices(story: Story) -> Iterator[str]:
    """The groups of the held-out rows, of the stable pair's evaluation and of a newer one."""
    last = max(story.evaluations, default=None)
    shown = [n for n in dict.fromkeys((story.status.stable_round, last)) if n in story.evaluations]
    tables = [(n, seen) for n in shown if n is not None and (seen := story.evaluations[n]).slices]
    if not tables:
        return
    yield "<h2>Slices of the held-out queries</h2>"
    yield f"<p>One row for each <code>group</code>; those of fewer than {MIN_SLICE} queries decide nothing.</p>"
    for number, seen in tables:
        decisions = [o.decision for o in story.status.rounds if o.number == number]
        control = "the strong model alone" if seen.control == SOLO else "the pair that was served then"
        what = decisions[-1] if decisions else "not decided yet"
        yield f"<p>Round {number}, {what}: candidate against {control}.</p>"
        rows = (
            (
                _text(part.group),
                str(part.n),
                f"{100 * part.difference:+.1f}",
                f"{100 * part.low:+.1f} to {100 * part.high:+.1f}",
            )
            for part in seen.slices
        )
        yield _table(("group", "queries", "gain, points", "95 % interval"), rows, frozenset({1, 2, 3}))


def _rounds_table(outcomes: Sequence[api.Outcome]) -> str:
    rows = (
        (
            str(o.number),
            _text(o.origin + (f" by {o.proposed_by}" if o.proposed_by else "")),
            f'<b class="{o.decision}">{o.decision}</b>',
            "" if o.difference is None else f"{100 * o.difference:+.1f}",
            "" if o.p_value is None else f"{o.p_value:.1g}",
            "" if o.live_difference is None else f"{100 * o.live_difference:+.1f} ({o.live_answers})",
            "" if o.pairs is None else str(o.pairs),
            f"{_text(o.reason)}: {_text(o.message)}",
        )
        for o in outcomes
    )
    head = ("round", "origin", "decision", "gain, points", "p", "live gain (answers)", "pairs", "why")
    return _table(head, rows, frozenset({0, 3, 4, 5, 6}))


def _examples(story: Story) -> Iterator[str]:
    """Queries whose answer changed between the first pair and the last promoted one, gains and losses by turns."""
    first, final = first_evaluation(story), final_evaluation(story)
    if not first or not final or first[0] == final[0]:
        yield "<p>No candidate was promoted over the first pair.</p>"
        yield from _examples_of_last(story)
        return
    before = {row["id"]: row for row in story.items[first[0]]}
    both = [(before[row["id"]], row) for row in story.items[final[0]] if row["id"] in before]
    lengths = [sum(len(pair[i]["candidate_draft"] or "") for pair in both) / max(1, len(both)) for i in (0, 1)]
    changed = sum(a["candidate_draft"] != b["candidate_draft"] for a, b in both)
    yield (
        f"<p>{changed} of {len(both)} drafts changed; their mean length went from {lengths[0]:.0f} to"
        f" {lengths[1]:.0f} characters.</p>"
    )
    gained = [p for p in both if p[1]["candidate_score"] > p[0]["candidate_score"]]
    lost = [p for p in both if p[1]["candidate_score"] < p[0]["candidate_score"]]
    shown = [*gained[: EXAMPLES - 2], *lost[:2]]
    yield "<p>Gain: score of the answer minus score of the strong model alone.</p>"
    head = ("query", "reference", "draft before", "draft after", "strong alone", "answer before", "answer after",
            "gain before", "gain after")  # fmt: skip
    yield _table(head, (_example(a, b) for a, b in shown), frozenset({7, 8}))


def _examples_of_last(story: Story) -> Iterator[str]:
    """Queries of the newest evaluation, with what drafts did to the strong model's answers: gains, losses, neither."""
    number = max(story.evaluations, default=None)
    rows = story.items[number] if number is not None else ()
    if not rows:
        return
    gains = [float(row["candidate_score"]) - float(row["solo_score"]) for row in rows]
    other = sum(row["candidate_answer"] != row["solo_answer"] for row in rows)
    yield (
        f"<p>Round {number}: with the draft the strong model gave another answer than alone on {other} of {len(rows)}"
        f" queries, and one of another score on {sum(map(bool, gains))}.</p>"
    )
    kinds = ([i for i, gain in enumerate(gains) if (gain > 0) - (gain < 0) == sign] for sign in (1, -1, 0))
    shown = [i for kind in kinds for i in kind[: EXAMPLES // 3]]
    head = ("query", "reference", "draft", "strong alone", "answer", "gain")
    names = ("reference", "candidate_draft", "solo_answer", "candidate_answer")
    cells = (_cells(_asked(rows[i]), *(rows[i][name] for name in names)) for i in shown)
    yield _table(head, ((*texts, f"{gains[i]:+.2g}") for texts, i in zip(cells, shown, strict=True)), frozenset({5}))


def _asked(item: Mapping[str, Any]) -> str:
    """The whole chat, where there is more than its last message; evaluations of older versions have that alone."""
    return str(item.get("conversation") or item["query"])


def _cells(*texts: Any) -> Sequence[str]:
    return [f"<pre>{_text(str(text or ''))}</pre>" for text in texts]


def _example(before: Mapping[str, Any], after: Mapping[str, Any]) -> Sequence[str]:
    texts = (_asked(after), after["reference"], before["candidate_draft"], after["candidate_draft"],
             after["solo_answer"], before["candidate_answer"], after["candidate_answer"])  # fmt: skip
    gains = (float(row["candidate_score"]) - float(row["solo_score"]) for row in (before, after))
    return (*_cells(*texts), *(f"{gain:+.2g}" for gain in gains))


_PAID = ("strong_calls", "input_tokens", "output_tokens", "money")  # of a step's metrics: shown as calls and money

_WORDS: Mapping[str, str] = {
    "queries": "queries that were asked",
    "skipped": "queries that were skipped",
    "drafts": "drafts of the weak model",
    "distinct_drafts": "of these, different from each other",
    "explored": "queries of which all was asked, whatever it took; the scores below are of these",
    "asked_drafts": "of those, shown to the strong model",
    "pairs": "preference pairs",
    "queries_with_pairs": "queries that gave pairs",
    "equal_drafts": "queries that drew the same draft each time",
    "ties": "queries whose answers score alike (those included)",
    "below_margin": "queries whose answers differ by less than feedback.minMargin",
    "answer_score": "mean score of the answers with a draft, 0 to 1",
    "greedy_score": "of these, with the likeliest draft",
    "solo_score": "mean score of the strong model alone",
    "mean_gain": "mean gain by a draft",
    "hurt_rate": "share of drafts that hurt",
    "best_score": "best score of all answers",
    "draft_tokens": "mean tokens of a draft",
    "cut_drafts": "drafts cut off at spec.collaboration.draftMaxTokens",
    "strong_calls_cached": "answers that were paid before and cost nothing",
    "judge_calls": "calls of the judge",
    "cut_answers": "answers cut off at spec.strong.maxTokens",
    "filtered_answers": "answers withheld by the content filter",
    "empty_answers": "answers without text",
}


def _spent_table(story: Story) -> str:
    """What the steps paid, of it each round's feedback, and what live answers cost beside them."""
    prices = _prices(story.document)
    paid = {f"of these, feedback of round {n}": [m.get(name) for name in _PAID] for n, m in story.feedback.items()}
    shown = {"all steps": [*story.spent.values()], **paid, "live answers": [*story.live.values()]}

    def cells(calls: Any, given: Any, made: Any, money: Any) -> Iterator[str]:
        yield from ("" if seen is None else str(seen) for seen in (calls, given, made))
        if prices:
            yield "" if money is None else _text(f"{money:.2f} {prices.currency}")

    rows = ((name, *cells(*figures)) for name, figures in shown.items())
    head = ("", "calls of the strong model", "input tokens", "output tokens", *(("money",) if prices else ()))
    note = (
        "<p>Live answers: those in the traces that are still kept (traces.retentionDays), by strong.prices and by the"
        " tokens that the endpoint counted. Only the limits of a day in strong.budget hold for them.</p>"
    )
    return _table(head, rows, frozenset(range(1, len(head)))) + note


def _feedback_table(story: Story) -> Iterator[str]:
    """What each round's feedback saw, in words."""
    columns = [dict(_flat(metrics)) for metrics in story.feedback.values()]
    seen = dict.fromkeys(name for column in columns for name in column if name not in _PAID)
    names = [*(name for name in _WORDS if name in seen), *(name for name in seen if name not in _WORDS)]
    if not names:
        return
    yield "<h2>What feedback saw</h2>"
    rows = (
        (_text(_WORDS.get(name, name.replace("_", " "))), *(_text(c.get(name, "")) for c in columns)) for name in names
    )
    head = ("", *(f"round {number}" for number in story.feedback))
    yield _table(head, rows, frozenset(range(1, len(head))))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The figures among some metrics."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key} ")
        elif isinstance(item, int | float):
            yield f"{prefix}{key}", f"{item:.4g}" if isinstance(item, float) else str(item)


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    begun = events[0]["time"] if events else 0.0
    rows = ((_clock(event["time"]), f"{event['time'] - begun:.0f} s", _text(str(event["message"]))) for event in events)
    return _table(("time, UTC", "after", "what"), rows, frozenset({1}))


def _clock(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S")
