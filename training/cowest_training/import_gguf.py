"""Turn a GGUF file into a model folder that can be tuned: weights as floats, tokenizer with its chat template.

    python -m cowest_training.import_gguf --gguf model.Q4_1.gguf --out models/base

What quantisation took away does not come back. Needs the package `gguf`, and an architecture that transformers reads.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cowest_serving.cores import free_threads
from cowest_serving.generate import prompt_ids, render_prompt
from cowest_serving.model_files import check_model_folder, make_readable, model_digest
from cowest_training import tuning
from cowest_training.contract import EXIT_OK, StepError
from cowest_training.steps import run

GGUF_MAGIC = b"GGUF"
PROBE = "What is the capital of France?"


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--gguf", required=True, type=Path, metavar="FILE")
    flags.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="must not exist")
    flags.add_argument("--probe", default=PROBE, metavar="TEXT", help="asked once, to see whether the model speaks")
    args = flags.parse_args(argv)
    tuning.quiet()
    torch.set_num_threads(free_threads())
    digest = import_gguf(args.gguf, args.out)
    sys.stdout.write(f"{digest}\n{args.probe}\n{answer(args.out, args.probe)}\n")
    return EXIT_OK


def import_gguf(gguf: Path, out: Path) -> str:
    """Write the folder `out` (whole or not at all) and return the model's digest."""
    if not gguf.is_file() or gguf.open("rb").read(4) != GGUF_MAGIC:
        raise StepError(f"wanted a GGUF file, saw none at {gguf}; check the path")
    if out.exists():
        raise StepError(f"wanted a folder that is not there yet, saw {out}; remove it or name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / "model"
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The weights are plain floats now: a reader must not look for a quantiser.
        del model.config.quantization_config
        model.config._name_or_path = ""  # the GGUF file names what it was made of, which is no address
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        make_readable(folder)
        check_model_folder(folder)
        shutil.move(folder, out)
    return model_digest(out)


@torch.no_grad()
def answer(folder: Path, question: str) -> str:
    """What the imported model says, greedily, loaded from its new folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = tuning.load_merged(folder, torch.float32)
    text = render_prompt(tokenizer, [{"role": "user", "content": question}])
    ids = torch.tensor([prompt_ids(tokenizer, text)])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


if __name__ == "__main__":
    run(main)
