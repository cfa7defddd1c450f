"""DPO in TRL with what the two drafts of a pair have in common computed once.

`DPOTrainer` runs prompt + chosen and prompt + rejected as two rows, pads all rows to the longest, runs every layer in
every epoch and, off GPUs, projects each position onto the vocabulary. Here

    one row a pair    [prompt | chosen | last prompt token | rejected], where the second part does not see the first
    few paddings      rows of a batch are run in groups of like length
    the answers       alone are projected, by TRL's own chunked kernel
    frozen layers     below the lowest one that is tuned run once a pair; what comes out of them is kept on disk

Loss, metrics and the reference are TRL's own: only what `model(..., fused_lm_head=True)` gives is made in another way.
A batch with a longer sequence or row than any before is computed both ways. Once they differ (an attention that goes by
something else than mask and positions) TRL's own way is kept, and said, for all that is longer than what was the same.
It is kept, too, for sequences that exceed the window of sliding or chunked attention: the row's mask would take the
place of the window's. In place of a `DPOTrainer` of TRL 1.16:

    trainer = SharedPromptDPOTrainer(model=model, args=DPOConfig(precompute_ref_log_probs=True, ...), ...)
    trainer.train()

The last token of the prompt stands in a row twice, since it predicts the first token of both drafts.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from trl import DPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

log = logging.getLogger(__name__)
OUTPUTS = ("entropy", "mean_logits", "is_top1")  # that TRL's metrics want beside the log-probabilities
VOCABULARY_AT_ONCE = 16384
TOKENS_AT_ONCE = 8192  # of one group of rows
MOST_PADDING = 0.1  # share of a group
WINDOWS = ("sliding_window", "attention_chunk_size")  # in a configuration: how many tokens a layer sees at most
TOLERANCE = 1e-3  # of a log-probability, in nats: float32 sums in another order
IGNORED = -100


class SharedPromptDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """`DPOTrainer` whose passes, those for the reference too, run the two drafts of a pair in one row."""

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        with self.sharing():
            return super()._precompute_ref_logps(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.sharing():
            return super().train(*args, **kwargs)

    @contextmanager
    def sharing(self) -> Iterator[Shared]:
        """While it lasts the model's forward for losses is the shared one."""
        inner = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        theirs = inner.forward
        if not hasattr(self, "shared"):
            self.shared = Shared(inner, theirs)
        # A bound method of the model, as those who wrap it want.
        inner.forward = types.MethodType(lambda _, *args, **kwargs: self.shared.forward(*args, **kwargs), inner)
        try:
            yield self.shared
        finally:
            inner.forward = theirs


# ---------------------------------------------------------------- rows
@dataclass(frozen=True)
class Row:
    """A pair as one sequence of S tokens."""

    ids: Tensor  # (S,)
    positions: Tensor  # (S,)
    prompt: int  # tokens
    chosen: int
    rejected: int

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def sequence(self) -> int:
        """Tokens of the prompt and the longer draft."""
        return self.prompt + max(self.chosen, self.rejected)

    def scored(self) -> tuple[Tensor, Tensor]:
        """Indices in the row that predict the tokens of chosen and of rejected."""
        first, second = self.prompt - 1, self.prompt + self.chosen
        return torch.arange(first, first + self.chosen), torch.arange(second, second + self.rejected)

    def may_see(self) -> Tensor:
        """(S, S) bool: which token sees which."""
        border = self.prompt + self.chosen
        seen = torch.ones(self.size, self.size, dtype=torch.bool).tril()
        seen[border:, self.prompt - 1 : border] = False
        return seen


def row_of(chosen: Tensor, rejected: Tensor, prompt: int) -> Row:
    """Of (prompt + chosen) and (prompt + rejected), ids without padding. The prompts are equal and not empty."""
    ids = torch.cat((chosen, rejected[prompt - 1 :]))
    positions = torch.cat((torch.arange(len(chosen)), torch.arange(prompt - 1, len(rejected))))
    return Row(ids, positions.to(ids.device), prompt, len(chosen) - prompt, len(rejected) - prompt)


def rows_of(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[Row] | None:
    """Of a batch as TRL pads it, chosen ones first; None where two prompts of a pair differ."""
    pairs, found = len(input_ids) // 2, []
    for i in range(pairs):
        (one, prompt), (other, same) = (_unpadded(input_ids[j], attention_mask[j], labels[j]) for j in (i, i + pairs))
        if prompt != same or prompt < 1 or not torch.equal(one[:prompt], other[:prompt]):
            return None
        found.append(row_of(one, other, prompt))
    return found


def _unpadded(ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """The tokens of a sequence, and how many of them are the prompt's."""
    length = int(mask.sum())
    scored = (labels[:length] != IGNORED).nonzero()
    return ids[:length], int(scored[0]) if len(scored) else 0


def groups_of(sizes: Sequence[int]) -> list[list[int]]:
    """Rows that are run together: little padding, not too many tokens."""
    found: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if found:
            longest = sizes[found[-1][0]]
            tokens = sum(sizes[j] for j in found[-1]) + sizes[i]
            area = longest * (len(found[-1]) + 1)
            if area <= TOKENS_AT_ONCE and 1 - tokens / area <= MOST_PADDING:
                found[-1].append(i)
                continue
        found.append([i])
    return found


# ---------------------------------------------------------------- frozen layers
@dataclass
class Kept:
    """Outputs of the frozen layers by content, in a file without a name: more than memory has room for."""

    hits: int = 0
    _file: Any = field(default_factory=lambda: tempfile.TemporaryFile(buffering=0))  # noqa: SIM115  # closed with the object
    _places: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    _end: int = 0

    def put(self, key: str, value: Tensor) -> None:
        data = value.detach().cpu().contiguous().view(torch.uint8).numpy().data
        os.pwrite(self._file.fileno(), data, self._end)
        self._places[key] = self._end, tuple(value.shape), value.dtype
        self._end += data.nbytes

    def get(self, key: str) -> Tensor | None:
        if key not in self._places:
            return None
        at, shape, dtype = self._places[key]
        value = torch.empty(shape, dtype=dtype)
        os.preadv(self._file.fileno(), [value.view(torch.uint8).numpy().data], at)
        self.hits += 1
        return value


def frozen_layers(backbone: nn.Module) -> int:
    """How many of the lowest layers give the same in each epoch, as does all below them; 0 where that is unknown."""
    layers, below = getattr(backbone, "layers", None), ("embed_tokens", "rotary_emb")
    if not isinstance(layers, nn.ModuleList) or not isinstance(getattr(backbone, "norm", None), nn.Module):
        return 0
    if any(name not in (*below, "layers", "norm") for name, _ in backbone.named_children()):
        return 0
    if any(_changes(getattr(backbone, name)) for name in below if hasattr(backbone, name)):
        return 0
    return next((i for i, layer in enumerate(layers) if _changes(layer)), len(layers))


def _changes(module: nn.Module) -> bool:
    has_chance = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
    return has_chance or any(weight.requires_grad for weight in module.parameters())


@contextmanager
def _only(backbone: Any, layers: Sequence[nn.Module], norm: nn.Module) -> Iterator[None]:
    kept = backbone.layers, backbone.norm
    backbone.layers, backbone.norm = nn.ModuleList(layers), norm
    try:
        yield
    finally:
        backbone.layers, backbone.norm = kept


# ---------------------------------------------------------------- the model
def window_of(config: Any) -> float:
    """The longest sequence of which each layer sees all, as far as a model's configuration says."""
    found = (getattr(config.get_text_config(), name, None) for name in WINDOWS)
    return min((size for size in found if isinstance(size, int) and size > 0), default=math.inf)


class Shared:
    """Stands in for a model's `forward`. Calls without `fused_lm_head` are the model's own."""

    def __init__(self, model: Any, theirs: Any) -> None:
        self._model, self._theirs, self.kept = model, theirs, Kept()
        self.checked = (0, 0)  # the longest sequence and the longest row for which both ways were seen to give the same
        self.differs = False  # beyond these
        self._window = window_of(model.config)
        self._frozen = frozen_layers(model.base_model)  # now: what runs without its adapters shows none that is tuned

    def forward(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return self._theirs(*args, **kwargs)
        rows = None
        never = self.differs and not any(self.checked)  # as in bfloat16: reading the batch would only hold up a GPU
        if not never and set(kwargs) <= {"input_ids", "attention_mask", "labels", "use_cache"}:
            rows = rows_of(kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"])
        if rows is None or not self._may_share(rows, kwargs):
            return self._theirs(*args, fused_lm_head=True, **kwargs)
        return self._scored(rows, kwargs["labels"])

    def _may_share(self, rows: Sequence[Row], kwargs: dict[str, Any]) -> bool:
        """Not where it might differ: the reference, perhaps from TRL's cache, and the policy are made either way."""
        sequence, row = max(row.sequence for row in rows), max(row.size for row in rows)
        if sequence > self._window:
            return False
        if sequence <= self.checked[0] and row <= self.checked[1]:
            return True
        if self.differs:
            return False
        if self._is_the_same(rows, kwargs):
            self.checked = max(sequence, self.checked[0]), max(row, self.checked[1])
            return True
        self.differs = True
        log.warning(
            "This model gives something else for two drafts in a row of %d tokens: TRL's own way is kept for sequences "
            "of more than %d tokens and rows of more than %d.", row, *self.checked
        )  # fmt: skip
        return False

    @torch.no_grad()
    def _is_the_same(self, rows: Sequence[Row], kwargs: dict[str, Any]) -> bool:
        """Twice, since the second time what is kept of frozen layers is used."""
        wanted = self._theirs(fused_lm_head=True, **kwargs).log_probs
        try:
            seen = [self._scored(rows, kwargs["labels"]).log_probs for _ in range(2)]
        except (TypeError, ValueError, RuntimeError) as error:  # it takes no positions, or no such mask
            log.warning("Two drafts in a row: %s", error)
            return False
        close = max(float((each - wanted).abs().max()) for each in seen) <= TOLERANCE
        if not close and self._frozen:
            # Perhaps the layers above want more than what comes out of those below.
            frozen, self._frozen = self._frozen, 0
            close = self._is_the_same(rows, kwargs)
            self._frozen = 0 if close else frozen
        return close

    def _scored(self, rows: Sequence[Row], labels: Tensor) -> FusedCausalLMOutput:
        """Per-token fields of (2 pairs, length - 1), as TRL's own."""
        head, pairs = self._model.get_output_embeddings(), len(rows)
        found: dict[str, Tensor] = {}
        for group in groups_of([row.size for row in rows]):
            batch = [rows[i] for i in group]
            hidden = self._hidden(batch)
            places, sources, targets = [], [], []
            for n, (i, row) in enumerate(zip(group, batch, strict=True)):
                for line, index, length in zip((i, i + pairs), row.scored(), (row.chosen, row.rejected), strict=True):
                    sources.append(index.to(hidden.device) + n * hidden.shape[1])
                    places.append(line * (labels.shape[1] - 1) + torch.arange(row.prompt - 1, row.prompt - 1 + length))
                    targets.append(labels[line, row.prompt : row.prompt + length])
            picked = hidden.flatten(0, 1)[torch.cat(sources)]
            logps, entropy, _, mean, top = ChunkedLogProbFunction.apply(
                picked, head.weight, head.bias, torch.cat(targets), 1.0, VOCABULARY_AT_ONCE, None, 1.0, OUTPUTS
            )
            at = torch.cat(places).to(hidden.device)
            for name, value in (("log_probs", logps), ("entropy", entropy), ("mean_logits", mean), ("is_top1", top)):
                empty = value.new_zeros(2 * pairs * (labels.shape[1] - 1))
                found[name] = found.get(name, empty).index_put((at,), value)
        shape = (2 * pairs, labels.shape[1] - 1)
        mask = labels[:, 1:] != IGNORED
        logps = found["log_probs"].view(shape)
        rest = {name: found[name].view(shape) for name in OUTPUTS}
        return FusedCausalLMOutput(
            loss=-logps.sum() / mask.sum().clamp(min=1), log_probs=logps, label_mask=mask, **rest
        )

    # ------------------------------------------------------------ layers
    def _hidden(self, rows: Sequence[Row]) -> Tensor:
        """(rows, longest, width) out of the last layer."""
        backbone = self._model.base_model
        if not self._frozen:
            return self._run(backbone, rows, input_ids=_padded([row.ids for row in rows]))
        below = _padded([self._below(backbone, row) for row in rows]).to(rows[0].ids.device)
        with _only(backbone, backbone.layers[self._frozen :], backbone.norm):
            return self._run(backbone, rows, inputs_embeds=below)

    @torch.no_grad()
    def _below(self, backbone: Any, row: Row) -> Tensor:
        """(S, width) out of the frozen layers."""
        key = hashlib.blake2b(
            row.ids.cpu().numpy().tobytes() + bytes(f"{row.prompt},{row.chosen}", "ascii")
        ).hexdigest()
        known = self.kept.get(key)
        if known is None:
            with _only(backbone, backbone.layers[: self._frozen], nn.Identity()):
                known = self._run(backbone, [row], input_ids=row.ids[None])[0]
            self.kept.put(key, known)
        return known

    def _run(self, backbone: Any, rows: Sequence[Row], **inputs: Tensor) -> Tensor:
        longest, device = max(row.size for row in rows), rows[0].ids.device
        seen = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no row of nothing
        for n, row in enumerate(rows):
            seen[n, : row.size, : row.size] = row.may_see()
        dtype = next(iter(self._model.parameters())).dtype
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None].to(device)
        positions = _padded([row.positions for row in rows])
        out = backbone(attention_mask=mask, position_ids=positions, use_cache=False, **inputs)
        hidden: Tensor = out.last_hidden_state
        return hidden


def _padded(values: Sequence[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True)
