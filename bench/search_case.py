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
from figures import sized

from olmfast.config.run import RunConfig, parse_config
from olmfast.evaluation.scorer import Candidate
from olmfast.observer import Observer
from olmfast.runs.folder import RunFolder
from olmfast.runs.inputs import Inputs
from olmfast.runs.session import Session
from olmfast.search import evolve
from olmfast.search.candidates import swap
from olmfast.testing import CHATML, SPECIAL
from olmfast.weights.architecture import Unit
from olmfast.weights.expressions import Copy

N_BLOCKS = sized(3, 12, 12)
WIDTH, INNER, HEADS = sized((32, 48, 4), (512, 1376, 8), (512, 1376, 8))
WORDS = sized(100, 8000, 8000)  # size of the vocabulary
PROMPT = sized((8, 12), (80, 110), (80, 110))  # words of the shortest and the longest question
ANSWER = sized(4, 20, 20)  # tokens
BLOCKS = (0, (N_BLOCKS - 1) // 2, N_BLOCKS - 1)  # spread evenly over the depth
PER_UNIT = 6  # offspring that are scored together
MODULES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")  # refined in the blocks at hand, in turn


@dataclass(frozen=True)
class Case:
    """Donors and datasets in one folder."""

    folder: Path
    donors: tuple[str, ...]

    def keys(self, samples: int, output: str = "out", **keys: Any) -> dict[str, Any]:
        """The keys of a config in this folder: a run over the pool, on `samples` questions of each dataset."""
        return {
            "models_dir": "models",
            "output_dir": output,
            "models": list(self.donors),
            "dataset": {"free.json": {"mode": "exact_match"}, "forced.json": {"mode": "bigram_loss"}},
            "samples": samples,
            "device": "cpu",
            "dtype": "float32",
            **keys,
        }

    def config(self, samples: int, output: str = "out", **keys: Any) -> RunConfig:
        """See `keys`."""
        return parse_config(self.keys(samples, output, **keys), where="bench", folder=self.folder)

    @property
    def folders(self) -> dict[str, Path]:
        """Donor -> its folder."""
        return {name: self.folder / "models" / name for name in self.donors}


@contextmanager
def session(config: RunConfig) -> Iterator[Session]:
    """The engine, ready to walk; nothing is left of an earlier run."""
    inputs = Inputs.open(config, Observer())
    with RunFolder(config.output_dir, resume=False, overwrite=True).locked(inputs.header(), inputs.pool) as report:
        engine = Session(config, inputs, report, Observer(), lambda: False)
        try:
            yield engine
        finally:
            engine.close()


def modules_in(blocks: Sequence[int]) -> dict[int, str]:
    """Block -> the name of the module in it that is swapped alone and refined."""
    return {block: f"model.layers.{block}.{MODULES[i % len(MODULES)]}" for i, block in enumerate(blocks)}


def module_unit(block: int, name: str) -> Unit:
    """The unit of one matrix."""
    return Unit(name, "module", (f"{name}.weight",), (block,))


def walk(engine: Session, blocks: Sequence[int], refined: Sequence[int]) -> None:
    """The base; the blocks as donors have them; then one module in each of `refined`, swapped and refined."""
    search = engine.search
    engine.choose_base()
    for block in blocks:
        swap(search, "layers", search.architecture.window_unit(search.tensors, [block]))
    for block, name in modules_in(refined).items():
        swap(search, "tensors", module_unit(block, name))
        evolve.refine(search, module_unit(block, name))


def candidates_of(
    kind: str, engine: Session, block: int, blocks: Sequence[int] = BLOCKS, per_unit: int | None = PER_UNIT
) -> tuple[Unit, list[Candidate]]:
    """What a search would score together in a block: every donor's values, or offspring of its module.

    `blocks`: those at hand, see `modules_in`; `per_unit`: offspring at most, None for the whole generation.
    """
    search = engine.search
    unit = module_unit(block, modules_in(blocks)[block])
    if kind == "block":
        unit = search.architecture.window_unit(search.tensors, [block])
    if kind in ("block", "unit"):
        donors = [name for name in search.donors if name != search.recipe.base]
        return unit, [Candidate(donor, {name: Copy(donor, name) for name in unit.tensors}) for donor in donors]
    return unit, evolve.generation(search, unit.tensors[0], kind, 0, 0)[:per_unit]


def make_case(
    folder: Path,
    n_samples: int,
    n_blocks: int = N_BLOCKS,
    n_donors: int = 4,
    spread: float = 0.04,
    embedding: float = 3.0,
    logits: float = 4.0,
) -> Case:
    """Write donors and datasets of `n_samples` questions.

    `spread`, `embedding`: standard deviation of the ancestor's matrices and of its embedding; `logits`: of its logits.
    Blocks then change the next token often, and fine-tunes of 1 to 2 % leave it for some tokens only.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = llama_config(n_blocks, WIDTH, INNER, HEADS, WORDS, spread)
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    ancestor = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        ancestor.get_input_embeddings().weight.mul_(embedding / spread)
        ancestor.get_output_embeddings().weight.mul_(logits / spread / config.hidden_size**0.5)
    for name, seed in (("free", 1), ("forced", 2)):
        write_questions(folder / f"{name}.json", ancestor, tokenizer, n_samples, PROMPT, seed)
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


def llama_config(
    n_blocks: int, width: int, inner: int, heads: int, words: int, spread: float = 0.02, context: int = 512
) -> Any:
    """A Llama's; its embedding and head are two matrices. `spread`: standard deviation of the matrices."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        "llama",
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=n_blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=words,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=spread,
        bos_token_id=1,
        eos_token_id=4,
    )


def word_tokenizer(n_words: int = WORDS) -> Any:
    """A tokenizer of so many words, w7 and so on, with ChatML's special tokens; a space is between any two."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, "user", "assistant"]
    words += [f"w{index}" for index in range(len(words), n_words)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return with_chatml(tokenizer)


def with_chatml(tokenizer: Any) -> Any:
    """A tokenizer of the tokenizers library for Transformers, with ChatML and its special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    return fast


@torch.inference_mode()
def write_questions(
    path: Path,
    model: Any,
    tokenizer: Any,
    n: int,
    prompt: Sequence[int],
    seed: int,
    replaced: float = 0.15,
    answer_tokens: int = ANSWER,
) -> None:
    """Random questions; the answers are the model's greedy tokens, of which a share is replaced at random.

    Without a model they are random words.
    """
    dice = torch.Generator().manual_seed(seed)
    first = len(SPECIAL) + 2
    items = []
    for _ in range(n):
        length = int(torch.randint(prompt[0], prompt[1] + 1, (), generator=dice))
        words = len(tokenizer)
        question = " ".join(f"w{i}" for i in torch.randint(first, words, (length,), generator=dice).tolist())
        if model is None:
            answer = torch.randint(first, words, (answer_tokens,), generator=dice)
        else:
            answer = _greedy(model, tokenizer, question, answer_tokens)
            other = torch.randint(first, words, answer.shape, generator=dice)
            answer = torch.where(torch.rand(answer.shape, generator=dice) < replaced, other, answer)
        turns = [("human", question), ("gpt", " ".join(f"w{i}" for i in answer.tolist()))]
        items.append({"conversation": [{"from": who, "value": value} for who, value in turns]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items))


def _greedy(model: Any, tokenizer: Any, question: str, n_tokens: int) -> torch.Tensor:
    """The model's own answer: words alone, (tokens,)."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        do_sample=False,
        suppress_tokens=list(range(len(SPECIAL) + 2)),
        pad_token_id=0,
    )
    answer: torch.Tensor = out[0, ids.shape[1] :]
    return answer
