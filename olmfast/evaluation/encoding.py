"""Conversations -> token ids -> batches: what exactly a model is shown and which tokens are scored."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from olmfast.config.datasets import DatasetConfig
from olmfast.errors import InputError, show, told
from olmfast.evaluation.conversations import conversations_of, subjects_of
from olmfast.evaluation.items import Conversation
from olmfast.evaluation.metrics import CHOICES, GENERATIVE
from olmfast.evaluation.mmlu import is_mmlu_file, worked_examples
from olmfast.evaluation.rendering import rendered, silenced

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What a template that asks for the date is told, so that a score does not depend on the day: Llama 3.2's own, where it
# has no clock. A macro in front of the template hides the clock that Transformers gives it.
CLOCK, TODAY = "strftime_now", datetime(2024, 7, 26)
NO_CLOCK = (
    f"{{%- macro {CLOCK}(format) -%}}{{{{ format"
    + "".join(f" | replace('%{part}', '{TODAY.strftime(f'%{part}')}')" for part in "aAbBdeFHIjmMpSTyY")
    + " }}{%- endmacro -%}"
)
REFUSED = "refused by the chat template"
THINK = "<think>"
NO_THINKING = f"{THINK}\n\n</think>\n\n"


@dataclass(frozen=True)
class Sample:
    """One question as token ids. `response` is empty where no answer is expected; `options` holds one token id per
    letter of a multiple choice; `number` says which item of its file it was."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    options: tuple[int, ...] = ()
    number: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Dataset:
    """A dataset ready to be scored. `reasons` counts the samples that are left out, by why."""

    name: str
    config: DatasetConfig
    samples: tuple[Sample, ...]
    reasons: Mapping[str, int]
    digest: str

    @property
    def left_out(self) -> int:
        """How many samples are not scored."""
        return sum(self.reasons.values())


def load_datasets(
    folder: Path, entries: Mapping[str, DatasetConfig], tokenizer: Any, context: int
) -> dict[str, Dataset]:
    """Read, tokenise and check the datasets of a config; `context` is the model's longest input in tokens.

    Raises InputError naming the dataset when a file is unusable or no sample fits the context.
    """
    return {name: _load(entry.path(folder, name), name, entry, tokenizer, context) for name, entry in entries.items()}


def _load(path: Path, name: str, config: DatasetConfig, tokenizer: Any, context: int) -> Dataset:
    conversations, reasons = conversations_of(path, config)
    is_task = config.lm_eval is not None
    is_folder = path.is_dir() and not is_task
    is_mmlu = not is_task and (is_folder or (not config.fields and is_mmlu_file(path)))
    where = f"lm_eval: {config.lm_eval}" if is_task else str(path)
    encode = Encoder(tokenizer, config, raw_by_default=is_mmlu or is_task, where=where)
    encoded = encode.all(conversations, reasons)
    generates = config.mode in GENERATIVE
    fitting = [s for s in encoded if len(s.prompt) + (1 if generates else len(s.response)) <= context]
    if is_task:
        files = []
    elif is_folder:
        files = [file for subject in subjects_of(path, config) for file in subject.files]
    else:
        files = [path, *(worked_examples(path) if is_mmlu else [])]
    if not fitting:
        opened = f", opened by the worked examples of {files[1]}," if len(files) > 1 and not is_folder else ""
        advice = "; fewer worked examples (shots, --ntrain) make them shorter" if is_mmlu else ""
        raise InputError(
            f"{where}: every sample{opened} is longer than the model's context of {context} tokens, by its config.json"
            f"{advice}"
        )
    # What a task asks is made by its code and by the package: the questions themselves tell.
    asked = repr([(c.messages, c.response, c.options) for c in conversations]).encode() if is_task else b""
    digest = xxhash.xxh3_128(b"".join([asked, *(file.read_bytes() for file in files)])).hexdigest()
    if len(fitting) < len(encoded):
        reasons[f"longer than {context} tokens"] = len(encoded) - len(fitting)
    if config.of_question and (short := sum(not sample.response for sample in fitting)):
        reasons["of one token"] = short
        fitting = [sample for sample in fitting if sample.response]
        if not fitting:
            raise InputError(f"{path}: every question is of one token, of which none is predicted")
    return Dataset(name, config, tuple(fitting), reasons, digest)


class _Refused(Exception):
    """Messages that a chat template does not take; says why."""


class Encoder:
    """Turns a conversation into prompt and response ids under one dataset's settings."""

    def __init__(self, tokenizer: Any, config: DatasetConfig, raw_by_default: bool, where: str) -> None:
        self.tokenizer, self.config, self.where = tokenizer, config, where
        self.template = config.template
        self.in_parts = False  # whether a message's content is a list of parts, as some templates want it
        if config.of_question:  # a text as it stands
            self.template = "raw"
        elif self.template == "auto":
            has_template = bool(getattr(tokenizer, "chat_template", None))
            self.template = "raw" if raw_by_default else ("tokenizer" if has_template else "chatml")
        elif self.template == "tokenizer" and not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{where}: template: the tokenizer has no chat template; use chatml or raw")
        self.own: str | None = None  # where the tokenizer's own template is not used as it stands
        if self.template == "tokenizer" and CLOCK in (own := tokenizer.get_chat_template()):
            self.own = NO_CLOCK + own

    def all(self, conversations: Sequence[Conversation], left_out: Counter[str] | None = None) -> list[Sample]:
        """The samples of conversations, without those that the chat template refuses, which `left_out` counts.

        Raises InputError naming the dataset, and the item on which the template fails, or if it refuses all.
        """
        if self.template == "tokenizer":
            texts = rendered(self._render, conversations, self.where)
        else:
            texts = [self._render(conversation) for conversation in conversations]
        refused = [told for told in texts if isinstance(told, str)]
        if refused and (len(refused) == len(texts) or left_out is None):
            number = next(at for at, told in enumerate(texts) if isinstance(told, str))
            raise InputError(f"{self.where}: item {conversations[number].number}: {refused[0]}")
        if refused and left_out is not None:
            left_out[REFUSED] += len(refused)
        with silenced():
            return [
                replace(self._sample(asked, parts), number=asked.number)
                for asked, parts in zip(conversations, texts, strict=True)
                if not isinstance(parts, str)
            ]

    def _sample(self, conversation: Conversation, texts: tuple[str, str, str]) -> Sample:
        """Prompt and response ids; the response is the answer's text, tokenised as it stands in the whole."""
        prompt, answer, end = texts
        if not conversation.messages:  # the text itself, all but its first token
            whole = self._ids(answer)
            return Sample(whole[:1], whole[1:])
        if not self.config.think:
            # Templates of some reasoning models open the thinking block themselves.
            opened = prompt.rstrip().endswith(THINK)
            prompt = (prompt.rstrip().removesuffix(THINK) if opened else prompt) + NO_THINKING
        prompt_ids = self._ids(prompt)
        if not prompt_ids:
            raise InputError(f"{self.where}: a question has no tokens")
        if conversation.options:
            return self._choice(prompt, prompt_ids, conversation)
        if not conversation.response:
            return Sample(prompt_ids, ())
        response = self._continuation(prompt, prompt_ids, answer)
        if self.config.include_eos and end:
            response = self._continuation(prompt, prompt_ids, answer + end)
        if not response:
            raise InputError(f"{self.where}: the response {show(answer)} has no tokens")
        return Sample(prompt_ids, response)

    def _choice(self, prompt: str, prompt_ids: tuple[int, ...], conversation: Conversation) -> Sample:
        """The options' letters as tokens: with a space before them after "Answer:", without one in a new turn.

        Where the tokenizer makes the space a token of its own, that token belongs to the prompt.
        """
        space = " " if self.template == "raw" else ""
        letters = conversation.options
        spelt = [self._continuation(prompt, prompt_ids, space + letter) for letter in letters]
        if space and len({ids[0] for ids in spelt}) == 1 and all(len(ids) == 2 for ids in spelt):
            prompt_ids, spelt = (*prompt_ids, spelt[0][0]), [ids[1:] for ids in spelt]
        options = tuple(ids[0] for ids in spelt)
        if len(set(options)) < len(options):
            raise InputError(f"{self.where}: the tokenizer gives two option letters the same first token")
        right = (options[letters.index(conversation.response)],)
        return Sample(prompt_ids, right, options if self.config.mode in CHOICES else ())

    def _render(self, conversation: Conversation) -> tuple[str, str, str] | str:
        """Prompt text, answer text as the template puts it, and the end-of-turn text that follows it; or why the
        template refuses the messages."""
        messages, answer = list(conversation.messages), conversation.response
        if self.template == "raw":
            return "\n\n".join(m["content"] for m in messages), answer, self.tokenizer.eos_token or ""
        if self.template == "chatml":
            return self._apply(messages, True, CHATML), answer, "<|im_end|>"
        try:
            prompt = self._asked(messages)
            whole = self._apply([*messages, {"role": "assistant", "content": answer}], False, None)
        except _Refused as refused:
            return str(refused)
        tail = whole[len(prompt) :] if whole.startswith(prompt) else ""
        for text in (answer, answer.strip()):
            if tail.startswith(text):
                return prompt, text, tail[len(text) :].rstrip()
        return prompt, answer, self.tokenizer.eos_token or ""

    def _asked(self, messages: list[dict[str, str]]) -> str:
        """The prompt of the tokenizer's template; one that leaves texts out is shown them as lists of parts.

        Raises InputError for a template that leaves the question out all the same.
        """
        for self.in_parts in (False, True):
            prompt = self._apply(messages, True, None)
            *before, last = messages
            other = [*before, {**last, "content": f"{last['content']} ?"}]
            if last["content"].strip() in prompt or self._apply(other, True, None) != prompt:
                return prompt
        raise InputError("the chat template leaves the question out; use template: chatml, or raw")

    def _apply(self, messages: list[dict[str, str]], generation: bool, template: str | None) -> str:
        from jinja2 import TemplateError

        try:
            return self._apply_once(messages, generation, template)
        except TemplateError as error:
            # Some templates (Gemma's) know no system role: its text then opens the first question.
            if messages[0]["role"] == "system" and len(messages) > 1:
                joined = f"{messages[0]['content']}\n\n{messages[1]['content']}"
                return self._apply(
                    [{"role": messages[1]["role"], "content": joined}, *messages[2:]], generation, template
                )
            raise _Refused(f"the chat template refuses it: {told(error)}") from error

    def _apply_once(self, messages: list[dict[str, str]], generation: bool, template: str | None) -> str:
        shown: list[Any] = messages
        if self.in_parts:
            shown = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
        text: str = self.tokenizer.apply_chat_template(
            shown,
            tokenize=False,
            add_generation_prompt=generation,
            chat_template=template or self.own,
        )
        return text

    def _ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that begins the input: special tokens once, by the template or the tokenizer."""
        plain = self._tokens(text, add_special_tokens=False)
        if self.template == "tokenizer":
            return plain
        special = self._tokens(text)
        # Keep what the tokenizer puts in front (BOS), not what it may append (EOS would end the prompt).
        start = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
        return special[: start + len(plain)] if plain else special

    def _continuation(self, prompt: str, prompt_ids: tuple[int, ...], text: str) -> tuple[int, ...]:
        """Ids of `text` after the prompt. A token that would straddle the joint is split at it."""
        whole = self._ids(prompt + text)
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        return self._tokens(text, add_special_tokens=False)

    def _tokens(self, text: str, **options: Any) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer(text, **options)["input_ids"])
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of the library's is no Exception
            raise InputError(f"{self.where}: the tokenizer cannot encode {show(text)}: {told(error)}") from error


def make_batches(lengths: Sequence[int], max_tokens: int, overhead: int | None = None) -> Iterator[list[int]]:
    """Indices in batches of similar length: at most `max_tokens` once padded, longest first, stable.

    A batch costs its tokens, padding included, and `overhead` (a 32nd of `max_tokens` unless given; where tokens are
    decoded one after another, whatever the batch, as much as all of them): of all ways to divide them in this order,
    theirs costs least. They depend on nothing else, so every candidate is scored in the same batches.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    begin = 0
    overhead = max_tokens // 32 if overhead is None else overhead
    for end in _cheapest_ends(tuple(lengths[index] for index in order), max_tokens, overhead):
        yield order[begin:end]
        begin = end


@functools.lru_cache(maxsize=16)
def _cheapest_ends(lengths: tuple[int, ...], max_tokens: int, overhead: int) -> tuple[int, ...]:
    """Where batches of descending lengths end, by dynamic programming from the last one on."""
    n = len(lengths)
    least, ends = np.zeros(n + 1, dtype=np.int64), [n] * n
    for begin in range(n - 1, -1, -1):
        longest = lengths[begin]
        most = max(1, min(n - begin, max_tokens // max(longest, 1)))
        costs = longest * np.arange(1, most + 1) + overhead + least[begin + 1 : begin + most + 1]
        best = int(costs.argmin())
        least[begin], ends[begin] = costs[best], begin + 1 + best
    found, begin = [], 0
    while begin < n:
        begin = ends[begin]
        found.append(begin)
    return tuple(found)
