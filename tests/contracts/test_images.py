"""The images, without building them: what they install is what the lock says, and nothing in them is out of place."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
IMAGES = ("operator", "serving", "training")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def entries(path: Path) -> dict[str, str]:
    """Package -> its whole entry, hashes included."""
    found = re.split(r"\n(?=\S)", path.read_text().strip())
    return {canonicalize_name(re.split("[=<>;@ ]", each, maxsplit=1)[0]): each for each in found}


def lock(image: str) -> dict[str, str]:
    return entries(ROOT / image / "requirements.lock")


def closure(requirements: Iterable[str], found: set[str]) -> set[str]:
    """Names of all that `requirements` need on the images' platform, as the installed packages say."""
    for text in requirements:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        for extra in ("", *sorted(requirement.extras)):
            seen = f"{name}[{extra}]" if extra else name
            if seen in found:
                continue
            found.add(seen)
            inner = extras(extra) if name == "cowest" else metadata.requires(name) or []
            closure((each for each in inner if applies(Requirement(each), extra)), found)
    return found


def extras(extra: str) -> list[str]:
    return PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]


def applies(requirement: Requirement, extra: str) -> bool:
    image = {"extra": extra, "python_version": "3.11", "python_full_version": "3.11.9", "platform_machine": "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate(image)


def dockerfile(image: str) -> str:
    return (ROOT / image / "Dockerfile").read_text()


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_entries_of_the_one_lock(image: str) -> None:
    whole = entries(ROOT / "requirements.lock")
    assert [each for name, each in lock(image).items() if whole.get(name) != each] == [], "run `make lock-images`"


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_all_that_its_extra_needs(image: str) -> None:
    needed = {name for name in closure([f"cowest[{image}]"], set()) if "[" not in name} - {"cowest"}
    assert needed - set(lock(image)) == set(), "run `make lock-images`"


def test_the_operators_image_has_no_model_libraries() -> None:
    assert not {"torch", "transformers", "trl", "ray", "kserve", "pyarrow", "numpy", "starlette"} & set(
        lock("operator")
    )


def test_the_serving_image_has_no_torch() -> None:
    assert not {"torch", "transformers", "trl", "kubernetes", "kopf"} & set(lock("serving"))


@pytest.mark.parametrize("image", IMAGES)
def test_the_final_stage_runs_as_the_images_user_and_knows_no_index(image: str) -> None:
    final = dockerfile(image).rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", final, re.MULTILINE) == ["65532:65532"]
    assert "ARG" not in final
    assert "pip" not in final


@pytest.mark.parametrize("image", IMAGES)
def test_packages_come_with_hashes_and_without_a_compiler(image: str) -> None:
    text = dockerfile(image)
    assert text.count("pip install") == text.count("--require-hashes --only-binary :all:") > 0
    assert "apt-get" not in text


@pytest.mark.parametrize("image", IMAGES)
def test_no_host_is_named_but_the_base_images(image: str) -> None:
    assert set(re.findall(r"[\w.-]+\.(?:io|com|org|net)\b(?!\.)", dockerfile(image))) <= {"docker.io"}


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_is_there_and_in_the_build_context(image: str) -> None:
    copied = re.findall(r"^COPY (?!--from)(\S+) ", dockerfile(image), re.MULTILINE)
    taken = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source in copied:
        assert list(ROOT.glob(source)), source
        assert source in taken, source


def test_torch_is_a_layer_of_its_own_and_nothing_is_lost() -> None:
    path = ROOT / "training" / "requirements.lock"
    torch, libraries = (
        subprocess.run(["awk", script, str(path)], capture_output=True, text=True, check=True).stdout
        for script in re.findall(r"awk '(.*?)'", dockerfile("training"))
    )
    assert sorted((torch + libraries).splitlines()) == sorted(path.read_text().splitlines())
    assert {"torch==", "triton="} <= {line[:7] for line in torch.splitlines()}
    assert not re.search("^(torch|nvidia-)", libraries, re.MULTILINE)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on PATH")
def test_make_images_calls_the_builder_for_each_image() -> None:
    command = ["make", "--silent", "images", "IMAGE_BUILD=echo", "IMAGE_REGISTRY=registry.example.com", "IMAGE_TAG=t"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    tags = [f"{image}/Dockerfile . registry.example.com/cowest/{image}:t" for image in IMAGES]
    assert done.stdout.splitlines() == tags, done.stderr
