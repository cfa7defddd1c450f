"""Status -> what `kubectl` shows: fields for people, and `state`, from which the heart goes on. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from cowest_operator import api, manifest
from cowest_operator.schema import Schema
from cowest_serving.contract import Pair, SettingsError, dump, parse

WARNED = (api.REASON_STEP_FAILED, api.REASON_STEP_DEADLINE, api.REASON_BUDGET)  # of RoundProgressing, as events
LONGEST = 4096  # characters of a text, where the schema lets it be longer


def read(status: Mapping[str, Any] | None) -> api.Status:
    """The heart's status out of the job's; the conditions are those that people see. Raises `SettingsError`."""
    if not status or "state" not in status:
        return api.Status()
    try:
        state = parse(api.Status, status["state"], "status.state")
    except (ValueError, TypeError, AttributeError) as error:
        why = str(error) if isinstance(error, SettingsError) else f"status.state: {error}"
        raise SettingsError(
            f"{why}. What was decided so far cannot be read: was it edited by hand, or written by another version of"
            " CoWest? Put it back as it was, or run that version; nothing is decided until then."
        ) from error
    return replace(state, conditions=said(status), last_transition=str(status.get("lastTransition") or ""))


def said(status: Mapping[str, Any] | None) -> tuple[api.Condition, ...]:
    """The conditions that people see."""
    return tuple(_read_condition(c) for c in (status or {}).get("conditions") or [])


def _read_condition(seen: Mapping[str, Any]) -> api.Condition:
    since = datetime.fromisoformat(seen["lastTransitionTime"].replace("Z", "+00:00")).timestamp()
    generation = int(seen.get("observedGeneration") or 0)
    return api.Condition(seen["type"], seen["status"], seen["reason"], seen["message"], generation, since)


def written(status: api.Status, plan: api.Plan, traces: api.TraceCounts, generation: int) -> dict[str, Any]:
    """The whole of `.status`."""
    story: dict[str, Any] = {
        "observedGeneration": generation,
        "conditions": conditions(status.conditions),
        "rounds": [_round(outcome) for outcome in status.rounds],
        "traffic": _traffic(status, plan),
        "traces": trace_counts(traces),
        "budget": _budget(status.budget),
        "lastTransition": status.last_transition,
        "state": _state(status),
    }
    if status.stable:
        story["stable"] = _stable(status, status.stable)
    if status.candidate:
        story["candidate"] = _candidate(status.candidate)
    cut: dict[str, Any] = _cut(manifest.field_schema("status"), story)
    return cut


def _cut(schema: Schema, value: Any) -> Any:
    """No text longer than the schema allows: one that is would make the API server refuse the whole status, and each
    one after it. `state` has no limits of its own."""
    if not schema:
        return value
    if isinstance(value, str):
        limit = min(schema.get("maxLength", LONGEST), LONGEST)
        return value if len(value) <= limit else value[: limit - 1] + "…"
    if isinstance(value, list):
        return [_cut(schema.get("items", {}), item) for item in value]
    if isinstance(value, Mapping):
        return {name: _cut(schema.get("properties", {}).get(name, {}), item) for name, item in value.items()}
    return value


def transition(story: Mapping[str, Any]) -> Any:
    """The part whose change is a transition: written at once. The rest may wait for a minute."""
    conditions = [{k: v for k, v in c.items() if k != "message"} for c in story.get("conditions", ())]
    state = {k: v for k, v in story.get("state", {}).items() if k != "budget"}
    return {"conditions": conditions, "state": state, "traffic": story.get("traffic"),
            "observedGeneration": story.get("observedGeneration")}  # fmt: skip


def _state(status: api.Status) -> dict[str, Any]:
    state: dict[str, Any] = dump(replace(status, conditions=(), last_transition=""))
    del state["conditions"], state["lastTransition"]
    return state


def conditions(values: Iterable[api.Condition]) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = _cut(manifest.field_schema("status.conditions"), [_condition(each) for each in values])
    return said


def _condition(condition: api.Condition) -> dict[str, Any]:
    return {
        "type": condition.type,
        "status": condition.status,
        "reason": condition.reason,
        "message": condition.message,
        "observedGeneration": condition.observed_generation,
        "lastTransitionTime": rfc3339(condition.last_transition),
    }


def warnings(before: Iterable[api.Condition], after: Iterable[api.Condition]) -> tuple[api.Event, ...]:
    """An event for each reason that something is wrong by now and was not before, however many conditions have it."""
    known = {each.reason for each in before if _warns(each)}
    new = {each.reason: each.message for each in after if _warns(each) and each.reason not in known}
    return tuple(api.Event("Warning", reason, message) for reason, message in new.items())


def _warns(condition: api.Condition) -> bool:
    is_degraded = condition.type == api.DEGRADED and condition.status == "True"
    return is_degraded or (condition.type == api.ROUND_PROGRESSING and condition.reason in WARNED)


def _stable(status: api.Status, pair: Pair) -> dict[str, Any]:
    shown = {
        "digest": pair.digest,
        "weakDigest": pair.weak_digest,
        "weakUri": pair.weak_uri,
        "promptsDigest": pair.prompts.digest,
        "draft": pair.draft,
        "strongModel": pair.strong_model,
        "round": status.stable_round,
        "serving": status.serving,
    }
    return _present(shown)


def _candidate(trial: api.Trial) -> dict[str, Any]:
    pair = trial.pair
    shown = {
        "digest": pair.digest if pair else None,
        "weakDigest": pair.weak_digest if pair else None,
        "weakUri": pair.weak_uri if pair else trial.model,
        "round": trial.number,
        "origin": trial.origin,
        "stage": trial.stage,
    }
    return _present(shown)


def _traffic(status: api.Status, plan: api.Plan) -> dict[str, Any]:
    percent = sum(arm.weight_percent for arm in plan.routing.arms if arm.name == "candidate")
    step = status.candidate.step if status.candidate and status.candidate.stage != "Preparing" else None
    return _present({"candidatePercent": percent, "step": step})


def trace_counts(counts: api.TraceCounts) -> dict[str, Any]:
    return _present({"all": counts.all, "usable": counts.usable, "reason": counts.reason or None})


def _round(outcome: api.Outcome) -> dict[str, Any]:
    shown = {
        "number": outcome.number,
        "origin": outcome.origin,
        "decision": outcome.decision,
        "reason": outcome.reason,
        "message": outcome.message,
        "pairs": outcome.pairs,
        "pValue": _decimal(outcome.p_value),
        "difference": _decimal(outcome.difference),
        "score": _decimal(outcome.score),
        "liveDifference": _decimal(outcome.live_difference),
        "liveAnswers": outcome.live_answers,
        "pair": outcome.pair or None,
        "dataset": outcome.dataset,
        "note": outcome.note or None,
        "by": outcome.by,
        "proposedBy": outcome.proposed_by,
        "proposedWhy": outcome.proposed_why or None,
        "startedAt": rfc3339(outcome.started_at),
        "endedAt": rfc3339(outcome.ended_at),
    }
    return _present(shown)


def _budget(budget: api.Budget) -> dict[str, Any]:
    part = budget.round
    return {
        "calls": budget.calls,
        "tokens": budget.tokens,
        "money": f"{budget.money:.4f}",
        "round": {"calls": part.calls, "tokens": part.tokens, "money": f"{part.money:.4f}"},
        **({"live": dataclasses.asdict(live) | {"money": f"{live.money:.4f}"}} if (live := budget.live) else {}),
    }


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
