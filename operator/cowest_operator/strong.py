"""What gateway and proxy say of the strong endpoint, as one trouble that comes once and goes with an answer. Pure.

Each word is one pod's: replicas meet different calls, and one that has just started has met none. So a trouble stays
until an answer is told that is newer than the failures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cowest_operator import api
from cowest_serving.contract import Budget

USERS, STEPS = "users", "steps"  # who asks: by the gateway, by the proxy

# Error of the word -> what is wrong, and what to do. Those of one group may come in turn: the first one stays said.
_AWAY = {
    "EndpointUnreachable": "it cannot be reached: does it run, and may pods of this namespace reach it (network"
    " policies, HTTPS_PROXY, strong.caBundleRef)?",
    "DeadlineExceeded": "it gives no answer in time: is it overloaded, or strong.timeoutSeconds too short?",
    "ServerFault": "it answers with faults of its own (5xx): its operator has to mend it.",
    "BadAnswer": "what it answers is no chat completion: is strong.endpoint its base address?",
}
_LIMITED = "it answers 429: raise its quota, lower strong.maxConcurrency, or give more keys."
_NOT_TAKEN = "it takes none of the keys: put a valid one into {secrets}."
_REFUSED = (
    "it refuses the calls: is strong.endpoint its base address (it normally ends in /v1), and strong.model its name?"
)
_HERE = {  # on one machine
    "EndpointUnreachable": "it cannot be reached: does it run, and may this machine reach it (HTTPS_PROXY)?",
    "Unauthorized": "it takes none of the keys: give a valid one for strong.apiKeySecretRefs, then run again.",
}


@dataclass(frozen=True)
class Failing:
    """Since when the endpoint fails, in epoch seconds, and how."""

    endpoint: str
    since: float
    last: float
    error: str


def seen(endpoint: str, word: Mapping[str, Any] | None, before: Failing | None) -> Failing | None:
    """What is known after another word; `None`: the endpoint answers, or nothing is known of it."""
    if before is not None and before.endpoint != endpoint:
        before = None
    if not word:
        return before
    if word["failing"]:
        since, error = float(word["since"]), str(word["error"])
        if before is None:
            return Failing(endpoint, since, float(word["last_failure"]), error)
        kept = before.error if before.error in _AWAY and error in _AWAY else error
        return Failing(endpoint, before.since, max(before.last, float(word["last_failure"])), kept)
    answered = word["last_answer"]
    return before if before is not None and (answered is None or answered < before.last) else None


def trouble(job: api.Job, failing: Mapping[str, Failing], *, here: bool = False) -> api.Trouble | None:
    """`failing` by who asks; `here`: on one machine, where there are no pods and no Secrets."""
    if not failing:
        return None
    first = min(failing.values(), key=lambda each: each.since)
    who = " and ".join(sorted(failing, reverse=True))
    since = datetime.fromtimestamp(first.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    message = (
        f"the strong endpoint {first.endpoint} has failed for {who} since {since}: {_what(job, first.error, here)}"
    )
    if USERS in failing:
        others = "strong.fallbacks answer" if job.spec.strong.fallbacks else f"they get {_meanwhile(job)}"
        message += f" Meanwhile {others}."
    return api.Trouble(api.REASON_STRONG_FAILS, message, USERS in failing and not job.spec.strong.fallbacks)


@dataclass(frozen=True)
class NoRoom:
    """Live answers are refused for want of budget: on which day, by which limits, and how."""

    budget: Budget | None
    day: str  # UTC
    error: str


def room(budget: Budget | None, word: Mapping[str, Any] | None, now: float, before: NoRoom | None) -> NoRoom | None:
    """What is known after a gateway's word of the day's budget; `None`: it has room, or nothing is known of it."""
    day = datetime.fromtimestamp(now, UTC).date().isoformat()
    if word and word.get("refuses"):
        return NoRoom(budget, day, str(word["refuses"]))
    left = (word[name] for name in ("left_tokens", "left_money")) if word else ()
    met_no_call = not word or word["day"] is None or any(each is not None and each <= 0 for each in left)
    still = before is not None and met_no_call and (before.budget, before.day) == (budget, day)
    return before if still else None


def without_room(job: api.Job, known: NoRoom) -> api.Trouble:
    """Fallbacks are paid from the same budget, so only a draft may stand in."""
    if known.error == "BudgetUnknown":
        what = "cannot be looked up, and what gateways had taken of it is used up: is the strong-model proxy there?"
    else:
        what = f"of {known.day} has no room for live answers: raise it, or wait for midnight UTC."
    message = f"the day's budget (strong.budget) {what} Meanwhile users get {_meanwhile(job)}."
    return api.Trouble(api.REASON_BUDGET, message, of_all_answers=True)


def _what(job: api.Job, error: str, here: bool) -> str:
    if here and error in _HERE:
        return _HERE[error]
    if error in _AWAY:
        return _AWAY[error]
    if error == "RateLimited":
        return _LIMITED
    if error == "Unauthorized":
        names = dict.fromkeys(f"Secret {ref.name}" for ref in job.spec.strong.api_key_secret_refs)
        return _NOT_TAKEN.format(secrets=" or ".join(names) or "a Secret that strong.apiKeySecretRefs names")
    return _REFUSED


def _meanwhile(job: api.Job) -> str:
    declared = job.spec.collaboration.when_strong_fails
    what = "the draft alone where there is one" if declared == "WeakAlone" else "an error"
    return f"{what} (collaboration.whenStrongFails: {declared})"
