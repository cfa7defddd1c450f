"""Text from a weak model on this machine: one left-padded batch, every row with its own seed and settings.

The weak-model server and the feedback step use it. The loop over tokens, the cache and the architectures are
`transformers.generate`'s; what it lacks is here: a seed, a temperature, stop strings and an end for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cowest_serving.contract import Messages, message_text
from cowest_serving.loadable import refuse_unfit, unloadable
from cowest_serving.logs import is_json
from cowest_serving.model_files import (
    base_of_adapter,
    check_model_folder,
    has_tokenizer,
    is_adapter,
    model_digest,
    refuse_ids_beyond,
)

FinishReason = Literal["stop", "length", "cancelled"]
GREEDY_BELOW = 1e-5  # temperatures under it divide by nearly nothing
_HALF_CHARACTER = "\ufffd"  # what a tokenizer shows for bytes that are not yet a whole character


class PromptError(ValueError):
    """A prompt that this model cannot be asked: too long, empty, or refused by its chat template."""


@dataclass(frozen=True)
class Ask:
    """One row of a batch."""

    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float
    seed: int
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no logprobs; 0: of the written tokens alone; n: and of the n likeliest


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the model's own probabilities, before temperature and top_p."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one more token of a row added. `text` is empty while a character or a possible stop string is incomplete."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Generation:
    """A finished row. `token_ids` holds no end-of-sequence token; `text` ends before the stop string."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None


# Called with (row, piece) after every token of a row; `False` gives the row up.
OnToken = Callable[[int, Piece], bool | None]


# ---------------------------------------------------------------- prompts
def render_prompt(tokenizer: Any, messages: Messages) -> str:
    """What the model reads: its chat template with the generation prompt, else the contents joined by blank lines.

    A model that can think aloud is told not to: a draft would be the beginning of its thoughts.
    """
    plain = [{**message, "content": message_text(message)} for message in messages]
    if not tokenizer.chat_template:
        return "\n\n".join(message["content"] for message in plain) + "\n"
    options = {"enable_thinking": False} if "enable_thinking" in str(tokenizer.chat_template) else {}
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **options))
    except Exception as error:  # a template is a program of the model's maker: it may raise anything
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error


def prompt_ids(tokenizer: Any, text: str, *, special_tokens: bool | None = None) -> list[int]:
    """Token ids of a rendered prompt. Special tokens are added only where no chat template has written them already.

    An end-of-sequence token that the tokenizer puts after every text is dropped: the answer comes behind the prompt.
    """
    add = not tokenizer.chat_template if special_tokens is None else special_tokens
    ids = list(tokenizer(text, add_special_tokens=add)["input_ids"])
    if add and ids and ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id != tokenizer.bos_token_id:
        ids.pop()
    if not ids:
        ids = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    if not ids:
        raise PromptError("wanted a prompt with at least one token, saw an empty one; write something in it")
    return ids


# ---------------------------------------------------------------- the model
class Generator:
    """A loaded causal LM. Not thread-safe: use it from one thread."""

    def __init__(self, model: Any, tokenizer: Any, digest: str) -> None:
        from transformers import GenerationConfig

        self.model = model.eval()
        self.tokenizer = tokenizer
        self.digest = digest
        config = model.config.get_text_config()
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.eos_ids = (
            _ids(model.generation_config.eos_token_id) | _ids(config.eos_token_id) | _ids(tokenizer.eos_token_id)
        )
        # `generate` would fill in the folder's own defaults (top_k, repetition_penalty, ...): a draft is a sample of
        # the model itself, changed by nothing but what the caller asked for.
        model.generation_config = GenerationConfig()

    @classmethod
    def load(cls, folder: str | Path, device: str = "auto", threads: int | None = None) -> Generator:
        """A model folder, or a LoRA adapter merged into its base. Raises `ModelFolderError`."""
        folder = Path(folder)
        check_model_folder(folder)
        if threads is not None:
            torch.set_num_threads(threads)
        where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        # Half precision is slow and coarse on CPUs; a GPU keeps what the weights were saved in.
        tokenizer, model = load_model(folder, torch.float32 if where == "cpu" else "auto")
        return cls(model.to(where), tokenizer, model_digest(folder))

    def generate(
        self,
        prompts: Sequence[Messages | str],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        on_token: OnToken | None = None,
    ) -> list[Generation]:
        """One answer a prompt (messages, or text that is rendered already), in order. Raises `PromptError`.

        The same batch, seeds and threads give the same text; temperature 0 takes the likeliest token. Another batch may
        round differently in the last bits, so keep batches fixed where runs are compared.
        """
        asks = [
            Ask(self.encode(prompt), max_tokens, temperature, seed, top_p, tuple(stop), 0 if logprobs else None)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self.run(asks, on_token)

    def encode(self, prompt: Messages | str) -> list[int]:
        text = prompt if isinstance(prompt, str) else render_prompt(self.tokenizer, prompt)
        return prompt_ids(self.tokenizer, text)

    def room(self, ids: Sequence[int]) -> int | None:
        """Tokens that may follow the prompt `ids`; None without a limit. Raises `PromptError` when none can."""
        if ids and not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise PromptError(f"wanted token ids from 0 to {self.vocabulary - 1}, saw {min(ids)} to {max(ids)}")
        if not ids:
            raise PromptError("wanted a prompt with at least one token, saw none")
        if self.context is None:
            return None
        if len(ids) >= self.context:
            raise PromptError(
                f"the model's context is {self.context} tokens, saw a prompt of {len(ids)}; "
                "shorten it to leave room for an answer"
            )
        return self.context - len(ids)

    def run(
        self, asks: Sequence[Ask], on_token: OnToken | None = None, *, watched: Sequence[bool] | None = None
    ) -> list[Generation]:
        """Answer a batch whose rows may differ in every setting. Raises `PromptError` before anything is computed.

        `watched`: the rows whose pieces need their text (default: all, when there is an `on_token`); decoding token by
        token is not free.
        """
        if not asks:
            return []
        watched = watched or [on_token is not None] * len(asks)
        limits = [min(ask.max_tokens, self.room(ask.prompt_ids) or ask.max_tokens) for ask in asks]
        rows = [
            _Row(ask, limit, self.tokenizer, is_watched)
            for ask, limit, is_watched in zip(asks, limits, watched, strict=True)
        ]
        sampler = _Sampler(rows, self.eos_ids, on_token)
        self._generate([ask.prompt_ids for ask in asks], max(limits), sampler)
        return [row.result() for row in rows]

    def _generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampler: _Sampler) -> None:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id or 0  # masked, so its value never matters
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([sampler.finished]),
            )


def _ids(value: int | Sequence[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def quiet_transformers() -> None:
    """No progress bars between our own lines; with JSON lines its words go the way of all."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if is_json():
        logging.disable_default_handler()
        logging.enable_propagation()


def load_model(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """(tokenizer, causal LM) of a model folder, an adapter merged into its base. Raises `ModelFolderError`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    adapter = is_adapter(folder)
    base = base_of_adapter(folder) if adapter else folder
    safe = {"trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer(folder) else base, **safe)
        # What does not fit is refused below, by its name.
        model, info = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True, **safe
        )
    except Exception as error:  # whatever the library makes of a broken folder
        raise unloadable(base, error) from error
    refuse_unfit(base, type(model).__name__, info)
    if adapter:
        try:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
        except Exception as error:
            raise unloadable(base, error) from error
    refuse_ids_beyond(folder, tokenizer.get_vocab(), model.get_input_embeddings().num_embeddings)
    return tokenizer, model


# ---------------------------------------------------------------- one batch
@dataclass
class _Row:
    """What a row has written so far."""

    ask: Ask
    limit: int
    tokenizer: Any
    watched: bool
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    text: str = ""  # of whole characters only; kept while stop strings or a listener need it
    handed_text: int = 0  # characters that went out as pieces
    handed_logprobs: int = 0
    anchor: int = 0  # token from which decoding starts: a token's text may depend on the one before
    read: int = 0  # tokens that are in `text`

    def take(self, token: int, logprob: TokenLogprob | None, eos_ids: frozenset[int]) -> None:
        if token in eos_ids:
            self._finish("stop")
            return
        self.tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        full = len(self.tokens) >= self.limit
        if self._reads:
            self._read(last=full)
            if self.finish_reason is None:
                self._cut_at_stop()
        if full and self.finish_reason is None:
            self.finish_reason = "length"

    @property
    def _reads(self) -> bool:
        return self.watched or bool(self.ask.stop)

    def _finish(self, reason: FinishReason) -> None:
        if self._reads:
            self._read(last=True)
            self._cut_at_stop()
        self.finish_reason = reason

    def _read(self, *, last: bool) -> None:
        before = self._decoded(self.tokens[self.anchor : self.read])
        now = self._decoded(self.tokens[self.anchor :])
        if last or (len(now) > len(before) and not now.endswith(_HALF_CHARACTER)):
            self.text += now[len(before) :]
            self.anchor, self.read = self.read, len(self.tokens)

    def _cut_at_stop(self) -> None:
        places = [place for stop in self.ask.stop if (place := self.text.find(stop, self._stop_from(stop))) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.finish_reason = "stop"

    def _stop_from(self, stop: str) -> int:
        """What went out held no stop string, nor its beginning."""
        return max(0, self.handed_text - len(stop))

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def piece(self) -> Piece:
        """What is new and safe to hand out: not the beginning of what may become a stop string."""
        if not self.watched:
            return Piece("", (), self.finish_reason)
        end = len(self.text) if self.finish_reason else len(self.text) - _held_back(self.text, self.ask.stop)
        text = self.text[self.handed_text : max(end, self.handed_text)]
        logprobs = tuple(self.logprobs[self.handed_logprobs :]) if text or self.finish_reason else ()
        self.handed_text += len(text)
        self.handed_logprobs += len(logprobs)
        return Piece(text, logprobs, self.finish_reason)

    def result(self) -> Generation:
        return Generation(
            text=self.text if self._reads else self._decoded(self.tokens),
            token_ids=tuple(self.tokens),
            finish_reason=self.finish_reason or "length",
            prompt_tokens=len(self.ask.prompt_ids),
            logprobs=tuple(self.logprobs) if self.ask.top_logprobs is not None else None,
        )


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    lengths = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)


class _Sampler:
    """The logits processor and the stopping criterion of one `generate`: draws every row's token from its own seed.

    A token is drawn by inverting the cumulative distribution at a number fixed by (seed, position), so a row does not
    depend on its neighbours' settings.
    """

    def __init__(self, rows: Sequence[_Row], eos_ids: frozenset[int], on_token: OnToken | None) -> None:
        self.rows = rows
        self.eos_ids = eos_ids
        self.on_token = on_token
        self.step = 0
        self.temperatures = torch.tensor([[row.ask.temperature] for row in rows], dtype=torch.float64)
        self.greedy = self.temperatures < GREEDY_BELOW
        self.temperatures[self.greedy] = 1.0
        self.top_p = torch.tensor([[row.ask.top_p] for row in rows], dtype=torch.float64)
        self.uniforms = _uniforms(rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores that leave one token a row possible. `scores` is (rows, vocabulary)."""
        chosen = self._choose(scores)
        self._record(chosen.tolist(), scores)
        self.step += 1
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter_(1, chosen[:, None], 0.0)

    def finished(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([row.finish_reason is not None for row in self.rows], device=input_ids.device)

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        if bool(torch.isnan(scores).any()):
            raise FloatingPointError("the model computed NaN instead of scores; its weights are broken, serve another")
        likeliest = scores.argmax(dim=-1)
        if bool(self.greedy.all()):
            return likeliest
        device = scores.device
        probabilities = torch.softmax(scores.double() / self.temperatures.to(device), dim=-1)
        if bool((self.top_p < 1).any()):
            probabilities = _nucleus(probabilities, self.top_p.to(device))
        cumulative = probabilities.cumsum(dim=-1)
        at = self.uniforms[:, min(self.step, self.uniforms.shape[1] - 1)].to(device)[:, None] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.shape[1] - 1)[:, 0]
        return torch.where(self.greedy[:, 0].to(device), likeliest, drawn)

    def _record(self, chosen: Sequence[int], scores: torch.Tensor) -> None:
        for index, (row, token) in enumerate(zip(self.rows, chosen, strict=True)):
            if row.finish_reason is not None:
                continue
            row.take(token, _logprob(row.ask, token, scores[index]), self.eos_ids)
            if self.on_token and self.on_token(index, row.piece()) is False and row.finish_reason is None:
                row.finish_reason = "cancelled"


def _uniforms(rows: Sequence[_Row]) -> torch.Tensor:
    """(rows, steps) numbers in [0, 1), each row's from its own seed. On the CPU: the same on every device."""
    drawn = torch.zeros(len(rows), max(row.limit for row in rows), dtype=torch.float64)
    for index, row in enumerate(rows):
        source = torch.Generator().manual_seed(row.ask.seed & (2**63 - 1))
        drawn[index, : row.limit] = torch.rand(row.limit, generator=source, dtype=torch.float64)
    return drawn


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep each row's likeliest tokens until their sum reaches top_p; the token that reaches it is kept."""
    ordered, places = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    before[:, 0] = -1.0  # the likeliest is always kept
    kept = torch.where((before < top_p) | (top_p >= 1), ordered, 0.0)
    return torch.zeros_like(probabilities).scatter_(1, places, kept)


def _logprob(ask: Ask, token: int, scores: torch.Tensor) -> TokenLogprob | None:
    if ask.top_logprobs is None:
        return None
    logprobs = torch.log_softmax(scores.double(), dim=-1)
    values, ids = logprobs.topk(min(ask.top_logprobs, len(logprobs)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
