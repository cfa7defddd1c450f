"""Manifests for tests: the smallest one, edits of it, and a table of broken ones that our validator and a real API
server must both refuse, at the same field.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cowest_operator.manifest import API_VERSION, KIND

REMOVED = object()


def smallest() -> dict[str, Any]:
    """The smallest manifest that is valid."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": "desk", "namespace": "default"},
        "spec": {
            "weak": {"model": "file:///models/weak"},
            "strong": {"endpoint": "https://strong.example.com/v1", "model": "strong"},
            "data": {"train": "file:///data/train.jsonl", "heldOut": "file:///data/held_out.jsonl"},
            "feedback": {"evaluator": {"type": "ExactMatch"}},
        },
    }


def edited(edits: Mapping[str, Any], manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A copy with fields set by dotted path (`canary.steps[0].weightPercent`, under spec unless it begins with `/`)."""
    result = copy.deepcopy(dict(manifest or smallest()))
    for path, value in edits.items():
        keys: list[Any] = [
            int(part[1:-1]) if part.startswith("[") else part
            for part in re.findall(r"\[\d+\]|[^.\[\]]+", path[1:] if path.startswith("/") else f"spec.{path}")
        ]
        place: Any = result
        for key in keys[:-1]:
            place = place[key] if isinstance(key, int) else place.setdefault(key, {})
        if value is REMOVED:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
    return result


@dataclass(frozen=True)
class Broken:
    """What is wrong (a test id), the edits that make it so, the field to be blamed, and a part of the message."""

    name: str
    edits: Mapping[str, Any]
    field: str
    says: str


JUDGE = {"type": "Judge", "endpoint": "https://judge.example.com/v1", "model": "judge"}
STEPS_DOWN = [{"weightPercent": 50, "minAnswers": 1}, {"weightPercent": 10, "minAnswers": 1}]
STEPS_SAME = [{"weightPercent": 50, "minAnswers": 1}, {"weightPercent": 50, "minAnswers": 2}]

CAPITALS, SLASH = {"name": "Strong", "key": "k"}, {"name": "strong", "key": "a/b"}
FALLBACK = {"endpoint": "https://b.example.com/v1", "model": "b"}
PRICES = {"inputPerMillionTokens": "1", "outputPerMillionTokens": "1"}

BROKEN = (
    Broken("an unknown field", {"weak.modle": "x"}, "spec.weak.modle", "Did you mean model?"),
    Broken("a field of another section", {"seed": 3}, "spec.seed", "Did you mean spec.training.seed?"),
    Broken("a field far from all known ones", {"weak.zzz": 1}, "spec.weak.zzz", "Known here: model, engine"),
    Broken("no weak model", {"weak.model": REMOVED}, "spec.weak.model", "is missing. Add it: Model the loop starts"),
    Broken("no feedback", {"feedback": REMOVED}, "spec.feedback", "is missing"),
    Broken("no evaluator type", {"feedback.evaluator": {}}, "spec.feedback.evaluator.type", "is missing"),
    Broken("a number as text", {"weak.replicas": "2"}, "spec.weak.replicas", "Remove the quotes: 2"),
    Broken("a fraction without quotes", {"feedback.minMargin": 0.5}, "spec.feedback.minMargin", 'in quotes: "0.5"'),
    Broken("a fraction where a whole number is wanted", {"rounds.max": 1.5}, "spec.rounds.max", "a whole number"),
    Broken("text where true or false is wanted", {"suspend": "no"}, "spec.suspend", "true or false"),
    Broken("a scalar where a section is wanted", {"training": "DPO"}, "spec.training", "wanted fields"),
    Broken("one entry where a list is wanted", {"canary.steps": {"weightPercent": 5}}, "spec.canary.steps", "a list"),
    Broken("an enum in lower case", {"collaboration.draft": "answer"}, "spec.collaboration.draft", "mean Answer?"),
    Broken("a number below its least", {"weak.replicas": 0}, "spec.weak.replicas", "at least 1, saw 0"),
    Broken("a number above its most", {"gateway.port": 70000}, "spec.gateway.port", "at most 65535, saw 70000"),
    Broken("a number above what 64 bits hold", {"strong.budget": {"callsPerRound": 10**23}},
           "spec.strong.budget.callsPerRound", "at most 9223372036854775807, saw 1"),
    Broken("a number above what 32 bits hold", {"canary.steps": [{"weightPercent": 2**31, "minAnswers": 1}]},
           "spec.canary.steps[0].weightPercent", "at most 2147483647, saw 2147483648"),
    Broken("a word that YAML reads as true", {"feedback.evaluator": {"type": "Choice", "choices": ["a", True]}},
           "spec.feedback.evaluator.choices[1]", "saw true. YAML reads yes, no, on and off as true or false: put"),
    Broken("an empty name", {"strong.model": ""}, "spec.strong.model", "at least 1 character, saw 0"),
    Broken("a redaction of nothing", {"collaboration.redaction": {}}, "spec.collaboration.redaction", "saw neither"),
    Broken("a kind that is not looked for", {"collaboration.redaction": {"identifiers": ["Emails"]}},
           "spec.collaboration.redaction.identifiers[0]", "mean Email?"),
    Broken("a look-ahead", {"collaboration.redaction": {"patterns": [{"name": "Policy", "regex": "PL(?=-)"}]}},
           "spec.collaboration.redaction.patterns[0].regex", "no look-around"),
    Broken("a pattern of nothing", {"collaboration.redaction": {"patterns": [{"name": "Policy", "regex": "[0-9]*"}]}},
           "spec.collaboration.redaction.patterns[0].regex", "does not match the empty text"),
    Broken("a pattern's name that is no word",
           {"collaboration.redaction": {"patterns": [{"name": "Policy_1", "regex": "PL"}]}},
           "spec.collaboration.redaction.patterns[0].name", "letters and digits"),
    Broken("shortcuts without one", {"collaboration.shortcuts": {}}, "spec.collaboration.shortcuts", "saw none"),
    Broken("a cache of nothing", {"collaboration.shortcuts": {"draftCache": {"maxEntries": 0}}},
           "spec.collaboration.shortcuts.draftCache.maxEntries", "at least 1, saw 0"),
    Broken("a loss that is no share", {"collaboration.shortcuts": {"strongAlone": {"maxLoss": "2"}}},
           "spec.collaboration.shortcuts.strongAlone.maxLoss", "above 0 and at most 1"),
    Broken("a loss of nothing", {"collaboration.shortcuts": {"weakAlone": {"maxLoss": "0"}}},
           "spec.collaboration.shortcuts.weakAlone.maxLoss", "above 0 and at most 1"),
    Broken("nothing explored", {"collaboration.shortcuts": {"weakAlone": {"explorePercent": 0}}},
           "spec.collaboration.shortcuts.weakAlone.explorePercent", "at least 1, saw 0"),
    Broken("a second call when the first has ended",
           {"collaboration.shortcuts": {"hedge": {"afterMilliseconds": 60000}}},
           "spec.collaboration.shortcuts.hedge.afterMilliseconds", "must be below strong.timeoutSeconds"),
    Broken("a second call at once", {"collaboration.shortcuts": {"hedge": {"afterMilliseconds": 0}}},
           "spec.collaboration.shortcuts.hedge.afterMilliseconds", "at least 10, saw 0"),
    Broken("an endless template", {"collaboration.prompts.draft": "{query}" * 3000}, "spec.collaboration.prompts.draft",
           "at most 16384 characters"),
    Broken("too many canary steps", {"canary.steps": [{"weightPercent": i + 1, "minAnswers": 1} for i in range(11)]},
           "spec.canary.steps", "at most 10 entries"),
    Broken("one choice", {"feedback.evaluator": {"type": "Choice", "choices": ["a"]}},
           "spec.feedback.evaluator.choices", "at least 2 entries"),
    Broken("a choice twice", {"feedback.evaluator": {"type": "Choice", "choices": ["a", "b", "a"]}},
           "spec.feedback.evaluator.choices[2]", "second entry"),
    Broken("a job name that names no service", {"/metadata.name": "1desk"}, "", "at most 40 lower-case letters"),
    Broken("a job name that is too long", {"/metadata.name": "a" * 41}, "", "at most 40 lower-case letters"),
    Broken("a bare path as model", {"weak.model": "models/weak"}, "spec.weak.model", "must be file://FOLDER"),
    Broken("a hub name without organisation", {"weak.model": "hf://weak"}, "spec.weak.model", "hf://ORG/NAME"),
    Broken("a pickle as model", {"weak.model": "file:///m/model.pt"}, "spec.weak.model", "pickles are never loaded"),
    Broken("data over http", {"data.train": "https://example.com/a.jsonl"}, "spec.data.train", "must be file://PATH"),
    Broken("training on the held-out rows", {"data.heldOut": "file:///data/train.jsonl"}, "spec.data.heldOut",
           "heldOut must differ from train"),
    Broken("an endpoint without scheme", {"strong.endpoint": "strong.example.com/v1"}, "spec.strong.endpoint",
           "must be an address"),
    Broken("plain http over the internet", {"strong.endpoint": "http://strong.example.com/v1"},
           "spec.strong.endpoint", "must use https"),
    Broken("plain http to an address just outside the private ones", {"strong.endpoint": "http://172.32.0.1/v1"},
           "spec.strong.endpoint", "must use https"),
    Broken("plain http to a name that begins like a private address", {"strong.endpoint": "http://10.0.0.1.example.com/v1"},
           "spec.strong.endpoint", "must use https"),
    Broken("plain http to an outside address", {"strong.endpoint": "http://8.8.8.8/v1"}, "spec.strong.endpoint",
           "must use https"),
    Broken("a key in the address", {"strong.endpoint": "https://me:key@strong.example.com/v1"}, "spec.strong.endpoint",
           "must not carry a user or key"),
    Broken("the path of a method in the address",
           {"strong.endpoint": "https://strong.example.com/v1/chat/completions"}, "spec.strong.endpoint",
           "must be the base address"),
    Broken("a fallback over plain http",
           {"strong.fallbacks": [{"endpoint": "http://b.example.com/v1", "model": "b"}]},
           "spec.strong.fallbacks[0].endpoint", "must use https"),
    Broken("a money budget without prices", {"strong.budget.moneyPerRound": "5"}, "spec.strong.budget", "need prices"),
    Broken("a price that is no number",
           {"strong.prices": {"inputPerMillionTokens": "cheap", "outputPerMillionTokens": "1"}},
           "spec.strong.prices.inputPerMillionTokens", "must be a decimal number in quotes"),
    Broken("a currency in lower case",
           {"strong.prices": {"inputPerMillionTokens": "1", "outputPerMillionTokens": "1", "currency": "usd"}},
           "spec.strong.prices.currency", "three capital letters"),
    Broken("a Secret named in capitals", {"strong.apiKeySecretRefs": [{"name": "Strong", "key": "k"}]},
           "spec.strong.apiKeySecretRefs[0].name", "must be the name of a Secret"),
    Broken("prompts twice",
           {"collaboration.prompts.solo": "{query}", "collaboration.promptsConfigMapRef.name": "prompts"},
           "spec.collaboration.prompts", "cannot both be set"),
    Broken("a template without the question", {"collaboration.prompts.draft": "Explain."},
           "spec.collaboration.prompts.draft", "must contain {query}"),
    Broken("a refine template without the draft", {"collaboration.prompts.refine": "{query}"},
           "spec.collaboration.prompts.refine", "must contain {draft}"),
    Broken("a draft in the solo template", {"collaboration.prompts.solo": "{query} {draft}"},
           "spec.collaboration.prompts.solo", "must not contain {draft}"),
    Broken("Choice without choices", {"feedback.evaluator.type": "Choice"}, "spec.feedback.evaluator.choices",
           "type Choice needs choices"),
    Broken("choices without Choice", {"feedback.evaluator.choices": ["a", "b"]}, "spec.feedback.evaluator.choices",
           "for type Choice only"),
    Broken("Judge without a model", {"feedback.evaluator": {"type": "Judge", "endpoint": "https://j.example.com/v1"}},
           "spec.feedback.evaluator.endpoint", "type Judge needs endpoint and model"),
    Broken("HTTP without an endpoint", {"feedback.evaluator.type": "HTTP"}, "spec.feedback.evaluator.endpoint",
           "type HTTP needs endpoint"),
    Broken("a rubric without Judge", {"feedback.evaluator.rubric": "be right"}, "spec.feedback.evaluator.model",
           "for type Judge only"),
    Broken("a tolerance without Numeric", {"feedback.evaluator.absoluteTolerance": "0.1"},
           "spec.feedback.evaluator.type", "for type Numeric only"),
    Broken("one draft a query", {"feedback.draftsPerQuery": 1}, "spec.feedback.draftsPerQuery", "at least 2"),
    Broken("drafts that are all the same", {"feedback.temperature": "0"}, "spec.feedback.temperature",
           "all drafts of a query are the same"),
    Broken("a margin no two scores have", {"feedback.minMargin": "1.5"}, "spec.feedback.minMargin", "at most 1"),
    Broken("more pairs than queries", {"feedback.minPairs": 10, "feedback.maxQueries": 9}, "spec.feedback.minPairs",
           "must not exceed maxQueries"),
    Broken("no room for a prompt", {"training.maxLength": 256}, "spec.training.maxLength", "prompt and draft both"),
    Broken("no learning rate", {"training.preference.learningRate": "0"}, "spec.training.preference.learningRate",
           "above 0"),
    Broken("a learning rate with an exponent", {"training.supervised.learningRate": "1e-4"},
           "spec.training.supervised.learningRate", "must be a decimal number in quotes"),
    Broken("all of the adapters dropped", {"training.lora.dropout": "1"}, "spec.training.lora.dropout", "below 1"),
    Broken("a schedule that is no cron", {"rounds.trigger.schedule": "every day"}, "spec.rounds.trigger.schedule",
           "cron expression of five fields"),
    Broken("significance that proves nothing", {"gate.significance": "0.7"}, "spec.gate.significance", "at most 0.5"),
    Broken("a negative share", {"gate.maxHurtPercent": "-1"}, "spec.gate.maxHurtPercent", "from 0 to 100"),
    Broken("a share above all", {"canary.maxErrorPercent": "101"}, "spec.canary.maxErrorPercent", "from 0 to 100"),
    Broken("canary steps that shrink", {"canary.steps": STEPS_DOWN}, "spec.canary.steps", "must grow from"),
    Broken("canary steps that stand still", {"canary.steps": STEPS_SAME}, "spec.canary.steps", "must grow"),
    Broken("a canary with all traffic", {"canary.steps": [{"weightPercent": 100, "minAnswers": 1}]},
           "spec.canary.steps[0].weightPercent", "must be below 100"),
    Broken("a canary step without answers", {"canary.steps": [{"weightPercent": 10}]},
           "spec.canary.steps[0].minAnswers", "is missing"),
    Broken(
        "a test of gains without replays",
        {"canary.test": "AnytimeValid", "gate.minimumEffectPoints": "2"},
        "spec.canary.test",
        "ShadowReplay",
    ),
    Broken(
        "a test of gains without a least one",
        {"canary.test": "AnytimeValid", "canary.signal": "ShadowReplay", "gate.minimumEffectPoints": "0.0"},
        "spec.gate.minimumEffectPoints",
        "above 0",
    ),
    *(
        Broken(f"live answers by {signal} without their texts",
               {"traces.contentSamplePercent": 0, "canary.signal": signal, **edits},
               "spec.traces.contentSamplePercent", "cannot be scored")
        for signal, edits in (("LateReference", {}), ("ShadowReplay", {}), ("Judge", {"feedback.evaluator": JUDGE}))
    ),
    Broken("a round that waits for traces without their texts",
           {"traces.contentSamplePercent": 0, "canary.signal": "Feedback", "rounds.trigger.newTraces": 1},
           "spec.traces.contentSamplePercent", "cannot be learnt from"),
    Broken("a judge's signal without a judge", {"canary.signal": "Judge"}, "spec.canary.signal", "needs feedback"),
    Broken("a bucket in capitals", {"objectStore.bucket": "Models"}, "spec.objectStore.bucket", "name of a bucket"),
    Broken("a prefix with a leading slash", {"objectStore": {"bucket": "models", "prefix": "/a"}},
           "spec.objectStore.prefix", "must not begin with '/'"),
    Broken("a key of a Secret with a slash", {"strong.apiKeySecretRefs": [{"name": "strong", "key": "a/b"}]},
           "spec.strong.apiKeySecretRefs[0].key", "must be a key of the Secret"),
    Broken("a fallback without scheme", {"strong.fallbacks": [{"endpoint": "b.example.com/v1", "model": "b"}]},
           "spec.strong.fallbacks[0].endpoint", "must be an address"),
    Broken("a key in a fallback's address",
           {"strong.fallbacks": [{"endpoint": "https://me:key@b.example.com/v1", "model": "b"}]},
           "spec.strong.fallbacks[0].endpoint", "must not carry a user or key"),
    Broken("the path of a method in a fallback's address",
           {"strong.fallbacks": [{"endpoint": "https://b.example.com/v1/models", "model": "b"}]},
           "spec.strong.fallbacks[0].endpoint", "must be the base address"),
    Broken("a fallback's Secret named in capitals", {"strong.fallbacks": [{**FALLBACK, "apiKeySecretRef": CAPITALS}]},
           "spec.strong.fallbacks[0].apiKeySecretRef.name", "must be the name of a Secret"),
    Broken("a fallback's key with a slash", {"strong.fallbacks": [{**FALLBACK, "apiKeySecretRef": SLASH}]},
           "spec.strong.fallbacks[0].apiKeySecretRef.key", "must be a key of the Secret"),
    Broken("clients of the proxy in a Secret named in capitals", {"strong.proxyKeysSecretRef.name": "Tools"},
           "spec.strong.proxyKeysSecretRef.name", "must be the name of a Secret"),
    Broken("a key for the proxy with a slash", {"strong.proxyKeysSecretRef": {"name": "tools", "ownKey": "a/b"}},
           "spec.strong.proxyKeysSecretRef.ownKey", "must be a key of the Secret"),
    Broken("the strong model's keys for the proxy's clients",
           {"strong.apiKeySecretRefs": [{"name": "strong", "key": "a"}], "strong.proxyKeysSecretRef.name": "strong"},
           "spec.strong.proxyKeysSecretRef", "must name another Secret than apiKeySecretRefs"),
    Broken("a fallback's keys for the proxy's clients",
           {"strong.fallbacks": [{**FALLBACK, "apiKeySecretRef": {"name": "spare", "key": "a"}}],
            "strong.proxyKeysSecretRef.name": "spare"},
           "spec.strong.proxyKeysSecretRef", "must name another Secret than apiKeySecretRefs"),
    Broken("users' keys for the proxy's clients",
           {"gateway.clientKeysSecretRef.name": "users", "strong.proxyKeysSecretRef.name": "users"},
           "spec.strong.proxyKeysSecretRef", "must name another Secret than gateway.clientKeysSecretRef"),
    Broken("certificates in a ConfigMap named in capitals", {"strong.caBundleRef": {"name": "CA"}},
           "spec.strong.caBundleRef.name", "must be the name of a ConfigMap"),
    Broken("a price of answers that is no number",
           {"strong.prices": {"inputPerMillionTokens": "1", "outputPerMillionTokens": "-1"}},
           "spec.strong.prices.outputPerMillionTokens", "must be a decimal number in quotes"),
    Broken("no money for a round", {"strong.prices": PRICES, "strong.budget.moneyPerRound": "0"},
           "spec.strong.budget.moneyPerRound", "above 0"),
    Broken("no money for a day", {"strong.prices": PRICES, "strong.budget.moneyPerDay": "0.0"},
           "spec.strong.budget.moneyPerDay", "above 0"),
    Broken("a draft before there is one", {"collaboration.prompts.draft": "{query} {draft}"},
           "spec.collaboration.prompts.draft", "must not contain {draft}"),
    Broken("a refine template without the question", {"collaboration.prompts.refine": "{draft}"},
           "spec.collaboration.prompts.refine", "must contain {query}"),
    Broken("a solo template without the question", {"collaboration.prompts.solo": "Answer."},
           "spec.collaboration.prompts.solo", "must contain {query}"),
    Broken("prompts in a ConfigMap named in capitals", {"collaboration.promptsConfigMapRef.name": "Prompts"},
           "spec.collaboration.promptsConfigMapRef.name", "must be the name of a ConfigMap"),
    Broken("held-out data over http", {"data.heldOut": "https://example.com/h.jsonl"}, "spec.data.heldOut",
           "must be file://PATH"),
    Broken("an endpoint that nobody asks", {"feedback.evaluator.endpoint": "https://j.example.com/v1"},
           "spec.feedback.evaluator.endpoint", "for types Judge and HTTP only"),
    Broken("a tolerance that is no number",
           {"feedback.evaluator": {"type": "Numeric", "absoluteTolerance": "little"}},
           "spec.feedback.evaluator.absoluteTolerance", "must be a decimal number in quotes"),
    Broken("a relative tolerance that is no number",
           {"feedback.evaluator": {"type": "Numeric", "relativeTolerance": "1%"}},
           "spec.feedback.evaluator.relativeTolerance", "must be a decimal number in quotes"),
    Broken("a tolerance of five times the reference",
           {"feedback.evaluator": {"type": "Numeric", "relativeTolerance": "5"}},
           "spec.feedback.evaluator.relativeTolerance", "no percentage; saw '5'"),
    Broken("a tolerance of the whole reference",
           {"feedback.evaluator": {"type": "Numeric", "relativeTolerance": "1.0"}},
           "spec.feedback.evaluator.relativeTolerance", "from 0 to below 1"),
    Broken("a blank behind an endpoint", {"strong.endpoint": "https://a.example.com/v1 "}, "spec.strong.endpoint",
           "without blanks; saw 'https://a.example.com/v1 '"),
    Broken("a blank behind a loopback address", {"strong.endpoint": "http://localhost:8000 "}, "spec.strong.endpoint",
           "without blanks; saw 'http://localhost:8000 '"),
    Broken("a line's end behind an endpoint", {"strong.endpoint": "https://a.example.com/v1\n"}, "spec.strong.endpoint",
           "without blanks"),
    Broken("a port that is no number", {"strong.endpoint": "http://127.0.0.1:abc/v1"}, "spec.strong.endpoint",
           "must have a port from 1 to 65535 behind the host, or none; saw 'http://127.0.0.1:abc/v1'"),
    *(
        Broken(f"the port {port or '(none)'} of {host}", {"strong.endpoint": f"https://{host}:{port}/v1"},
               "spec.strong.endpoint", "must have a port from 1 to 65535")
        for host in ("a.example.com", "[::1]") for port in ("99999", "65536", "0", "")
    ),
    Broken("a fallback's port that is too high", {"strong.fallbacks": [{**FALLBACK, "endpoint": "https://b.c:70000"}]},
           "spec.strong.fallbacks[0].endpoint", "must have a port"),
    Broken("a judge's port that is too high", {"feedback.evaluator": {**JUDGE, "endpoint": "https://j.c:70000/v1"}},
           "spec.feedback.evaluator.endpoint", "must have a port"),
    Broken("a blank strong model", {"strong.model": "  "}, "spec.strong.model", "must not be blank"),
    Broken("a blank fallback", {"strong.fallbacks": [{**FALLBACK, "model": "\t"}]}, "spec.strong.fallbacks[0].model",
           "must not be blank"),
    Broken("a blank judge", {"feedback.evaluator": {**JUDGE, "model": " "}}, "spec.feedback.evaluator.model",
           "must not be blank"),
    Broken("a blank choice", {"feedback.evaluator": {"type": "Choice", "choices": ["a", "b", " "]}},
           "spec.feedback.evaluator.choices[2]", "must not be blank"),
    Broken("a judge without scheme", {"feedback.evaluator": {**JUDGE, "endpoint": "j.example.com"}},
           "spec.feedback.evaluator.endpoint", "must be an address"),
    Broken("a judge over plain http", {"feedback.evaluator": {**JUDGE, "endpoint": "http://j.example.com/v1"}},
           "spec.feedback.evaluator.endpoint", "must use https"),
    Broken("a key in the judge's address", {"feedback.evaluator": {**JUDGE, "endpoint": "https://k@j.example.com/v1"}},
           "spec.feedback.evaluator.endpoint", "must not carry a user or key"),
    Broken("a judge's Secret named in capitals", {"feedback.evaluator": {**JUDGE, "apiKeySecretRef": CAPITALS}},
           "spec.feedback.evaluator.apiKeySecretRef.name", "must be the name of a Secret"),
    Broken("a judge's key with a slash", {"feedback.evaluator": {**JUDGE, "apiKeySecretRef": SLASH}},
           "spec.feedback.evaluator.apiKeySecretRef.key", "must be a key of the Secret"),
    Broken("no pull towards the start", {"training.preference.beta": "0"}, "spec.training.preference.beta", "above 0"),
    Broken("a weight above all", {"training.preference.nllWeight": "101"}, "spec.training.preference.nllWeight",
           "from 0 to 100"),
    Broken("an effect above all", {"gate.minimumEffectPoints": "101"}, "spec.gate.minimumEffectPoints",
           "from 0 to 100"),
    Broken("a loss of a slice above all", {"gate.maxSliceLossPoints": "101"}, "spec.gate.maxSliceLossPoints",
           "from 0 to 100"),
    Broken("a loss above all", {"canary.maxLossPoints": "101"}, "spec.canary.maxLossPoints", "from 0 to 100"),
    Broken("fewer gateways at most than always", {"gateway": {"replicas": 3, "maxReplicas": 2}},
           "spec.gateway.maxReplicas", "must be at least replicas"),
    Broken("bodies larger than a record may be", {"gateway.maxBodyBytes": 33554433}, "spec.gateway.maxBodyBytes",
           "33554432"),
    Broken("no request a minute", {"gateway.limits.requestsPerMinute": 0},
           "spec.gateway.limits.requestsPerMinute", "1"),
    Broken("clients' keys in a Secret named in capitals", {"gateway.clientKeysSecretRef.name": "Clients"},
           "spec.gateway.clientKeysSecretRef.name", "must be the name of a Secret"),
    Broken("a host in capitals", {"gateway.ingress.host": "Answers.example.com"}, "spec.gateway.ingress.host",
           "must be a host name in lower case"),
    Broken("a store's address with a path", {"objectStore": {"bucket": "models", "endpoint": "http://minio:9000/a"}},
           "spec.objectStore.endpoint", "must be an address without a path"),
    Broken("a store's certificates in a ConfigMap named in capitals",
           {"objectStore": {"bucket": "models", "caBundleRef": {"name": "CA"}}},
           "spec.objectStore.caBundleRef.name", "must be the name of a ConfigMap"),
    Broken("a store's Secret named in capitals",
           {"objectStore": {"bucket": "models", "credentialsSecretRef": {"name": "Store"}}},
           "spec.objectStore.credentialsSecretRef.name", "must be the name of a Secret"),
)  # fmt: skip

VALID: Mapping[str, Mapping[str, Any]] = {
    "nothing but what is required": {},
    "a field that is null counts as absent": {"collaboration.prompts": None, "rounds": None},
    "a quantity is a number or text": {"weak.resources": {"requests": {"cpu": 2, "memory": "4Gi"}}},
    "a pod template carries any pod field": {"weak.podTemplate.spec": {"nodeSelector": {"disk": "ssd"}, "x": [1]}},
    "no canary": {"canary.steps": []},
    "what the strong model may not see": {
        "collaboration.redaction": {
            "identifiers": ["Email", "Iban"],
            "patterns": [{"name": "PolicyNumber", "regex": r"\bPL-\d{6}\b"}],
        }
    },
    "drafts that are kept": {"collaboration.shortcuts": {"draftCache": {}}},
    "one model where it is enough": {"collaboration.shortcuts": {"strongAlone": {}, "weakAlone": {"maxLoss": "0.005"}}},
    "a second call when the first is slow": {"collaboration.shortcuts": {"hedge": {"afterMilliseconds": 900}}},
    "plain http on loopback": {"strong.endpoint": "http://127.0.0.1:8000/v1"},
    "plain http to IPv6 loopback": {"strong.endpoint": "http://[::1]:8000/v1"},
    "plain http to a Service": {"strong.endpoint": "http://strong.models.svc:80/v1"},
    "plain http to a Service by its full name": {"strong.endpoint": "http://strong.models.svc.cluster.local/v1"},
    "plain http to a single label": {"strong.endpoint": "http://strong/v1"},
    "an endpoint that does not end in v1": {"strong.endpoint": "https://llm.example.com/v1beta/openai/"},
    "a budget with prices": {
        "strong.prices": {"inputPerMillionTokens": "2.50", "outputPerMillionTokens": "10"},
        "strong.budget": {"moneyPerDay": "3", "callsPerRound": 10**12},
    },
    "a canary that wants a gain": {
        "canary.test": "AnytimeValid",
        "canary.signal": "ShadowReplay",
        "gate.minimumEffectPoints": "2",
    },
    "a judge that also judges live": {"feedback.evaluator": {**JUDGE, "rubric": "right"}, "canary.signal": "Judge"},
    "a scorer over HTTP": {"feedback.evaluator": {"type": "HTTP", "endpoint": "http://scorer:8080/score"}},
    "choices": {"feedback.evaluator": {"type": "Choice", "choices": ["yes", "no"]}},
    "traces without texts where clients score": {"traces.contentSamplePercent": 0, "canary.signal": "Feedback"},
    "traces without texts and no canary": {"traces.contentSamplePercent": 0, "canary.steps": []},
    "the highest port": {"strong.endpoint": "https://llm.example.com:65535/v1"},
    "a port and no path": {"strong.endpoint": "http://localhost:8000"},
    "a colon in the path": {"strong.endpoint": "https://llm.example.com/v1/projects:99999"},
    "numbers with a tolerance": {"feedback.evaluator": {"type": "Numeric", "relativeTolerance": "0.01"}},
    "templates with other braces": {"collaboration.prompts.refine": '{"q": "{query}", "d": "{draft}", {x}}'},
    "templates of a ConfigMap": {"collaboration.promptsConfigMapRef.name": "prompts"},
    "a pinned hub model": {"weak.model": "hf://org/name@0123abc"},
    "a schedule": {"rounds.trigger.schedule": "0 3 * * *"},
    "an object store": {
        "weak.model": "s3://models/weak",
        "objectStore": {"endpoint": "http://minio.minio.svc:9000", "bucket": "models", "pathStyle": True},
    },
}
