"""`cowest run` and `cowest plan`: the loop on one machine, and what it will cost before anything is spent."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cowest_cli import engine as engines
from cowest_cli import jobs, preflight, probes
from cowest_cli.following import Following
from cowest_cli.options import File, HomeFolder, Output
from cowest_cli.preflight import facts_of
from cowest_cli.processes import port_is_free
from cowest_cli.view import View, printable, rounds_table
from cowest_operator import api, manifest, rounds
from cowest_operator.power import Power, sentences
from cowest_operator.promotion import looks_before
from cowest_serving.contract import UNKNOWN_OUTPUT_TOKENS
from cowest_serving.cores import THREADS, Cores, look
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_INTERRUPTED, MANIFEST, StepError

ASK_ABOVE_CALLS = 20_000
ASK_ABOVE_MONEY = 20.0  # in the currency of strong.prices


def run(
    file: File,
    home: HomeFolder = None,
    secrets: Annotated[Path | None, typer.Option(help="Folder of secrets: <name>/<key> files.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the gateway instead of gateway.port.")
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Go on serving when no round is left, until Ctrl-C.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask, whatever the plan says it may cost.")] = False,
    output: Output = "text",
) -> None:
    """Run the whole loop of one job on this machine. Interrupt it at any point; the same command goes on.

    Before the first start it asks whether to go on where `cowest plan` bounds the whole job above 20,000 calls, or
    above 20.00 in the currency of strong.prices; without a terminal it wants --yes then. Below that it begins at once.
    The strong model and a judge are asked for one token first, a scorer over HTTP for one score.

    An edit of the manifest is taken up while it runs; a wrong one is said, and the manifest before it holds. A step
    that fails for good ends the run; with --serve the gateway answers on and the step is tried again, after 30 seconds
    at first and ten minutes at most, after an edit, or when a person says `cowest resume`.

    Threads are shared out among the weak models' servers and the steps from the cores that are allowed (affinity, a
    container's quota) and not busy when the job is first run, at least half of those allowed. The number is kept with
    the job's state, so that a rerun draws the same drafts. OMP_NUM_THREADS, where it is set, holds for each process.
    """
    try:
        _run(Wanted(file, home, secrets, port, serve, yes), output)
    except typer.Exit:
        raise
    except Exception as error:
        from cowest_cli.main import exit_code, message

        _as_json(output, error=message(error), code=exit_code(error))
        raise


def _as_json(output: str, **said: Any) -> None:
    """What a program reads of a run, however it ends: one line."""
    if output == "json":
        typer.echo(json.dumps(said))


@dataclass(frozen=True)
class Wanted:
    file: Path
    home: Path | None
    secrets: Path | None
    port: int | None
    serve: bool
    yes: bool


def _run(wanted: Wanted, output: str) -> None:
    file, secrets, port = wanted.file, wanted.secrets, wanted.port
    following = Following(file, lambda: _another_order(file, place, secrets, port))
    jobs.load(file)  # what is wrong with the manifest is said first
    place = jobs.home_of(file, wanted.home)
    console = Console(stderr=True, highlight=False, markup=False)
    with jobs.locked(place):
        order = engines.read_order(file, secrets, place.looked_at)
        _is_its_state(order, place)
        order = replace(order, declared=jobs.with_generation(order.declared, place))
        engines.wait_for_port(port or order.declared.job.spec.gateway.port)  # before anything is asked or paid
        _before_it_pays(order, place, wanted.yes, console)
        stopped: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: stopped.append(received))
        view = View(console)
        engine = engines.Engine(order, place, port, following=following)
        try:
            plan = engine.run(view, wanted.serve, lambda: bool(stopped))
        finally:
            view.close()
    console.print(rounds_table(plan.status))
    ended = {"finished": plan.finished, "home": str(place.root), "status": jobs.written(place, plan.status)}
    if stopped:
        console.print("interrupted: all that is finished is kept; run the same command again to go on.")
        _as_json(output, error="interrupted", code=EXIT_INTERRUPTED, **ended)
        raise typer.Exit(EXIT_INTERRUPTED)
    if plan.failure:
        raise StepError(f"{plan.failure.message}\n{what_next(plan.failure)}", plan.failure.code)
    _as_json(output, **ended)
    console.print(f"the loop is over: {plan.finished} State and models: {place.root}", soft_wrap=True)


def what_next(failure: api.Failure) -> str:
    """After a step that failed for good; what is wrong in manifest, data or model fails the same way every time."""
    if failure.is_of_proposal and failure.code == EXIT_BAD_INPUT:
        return (
            "The trial is that of a model that was proposed: `cowest rollback` takes the proposal back. Do that, or"
            " change what is wrong; then run the same command again: it goes on from here."
        )
    if failure.code == EXIT_BAD_INPUT:
        return "Change that first, then run the same command again: it goes on from here."
    return "Run the same command again to go on from here."


def _is_its_state(order: engines.Order, place: jobs.Home) -> None:
    """Nothing begins on the state of another job, or on one that lies elsewhere than its models say.

    Raises `StepError`.
    """
    _same_job(order.file, order.declared.job.name, place)
    status = jobs.read_status(place)
    trial = status.candidate
    for pair in (status.stable, trial.pair if trial else None, status.previous):
        if pair and pair.weak_uri and not pair.weak_uri.startswith(f"{place.store.as_uri()}/"):
            written = manifest.local_path(pair.weak_uri.rpartition("/store/runs/")[0] or pair.weak_uri)
            raise StepError(
                f"{place.root}: this state was written in {written}, and names its models by that place. Move it back"
                " there, or begin anew with another --home.",
                EXIT_BAD_INPUT,
            )


def _same_job(file: Path | None, name: str, place: jobs.Home) -> None:
    known = jobs.read_json(place.job)
    wanted = known["metadata"]["name"] if known else name
    if name != wanted:
        raise StepError(
            f"{file}: wanted the job {wanted}, whose state is in {place.root}, saw {name}. Another job is another"
            " `cowest run`, with a state of its own.",
            EXIT_BAD_INPUT,
        )


def other_manifest(place: jobs.Home, order: engines.Order) -> str:
    """The state is that of a job of the same name from another file: it may be another job; else ""."""
    before = (jobs.read_json(place.run) or {}).get("manifest")
    if before is None or order.file is None or before == str(order.file.resolve()):
        return ""
    return f"{place.root} is the state of {before} so far. A job of its own wants another metadata.name, or --home."


def _before_it_pays(order: engines.Order, place: jobs.Home, yes: bool, console: Console) -> None:
    for path in jobs.without_effect_here(order.declared.document):
        console.print(f"note: {path} has no effect on one machine", soft_wrap=True)
    for note in (
        *order.facts.notes,
        other_rows(place, order),
        other_manifest(place, order),
        fewer_cores(place, look()),
    ):
        if note:
            console.print(f"note: {note}", soft_wrap=True)
    if not yes and not place.status.exists():
        _ask(order, console)
    if not jobs.read_status(place).rounds:
        spec = order.declared.job.spec
        probes.strong_answers(spec.strong, order.keys.get(engines.STRONG_KEYS, ""))
        if note := probes.evaluator_answers(spec.feedback.evaluator, order.keys, order.facts.first):
            console.print(f"note: {note}", soft_wrap=True)


def other_rows(place: jobs.Home, order: engines.Order) -> str:
    """The file of data.train was changed in place since it was last learnt from: what will come of it, else ""."""
    status, spec = jobs.read_status(place), order.declared.job.spec
    last = learnt_last(place)
    if last is None or status.train != spec.data.train or last[1] == order.facts.train_digest:
        return ""
    over = status.tuned_rounds >= spec.rounds.max
    due = "To make a round due, give the file another name" + (" and raise rounds.max." if over else ".")
    return (
        f"spec.data.train: the file has other rows than round {last[0]} learnt from. The next round learns from them,"
        f" but a change in place starts none. {due}"
    )


def learnt_last(place: jobs.Home) -> tuple[int, str] | None:
    """The last round that learnt from the file of data.train, and the digest of the rows that it saw."""
    found = [
        (int(file.parts[-3].removeprefix("r")), str(inputs[name]))
        for step, name in (("sft", "data"), ("collect", "train"))
        for file in (place.store / "runs").glob(f"r[0-9]*/{step}/{MANIFEST}")
        if name in (inputs := jobs.read_json(file)["inputs"])
    ]
    return max(found, default=None)


def fewer_cores(place: jobs.Home, now: Cores) -> str:
    """The job was begun with more cores than it may use now, and none of its threads are a person's choice; else ""."""
    kept = jobs.kept_cores(place)
    if kept is None or kept <= now.allowed or os.environ.get(THREADS):
        return ""
    return (
        f"the job was begun with {kept} cores, now {now.allowed} are allowed and it takes no more. Fewer threads may"
        " round otherwise: what a step draws anew may differ, and is paid for then."
    )


def _another_order(file: Path, place: jobs.Home, secrets: Path | None, port: int | None) -> engines.Order:
    """An edit of the manifest while it runs, checked as at the start. Raises `ManifestError` or `StepError`."""
    order = engines.read_order(file, secrets, place.looked_at)
    known = jobs.read_json(place.job)
    _same_job(order.file, order.declared.job.name, place)
    new = order.declared.job.spec.gateway.port
    if port is None and new != known["spec"]["gateway"]["port"] and not port_is_free(new):
        raise StepError(f"spec.gateway.port: port {new} is in use. Give another.")
    return order


def _ask(order: engines.Order, console: Console) -> None:
    """Above a limit a person says yes, before the first paid call."""
    whole = whole_job(order)
    if whole.calls <= ASK_ABOVE_CALLS and (whole.money or 0.0) <= ASK_ABOVE_MONEY:
        return
    costs = f"{whole.calls} strong-model calls" + (f" and {whole.money:.2f} {whole.currency}" if whole.money else "")
    console.print(f"The whole job may cost up to {costs} (`cowest plan` has the parts).", soft_wrap=True)
    for sentence in no_bounds(order.declared.job.spec, order.facts.rows):
        console.print(sentence, soft_wrap=True)
    if not console.is_terminal:
        raise StepError(f"up to {costs}: wanted --yes to go on without a question, saw none.")
    try:
        goes_on = typer.confirm("Go on?", err=True)
    except typer.Abort:
        raise StepError("interrupted: nothing was started or paid.", EXIT_INTERRUPTED) from None
    if not goes_on:
        raise StepError("the answer was no: nothing was started or paid.", EXIT_BAD_INPUT)


def whole_job(order: engines.Order) -> rounds.Estimate:
    """The baseline and all rounds that there can be."""
    first, tuned = engines.estimates(order.declared.job, order.facts)
    times = order.declared.job.spec.rounds.max
    calls, tokens = first.calls + tuned.calls * times, first.tokens + tuned.tokens * times
    money = first.money + tuned.money * times if first.money is not None and tuned.money is not None else None
    return rounds.Estimate("whole job", calls, tokens, money, first.currency)


def limits_met(spec: api.Spec, costs: Sequence[rounds.Estimate]) -> Iterator[str]:
    """Which limit of strong.budget would stop which part where; bounds are compared, so it may well not come to it."""
    budget = spec.strong.budget
    if budget is None:
        return
    for cost in costs:
        for name, limit, bound in (
            ("callsPerRound", budget.calls_per_round, cost.calls),
            ("moneyPerRound", budget.money_per_round, cost.money),
            ("tokensPerDay", budget.tokens_per_day, cost.tokens),
            ("moneyPerDay", budget.money_per_day, cost.money),
        ):
            if limit is not None and bound is not None and bound > limit:
                share = f"{100 * limit / bound:.0f} % of its bound of {round(bound, 2) or bound:.10g}"
                goes_on = "a rerun on the next day goes on" if "Day" in name else "a higher limit goes on from there"
                yield f"budget.{name} = {limit:.10g} stops the {cost.name} at {share}; {goes_on}."


def no_bounds(spec: api.Spec, rows: int) -> Iterator[str]:
    """Where what is said to be paid at most may be exceeded."""
    most = spec.feedback.max_queries
    if rows < most and spec.traces.content_sample_percent > 0:
        yield (
            f"Counted are the {rows} training rows; a round learns from usable traces too, up to feedback.maxQueries ="
            f" {most} queries in all."
        )
    if spec.strong.max_tokens is None:
        yield (
            f"strong.maxTokens is not set: an answer is taken for {UNKNOWN_OUTPUT_TOKENS} tokens, so tokens and money"
            " are a guess, not a bound."
        )
    if spec.canary.test == "AnytimeValid":
        yield (
            "canary.test AnytimeValid replays one query of each user until a gain is shown or unlikely: beyond 4 times"
            " minAnswers these are not counted."
        )


def longest_hours(spec: api.Spec, cost: rounds.Estimate) -> float:
    """If every call took all of strong.timeoutSeconds."""
    return math.ceil(cost.calls / spec.strong.max_concurrency) * spec.strong.timeout_seconds / 3600


def last_steps(place: jobs.Home) -> tuple[int, dict[str, float]] | None:
    """The last tuned round that was evaluated, or else the last with a finished step, and the seconds of its steps."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for file in sorted((place.store / "runs").glob(f"r[0-9]*/*/{MANIFEST}")):
        found.setdefault(int(file.parts[-3].removeprefix("r")), []).append(jobs.read_json(file))
    rounds_of = {
        number: {str(made["step"]): float(made["seconds"]) for made in sorted(steps, key=lambda made: made["started"])}
        for number, steps in found.items()
    }
    whole = {number: steps for number, steps in rounds_of.items() if {"collect", "evaluate"} <= steps.keys()}
    return max((whole or rounds_of).items(), default=None)


def sight(job: api.Job, facts: preflight.Facts, status: api.Status) -> tuple[Power, int, int]:
    """What the held-out rows can show, the next look at them and the last that there can be."""
    looks = looks_before(status, job.spec.data.held_out, facts.held_out_digest)
    last = status.looked[-1].held_out if status.looked else ""
    same = last == facts.held_out_digest if last else status.held_out == job.spec.data.held_out
    seen = status.sight if same else None
    trials = (status.stable is None) + max(0, job.spec.rounds.max - status.tuned_rounds)
    power = Power(facts.held_out, job.spec.gate, seen.discordant if seen else None, facts.groups)
    return power, looks + 1, looks + trials


def plan(file: File, home: HomeFolder = None, output: Output = "text") -> None:
    """Say what the job may cost at most: strong-model calls, tokens and money. Spends and starts nothing.

    What the held-out rows can still show, it says by the looks at them that the state of the job has noted.

    Of time it says how long the calls may take at most and, where rounds were run, what the steps of the last tuned
    round took, each since its last start: answers that were paid for come at once, and a canary takes as long as its
    traffic.
    """
    declared = jobs.load(file)
    place = jobs.home_of(file, home)
    _same_job(file, declared.job.name, place)
    jobs.reach(declared.job.spec.object_store)
    facts = facts_of(declared.document, str(file))
    costs = engines.estimates(declared.job, facts)
    spec = declared.job.spec
    power, look, last = sight(declared.job, facts, jobs.read_status(place))
    took = last_steps(place)
    if output == "json":
        typer.echo(json.dumps({"data": facts.figures(), "smallestGainPoints": power.smallest_gain(look),
                               "discordant": power.share, "discordantAssumed": power.discordant is None,
                               "smallSlices": power.small_slices(),
                               "parts": [asdict(c) for c in costs], "maxRounds": spec.rounds.max,
                               "limits": list(limits_met(spec, costs)),
                               "longestHours": [longest_hours(spec, c) for c in costs],
                               "lastSteps": {"round": took[0], "seconds": took[1]} if took else None}))  # fmt: skip
        return
    typer.echo(f"{facts.rows} training rows, {facts.held_out} held-out rows; upper bounds of what is paid:")
    for cost in costs:
        money = f", {cost.money:.2f} {cost.currency}" if cost.money is not None else ""
        times = f" (at most {spec.rounds.max} times)" if cost is costs[1] else ""
        typer.echo(f"  {cost.name:12} {cost.calls:8} calls, {cost.tokens:10} tokens{money}{times}")
    typer.echo(
        "A call is one question to the strong model or to a judge. Steps count answers: of these some were paid for"
        " before, as those of the strong model alone and of the pair that is served, and are not paid again."
    )
    for sentence in no_bounds(spec, facts.rows):
        typer.echo(sentence)
    for limit in limits_met(spec, costs):
        typer.echo(limit)
    hours = ", ".join(f"{longest_hours(spec, cost):.1f} h for the {cost.name}" for cost in costs)
    typer.echo(
        f"Time of the calls is not measured beforehand; if each took all of strong.timeoutSeconds ="
        f" {spec.strong.timeout_seconds}, {spec.strong.max_concurrency} at a time: {hours}. Tuning comes on top."
    )
    if took:
        steps = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took[1].items())
        typer.echo(f"The steps of round {took[0]} took: {steps}.")
    for sentence in sentences(power, look, last):
        typer.echo(printable(sentence))
    for note in facts.notes:
        typer.echo(f"note: {note}")
    if spec.strong.prices is None:
        typer.echo("No money is shown: declare strong.prices to see it.")
