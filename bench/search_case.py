"""The search that the benchmarks time: a pool of random fine-tunes of one random ancestor, and two datasets.

The ancestor is a Llama whose weights are wide enough that candidates score differently; each donor differs from it by
1 to 2 % of each tensor's spread. Answers are the ancestor's own greedy text with some tokens replaced, so that every
donor is right at many positions and wrong at others. Words are tokens: the tokenizer splits at spaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmfast.config import RunConfig, parse_config
from olmfast.driver import Session
from olmfast.evaluation.scorer import Candidate
from olmfast.inputs import Inputs
from olmfast.run_folder import RunFolder
from olmfast.search import evolve
from olmfast.search.stage import Observer
from olmfast.search.swap import swap
from olmfast.testing import CHATML, SPECIAL
from olmfast.weights.architecture import Unit
from olmfast.weights.offspring import Parent
from olmfast.weights.recipe import Copy

WORDS = 8000  # size of the vocabulary
ANSWER = 20  # tokens
BLOCKS = (0, 5, 11)  # spread evenly over the depth
PER_UNIT = 6  # offspring that are scored together
MODULES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")  # refined in the blocks at hand, in turn


@dataclass(frozen=True)
class Case:
    """Donors and datasets in one folder."""

    folder: Path
    donors: tuple[str, ...]

    def config(self, samples: int, output: str = "out", **keys: Any) -> RunConfig:
        """The config of a run over this pool, on `samples` questions of each dataset."""
        data = {
            "models_dir": "models",
            "output_dir": output,
            "models": list(self.donors),
            "dataset": {"free.json": {"mode": "exact_match"}, "forced.json": {"mode": "bigram_loss"}},
            "samples": samples,
            "device": "cpu",
            "dtype": "float32",
            **keys,
        }
        return parse_config(data, where="bench", folder=self.folder)

    @property
    def folders(self) -> dict[str, Path]:
        """Donor -> its folder."""
        return {name: self.folder / "models" / name for name in self.donors}


@contextmanager
def session(config: RunConfig) -> Iterator[Session]:
    """The engine, ready to walk; nothing is left of an earlier run."""
    inputs = Inputs.open(config, Observer())
    with RunFolder(config.output_dir, resume=False, overwrite=True).locked(inputs.header(), inputs.pool) as report:
        yield Session(config, inputs, report, Observer(), lambda: False)


def modules_in(blocks: Sequence[int]) -> dict[int, str]:
    """Block -> the name of the module in it that is swapped alone and refined."""
    return {block: f"model.layers.{block}.{MODULES[i % len(MODULES)]}" for i, block in enumerate(blocks)}


def module_unit(block: int, name: str) -> Unit:
    """The unit of one matrix."""
    return Unit(name, "module", (f"{name}.weight",), (block,))


def walk(engine: Session, blocks: Sequence[int], refined: Sequence[int]) -> None:
    """The base; the blocks as donors have them; then one module in each of `refined`, swapped and refined."""
    search = engine.search
    engine._choose_base()
    for block in blocks:
        swap(search, "layers", search.architecture.window_unit(search.tensors, [block]))
    for block, name in modules_in(refined).items():
        swap(search, "tensors", module_unit(block, name))
        evolve.refine(search, module_unit(block, name))


def candidates_of(kind: str, engine, block: int) -> tuple[Unit, list[Candidate]]:
    """What a search would score together in a block: every donor's values, or offspring of its module."""
    search = engine.search
    unit = module_unit(block, modules_in(BLOCKS)[block])
    if kind == "block":
        unit = search.architecture.window_unit(search.tensors, [block])
    if kind in ("block", "unit"):
        donors = [name for name in search.donors if name != search.model.recipe.base]
        return unit, [Candidate(donor, {name: Copy(donor, name) for name in unit.tensors}) for donor in donors]
    tensor = unit.tensors[0]
    parent = Parent(search.model.sources.value(search.model.recipe.tensors[tensor]))
    return unit, evolve._offspring(search, tensor, parent, kind, 0, 0)[:PER_UNIT]


def make_case(
    folder: Path,
    n_blocks: int = 12,
    n_donors: int = 4,
    n_samples: int = 192,
    prompt: tuple[int, int] = (80, 110),
    spread: float = 0.04,
    embedding: float = 3.0,
    logits: float = 4.0,
) -> Case:
    """Write donors and datasets. `prompt`: shortest and longest question in words; a few tokens come with it.

    `spread`, `embedding`: standard deviation of the ancestor's matrices and of its embedding; `logits`: of its logits.
    Blocks then change the next token often, and fine-tunes of 1 to 2 % leave it for some tokens only.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = AutoConfig.for_model(
        "llama",
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=n_blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=WORDS,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=4,
    )
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    ancestor = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        ancestor.get_input_embeddings().weight.mul_(embedding / spread)
        ancestor.get_output_embeddings().weight.mul_(logits / spread / config.hidden_size**0.5)
    for name, seed in (("free", 1), ("forced", 2)):
        write_questions(folder / f"{name}.json", ancestor, tokenizer, n_samples, prompt, seed)
    names = tuple(f"donor{index}" for index in range(n_donors))
    kept = {name: value.clone() for name, value in ancestor.state_dict().items()}
    for index, name in enumerate(names):
        dice = torch.Generator().manual_seed(100 + index)
        with torch.no_grad():
            for key, parameter in ancestor.named_parameters():
                noise = torch.randn(parameter.shape, generator=dice) * (0.01 + 0.01 * (index % 2))
                own = kept[key].std() if kept[key].std() > 0 else 1.0
                parameter.copy_(kept[key] + noise * own)
        ancestor.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
    return Case(folder, names)


def word_tokenizer() -> Any:
    """A tokenizer of 8,000 words, w5 and so on, with ChatML's special tokens; a space is between any two."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, "user", "assistant"]
    words += [f"w{index}" for index in range(len(words), WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    return fast


@torch.inference_mode()
def write_questions(
    path: Path, model: Any, tokenizer: Any, n: int, prompt: Sequence[int], seed: int, replaced: float = 0.15
) -> None:
    """Random questions; the answers are the model's greedy tokens, of which a share is replaced at random."""
    dice = torch.Generator().manual_seed(seed)
    first = len(SPECIAL) + 2
    items = []
    for _ in range(n):
        length = int(torch.randint(prompt[0], prompt[1] + 1, (), generator=dice))
        question = " ".join(f"w{i}" for i in torch.randint(first, WORDS, (length,), generator=dice).tolist())
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
            suppress_tokens=list(range(first)),
            pad_token_id=0,
        )
        answer = out[0, ids.shape[1] :]
        other = torch.randint(first, WORDS, answer.shape, generator=dice)
        answer = torch.where(torch.rand(answer.shape, generator=dice) < replaced, other, answer)
        turns = [("human", question), ("gpt", " ".join(f"w{i}" for i in answer.tolist()))]
        items.append({"conversation": [{"from": who, "value": value} for who, value in turns]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items))
