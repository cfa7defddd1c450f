"""The paper's data sets in their published columns, with records written by hand, and jobs over them."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from tests.manifests import edited

EXAMPLE = Path(__file__).parents[1] / "crds/examples/paper"
HELD_OUT = 120


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_convert", EXAMPLE / "convert.py")
    assert spec and spec.loader
    module = sys.modules["paper_convert"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = load()

BRIDGE: Mapping[str, Any] = {
    "idx": 7,
    "question": "If the Alder bridge had been finished two years later, when would it have opened?",
    "answers": ["1906", "in 1906"],
    "context": ["Alder is a town. The Alder bridge opened in 1904. Its lamps are blue.", "The river floods in May."],
}
VESSEL: Mapping[str, Any] = {
    "id": "ab-1",
    "question": "Which vessel carries blood from the heart to the lungs?",
    "opa": "Aorta",
    "opb": "Pulmonary artery",
    "opc": "Portal vein",
    "opd": "Renal artery",
    "cop": 1,
    "choice_type": "single",
    "exp": "It leaves the right ventricle.",
    "subject_name": "Anatomy",
    "topic_name": None,
}
BIKE: Mapping[str, Any] = {
    "context": "I will keep the bike that I found.",
    "response": "Would you tell its owner?",
    "rots": ["It's wrong to keep what is not yours.", "You should look for an owner"],
    "safety_label": "__needs_caution__",
    "safety_annotations": ["needs caution", "needs caution", "casual"],
    "safety_annotation_reasons": ["The speaker keeps what another lost", "The speaker keeps what another lost"],
    "source": "socialchemistry",
    "etc": None,
    "dialogue_id": 3,
    "response_id": 0,
    "episode_done": False,
}
LATER: Mapping[str, Any] = {
    **BIKE,
    "context": "Fine, I will put up a note.",
    "response": "Good.",
    "rots": [],
    "safety_label": "__casual__",
    "safety_annotation_reasons": ["", "", ""],
    "response_id": 1,
    "episode_done": True,
}


def record(dataset: str, number: int) -> dict[str, Any]:
    """One of many, in the columns of the data set and with words of its own."""
    name = f"{['amber', 'birch', 'cedar', 'dune', 'elm'][number % 5]} {number * 7919}"
    changes: Mapping[str, Mapping[str, Any]] = {
        "ifqa": {"idx": number, "question": f"If the {name} bridge had opened a year later, when would it have been?"},
        "medmcqa": {"id": f"q{number}", "question": f"Which vessel is called {name}?", "cop": number % 4},
        "prosocial": {"dialogue_id": number, "context": f"I will keep the {name} bike that I found."},
    }
    return {**{"ifqa": BRIDGE, "medmcqa": VESSEL, "prosocial": BIKE}[dataset], **changes[dataset]}


def make_job(dataset: str, folder: Path, **edits: Any) -> Path:
    """The manifest as it is shipped but for where the models are, beside converted rows."""
    files = []
    for name, numbers in (("train", range(60)), ("held_out", range(1000, 1000 + HELD_OUT))):
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps([record(dataset, number) for number in numbers]))
    out = folder / "data" / dataset
    arguments = [dataset, "--train", files[0], "--held-out", files[1], "--out", out]
    assert convert.main([str(argument) for argument in arguments]) == 0
    document = yaml.safe_load((EXAMPLE / f"{dataset}.yaml").read_text("utf-8"))
    job = folder / f"{dataset}.yaml"
    job.write_text(yaml.safe_dump(edited({"gate.minHeldOut": HELD_OUT, **edits}, document)))
    return job
