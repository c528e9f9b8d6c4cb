"""What a family is to the tests, and the tokenizer that all share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "How to fold a paper boat?",
    "Please explain how to plant a tulip in a pot.",
    "I want to paint the shed.",
    "Tell me how to mend a hat, step by step, with a needle.",
)
CORPUS = (*TEXTS, "USER: ASSISTANT: user assistant system model You are a careful helper. Sure, here")


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: As its makers write it.
        model: Builds the tiny random model.
        processor: Builds the processor (the tokenizer of a text model).
        blocks: Path of the list of decoder blocks, written down here so that the tests do not ask the code under test.
        vision: Path of the list of vision blocks; None for a text model.
        projector: Path of the module whose output enters the language model; None where there is none.
        images: Sizes (width, height) of two test images; different where the family takes any size.
        adds: What blocks add to the residual stream besides attention and MLP, by the names of `decompose_resid`: `rest`, `between`.
        refused: Why guardlens refuses the whole family, in words of its error.
        unsupported: Capability -> the reason why this family lacks it, which the table of families prints.
    """

    name: str
    model: Callable[[], Any]
    processor: Callable[[], Any]
    blocks: str
    vision: str | None = None
    projector: str | None = None
    images: tuple[tuple[int, int], tuple[int, int]] = ((32, 32), (32, 32))
    adds: tuple[str, ...] = ()
    refused: str = ""
    unsupported: tuple[tuple[str, str], ...] = ()

    def lacks(self, capability: str) -> str:
        """Why the family has not this capability; empty if it has."""
        return dict(self.unsupported).get(capability, "")

    @property
    def reloads(self) -> bool:
        """Whether transformers can load its saved processor here, without torchvision (see `assemble`)."""
        return type(self.processor()).__module__.startswith("transformers")


@cache
def _trained() -> str:
    """A byte-level BPE: any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tokenizer(template: str, *specials: str, **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template.

    Args:
        template: Jinja, as in the family's checkpoints.
        specials: Further special tokens, in order of their ids (from 340 on).
        named: Special tokens that the processor asks for by attribute, such as `image_token="<image>"`.
    """
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        clean_up_tokenization_spaces=False, extra_special_tokens=named,
    )  # fmt: skip
    made.add_special_tokens({"additional_special_tokens": list(specials)}, replace_extra_special_tokens=False)
    made.chat_template = template
    return made


def assemble(cls: type, **parts: Any) -> Any:
    """A processor of parts that its class would refuse: without torchvision there is no video processor."""
    lenient = type(cls.__name__, (cls,), {"check_argument_for_proper_class": lambda self, name, value: type(value)})
    return lenient(**parts)


def build(cls: type, config: Any, seed: int = 0) -> Any:
    """A random model whose weights are large enough for every token, image and edit to matter."""
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter.shape[-1] if parameter.ndim == 2 or "experts" in name else parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            elif "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model
