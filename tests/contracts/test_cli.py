"""`cowest init`, `validate` and `crd`, as people call them: what is printed where, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cowest_cli import main as cli
from cowest_operator import manifest
from cowest_operator.schema import Problem
from cowest_training.contract import EXIT_BAD_INPUT, EXIT_BUDGET, EXIT_FAILED, EXIT_OK, EXIT_RETRY, StepError
from tests.loop.tiny_models import make_model
from tests.manifests import edited, smallest


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cowest(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Calls the entry point in this process."""

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["cowest", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Said(int(ended.value.code or 0), *capsys.readouterr())

    return call


NOTHING_BUT_UNKNOWN = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"},
    }
)


def write_rows(path: Path, prefix: str, count: int) -> None:
    rows = [{"id": f"{prefix}{i}", "query": f"{prefix} question {i * 7919}", "reference": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with a manifest and all that it names."""
    write_rows(tmp_path / "train.jsonl", "train", 5)
    write_rows(tmp_path / "held_out.jsonl", "held", 100)
    known = ["train held question why so", *(str(i * 7919) for i in range(100))]
    make_model(tmp_path / "weak", known, max_position_embeddings=2048)
    job = edited(
        {"weak.model": "file://weak", "data.train": "file://train.jsonl", "data.heldOut": "file://held_out.jsonl"}
    )
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


def test_init_writes_a_manifest_that_is_valid_and_never_overwrites_one(cowest: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    said = cowest("init", str(path))
    assert said.code == EXIT_OK and "reference" in said.out and "cowest run -f" in said.out
    manifest.load(path)
    path.write_text("mine")
    said = cowest("init", str(path))
    assert said.code == EXIT_BAD_INPUT and "stays as it is" in said.err
    assert path.read_text() == "mine"


def test_validate_reads_the_data_and_counts_the_rows(cowest: Any, desk: Path) -> None:
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_OK, said.err
    assert "5 training rows, 100 held-out rows" in said.out


def test_validate_prints_all_defaults_as_json(cowest: Any, desk: Path) -> None:
    said = cowest("validate", "-f", str(desk / "job.yaml"), "-o", "json")
    assert said.code == EXIT_OK and json.loads(said.out) == manifest.load(desk / "job.yaml").job


def test_validate_refuses_a_tokenizer_with_more_ids_than_embeddings(cowest: Any, desk: Path) -> None:
    file = desk / "weak" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["more"] = 999
    file.write_text(json.dumps(tokenizer))
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "Too many: 'more' (999)" in said.err


def test_validate_needs_no_files_with_no_data(cowest: Any, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(smallest()))
    assert cowest("validate", "--no-data", "-f", str(tmp_path / "job.yaml")).code == EXIT_OK


def test_validate_names_every_missing_file(cowest: Any, desk: Path) -> None:
    (desk / "train.jsonl").unlink()
    (desk / "held_out.jsonl").unlink()
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "Traceback" not in said.err
    assert "spec.data.train: there is nothing at" in said.err and "spec.data.heldOut: there is" in said.err


def test_validate_refuses_a_bad_row_with_its_line(cowest: Any, desk: Path) -> None:
    with (desk / "train.jsonl").open("a") as file:
        file.write('{"id": "x", "query": 5, "reference": "r"}\n')
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "train.jsonl" in said.err and "6" in said.err


def test_validate_refuses_a_reference_that_the_evaluator_cannot_go_by(cowest: Any, desk: Path) -> None:
    job = yaml.safe_load((desk / "job.yaml").read_text())
    job["spec"]["feedback"]["evaluator"] = {"type": "Choice", "choices": [str(i) for i in range(4)]}
    (desk / "job.yaml").write_text(yaml.safe_dump(job))
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "train.jsonl:5: reference of train4" in said.err and "saw '4'" in said.err


def test_validate_refuses_a_tokenizer_that_loses_the_text_of_the_rows(cowest: Any, desk: Path) -> None:
    pytest.importorskip("tokenizers")
    (desk / "weak/tokenizer.json").write_text(NOTHING_BUT_UNKNOWN)
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "loses most characters of 5 of 5 rows" in said.err
    assert "'train question 0" in said.err and "Name a model" in said.err
    assert cowest("validate", "--no-data", "-f", str(desk / "job.yaml")).code == EXIT_OK


def test_validate_notes_an_extract_that_finds_nothing(cowest: Any, desk: Path) -> None:
    job = yaml.safe_load((desk / "job.yaml").read_text())
    job["spec"]["feedback"]["evaluator"] = {"type": "ExactMatch", "extract": "So: (.*)"}
    (desk / "job.yaml").write_text(yaml.safe_dump(job))
    for verb in ("validate", "plan"):
        said = cowest(verb, "-f", str(desk / "job.yaml"))
        assert (
            said.code == EXIT_OK
            and "note: feedback.evaluator.extract = 'So: (.*)' finds nothing" in said.out + said.err
        )
    with (desk / "train.jsonl").open("a") as file:
        file.write('{"id": "x", "query": "why", "reference": "r", "explanation": "Because. So: r"}\n')
    assert "finds nothing" not in cowest("validate", "-f", str(desk / "job.yaml")).err


@pytest.mark.parametrize(
    ("host", "noted"),
    [
        ("127.0.0.1:8000", False),
        ("127.0.1.1", False),
        ("localhost:8000", False),
        ("[::1]:8000", False),
        ("10.0.0.7", True),
        ("strong.models.svc", True),
    ],
)
def test_validate_notes_a_key_that_crosses_a_network_readable(cowest: Any, desk: Path, host: str, noted: bool) -> None:
    job = yaml.safe_load((desk / "job.yaml").read_text())
    job["spec"]["strong"] |= {
        "endpoint": f"http://{host}/v1",
        "apiKeySecretRefs": [{"name": "strong", "key": "api-key"}],
    }
    (desk / "job.yaml").write_text(yaml.safe_dump(job))
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_OK and ("readable on the way" in said.out + said.err) == noted


def test_validate_says_how_many_rows_are_explained(cowest: Any, desk: Path) -> None:
    with (desk / "train.jsonl").open("a") as file:
        file.write('{"id": "x", "query": "why", "reference": "r", "explanation": "so"}\n')
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_OK and "6 training rows, 100 held-out rows, 1 explained training rows" in said.out


def test_validate_refuses_held_out_rows_that_are_trained_on(cowest: Any, desk: Path) -> None:
    leaked = (desk / "held_out.jsonl").read_text().splitlines()[0]
    with (desk / "train.jsonl").open("a") as file:
        file.write(leaked + "\n")
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "held_out.jsonl:1" in said.err


def test_validate_refuses_one_file_as_both_under_two_names(cowest: Any, desk: Path) -> None:
    manifest = desk / "job.yaml"
    manifest.write_text(manifest.read_text().replace("file://train.jsonl", "file://./held_out.jsonl"))
    said = cowest("validate", "-f", str(manifest))
    assert said.code == EXIT_BAD_INPUT and "train and held-out data are the same" in said.err


def test_validate_refuses_fewer_held_out_rows_than_the_gate_wants(cowest: Any, desk: Path) -> None:
    write_rows(desk / "held_out.jsonl", "held", 99)
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "gate.minHeldOut = 100 rows, saw 99" in said.err


def test_validate_refuses_a_model_folder_with_pickles(cowest: Any, desk: Path) -> None:
    (desk / "weak" / "pytorch_model.bin").write_bytes(b"\x80")
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and "spec.weak.model" in said.err and "pytorch_model.bin" in said.err


def test_validate_shows_each_problem_with_its_line(cowest: Any, desk: Path) -> None:
    (desk / "job.yaml").write_text(yaml.safe_dump(edited({"weak.modle": 1, "rounds.max": "3"})))
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT and said.out == ""
    assert len(said.err.splitlines()) == 2 and all("job.yaml:" in line for line in said.err.splitlines())


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        pytest.param({"weak.modle": 1}, "spec.weak.modle: is not a known field", id="a wrong manifest"),
        pytest.param({"gate.minHeldOut": 101}, "gate.minHeldOut = 101 rows, saw 100", id="too few rows"),
        pytest.param({"weak.model": "file://held_out.jsonl"}, "spec.weak.model", id="no model"),
    ],
)
def test_validate_as_json_says_what_is_wrong_in_the_same_form(
    cowest: Any, desk: Path, edits: dict[str, Any], says: str
) -> None:
    job = yaml.safe_load((desk / "job.yaml").read_text())
    (desk / "job.yaml").write_text(yaml.safe_dump(edited(edits, job)))
    said = cowest("validate", "-f", str(desk / "job.yaml"), "-o", "json")
    found = json.loads(said.out)
    assert said.code == EXIT_BAD_INPUT and found["valid"] is False
    assert len(found["problems"]) == 1 and says in found["problems"][0]
    assert says in said.err, "people read it there"


def test_validate_refuses_a_pattern_that_is_no_regular_expression(cowest: Any, desk: Path) -> None:
    job = yaml.safe_load((desk / "job.yaml").read_text())
    job["spec"]["feedback"]["evaluator"]["extract"] = "answer: ("
    (desk / "job.yaml").write_text(yaml.safe_dump(job))
    said = cowest("validate", "-f", str(desk / "job.yaml"))
    assert said.code == EXIT_BAD_INPUT
    assert "spec.feedback.evaluator.extract: is no regular expression" in said.err and "job.yaml:" in said.err


@pytest.mark.parametrize(
    "host",
    ["10.1.2.3", "172.16.0.9:8000", "172.31.255.1", "192.168.1.5", "gpu", "llm.lan.internal", "a.b.svc", "x.local"],
)
def test_a_strong_model_in_ones_own_network_may_be_plain_http(cowest: Any, desk: Path, host: str) -> None:
    job = yaml.safe_load((desk / "job.yaml").read_text())
    job["spec"]["strong"]["endpoint"] = f"http://{host}/v1"
    (desk / "job.yaml").write_text(yaml.safe_dump(job))
    assert cowest("validate", "-f", str(desk / "job.yaml")).code == EXIT_OK


def test_crd_prints_what_kubectl_applies(cowest: Any) -> None:
    as_yaml, as_json = cowest("crd"), cowest("crd", "-o", "json")
    assert yaml.safe_load(as_yaml.out) == json.loads(as_json.out) == manifest.crd()


def test_a_mistyped_verb_is_answered_with_the_right_one(cowest: Any) -> None:
    said = cowest("validat")
    assert said.code == EXIT_BAD_INPUT and "'validate'" in said.err


class Away(Exception):
    retryable = True


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(StepError("x", EXIT_BUDGET), EXIT_BUDGET, id="the budget is spent"),
        pytest.param(Away("x"), EXIT_RETRY, id="an endpoint is away"),
        pytest.param(OSError(28, "No space left on device"), EXIT_RETRY, id="the disk is full"),
        pytest.param(
            manifest.ManifestError("f", [Problem("", "is empty")]), EXIT_BAD_INPUT, id="the manifest is wrong"
        ),
        pytest.param(ModuleNotFoundError("x", name="torch"), EXIT_BAD_INPUT, id="an extra is not installed"),
        pytest.param(ZeroDivisionError("x"), EXIT_FAILED, id="a bug"),
    ],
)
def test_the_exit_code_says_whether_a_retry_is_worth_it(error: Exception, code: int) -> None:
    assert cli.exit_code(error) == code and cli.message(error)


def test_help_and_validation_load_nothing_heavy() -> None:
    """So that they answer at once, and where no extra is installed."""
    program = (
        "import sys\nfrom cowest_cli import main, manifest_verbs\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'aiohttp', 'kubernetes'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
