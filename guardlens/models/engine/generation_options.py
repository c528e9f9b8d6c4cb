"""The settings of transformers' `generate`, from the checkpoint and the call. Those that are not one token at a time are refused."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from guardlens.errors import ArgumentError, InterventionError, as_count, first_sentence, require_type
from guardlens.models.processing.chat_template import pad_token_id

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "assistant_model": (None,),
    "cache_implementation": (None, "dynamic", "dynamic_full", "offloaded", "static", "offloaded_static", "hybrid", "sliding_window"),
    "constraints": (None,),
    "custom_generate": (None,),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1),
    "is_assistant": (None, False),
    "negative_prompt_ids": (None,),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,),
    "speculation_type": (None,),
    "token_healing": (None, False),
    "use_mtp": (None, False),
}
"""Settings that can make a forward pass more, or less, than one token of every answer -> the values that do not."""

OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate")
"""Settings that make `generate` return more than tokens."""

LENGTHS = ("max_length", "max_new_tokens")
"""Settings that `new_tokens` replaces."""

COUNTS = ("max_time", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "num_return_sequences", "pad_token_id", "top_k")
"""Settings that may not be negative."""

REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError, ImportError)
"""The errors by which transformers refuses options."""


def generation_settings(hf: Any, options: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The settings in force when `hf` generates with these options, from them and from the checkpoint's `generation_config`.

    Args:
        hf: The Hugging Face model.
        options: Options of its `generate`. Without any, answers are greedy, whatever the checkpoint says.

    Returns:
        Setting -> value as plain JSON data, sorted by name; an object without such a form is given by the name of its type.

    Examples:
        >>> from guardlens.models.engine.generation_options import generation_settings
        >>> generation_settings(model.hf, {"do_sample": True, "temperature": 0.7})
        {'bos_token_id': 1, 'do_sample': True, 'eos_token_id': 2, 'pad_token_id': 0, 'temperature': 0.7}
    """
    return {name: _plain(value) for name, value in sorted(merged(hf, options).items())}


def merged(hf: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """All settings as they are; those of the call override the checkpoint's."""
    found = {**_made(getattr(hf, "generation_config", None)), "do_sample": False, **flat(options)}
    return {name: value for name, value in found.items() if value is not None and name not in OUTPUTS}


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, with the fields of a `generation_config` among them as options of their own."""
    named = {name: value for name, value in options.items() if name != "generation_config"}
    return _made(options.get("generation_config")) | named


def require_stepwise(settings: Mapping[str, Any]) -> None:
    """Refuse generation in which a forward pass is not one token of every answer, since edits would act on other tokens than they mean.

    Raises:
        InterventionError: A setting asks for such generation.
    """
    for name, neutral in NEUTRAL.items():
        if settings.get(name) not in neutral:
            raise InterventionError(
                f"{_shown(name, settings[name])} in the settings of generation, by which a forward is not one token of every answer",
                "generation token by token",
                f"leave it out; where the checkpoint's generation_config sets it, say {name}=None",
            )


def require_one_answer(settings: Mapping[str, Any]) -> None:
    """Refuse settings that give several answers per prompt, or rows that are not prompts.

    Raises:
        InterventionError: Beams, or several return sequences.
    """
    for name in ("num_beams", "num_return_sequences"):
        if settings.get(name, 1) != 1:
            raise InterventionError(
                f"{_shown(name, settings[name])} in the settings of generation",
                "one answer per prompt",
                f"hand in the query several times, or several seeds; say {name}=1 where the checkpoint's generation_config sets it",
            )


def require_options(options: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Refuse options that the run itself sets, and values that have no meaning.

    Args:
        options: Options of `generate`.
        inputs: The inputs of the prompts.

    Raises:
        InterventionError: An option is a length, an input, an output or a negative count.
    """
    for name, value in options.items():
        if name in LENGTHS:
            raise InterventionError(
                _shown(name, value), "the length as new_tokens (of generate: max_new_tokens)", "leave it out of the options"
            )
        if name in inputs or name in ("inputs", "inputs_embeds"):
            raise InterventionError(
                f"the option {name}", "prompts that come with the batch", "make them with model.batch(queries, presentation)"
            )
        if name in OUTPUTS and value:
            raise InterventionError(_shown(name, value), "answers alone", "ask model.run for logits and reads, or call model.hf.generate")
        if name in COUNTS and isinstance(value, int | float | np.number) and value < 0:
            raise InterventionError(_shown(name, value), "no negative number", "leave it out")


def as_new_tokens(new_tokens: Any) -> int:
    """The largest length of an answer.

    Raises:
        ArgumentError: It is not a whole number, or not a single token.
    """
    return as_count(new_tokens, "max_new_tokens", ArgumentError, "ask model.run for logits, if no answer is wanted")


def options_of(hf: Any, tokenizer: Any, options: Any, inputs: Mapping[str, Any], new_tokens: int) -> dict[str, Any]:
    """The options of `generate` for answers that are generated token by token.

    Args:
        hf: The Hugging Face model.
        tokenizer: Its tokenizer.
        options: What the user asks for.
        inputs: The inputs of the prompts.
        new_tokens: The largest number of tokens; 0 if nothing is generated.

    Raises:
        ArgumentError: They are no mapping, or nothing is generated.
        InterventionError: They, or the checkpoint's own settings, ask for something else than one answer per prompt, token by token.
    """
    require_type(options, Mapping, ArgumentError, "say generation={'do_sample': True, ...}")
    named = flat(options)
    if not new_tokens:
        if named:
            found = "options of generation for a run that generates nothing"
            raise ArgumentError(found, "new_tokens", "say new_tokens=16, or leave them out")
        return {}
    require_options(named, inputs)
    settings = merged(hf, named)
    require_stepwise(settings)
    require_one_answer(settings)
    for_stop_strings = {"tokenizer": tokenizer} if "stop_strings" in settings else {}
    caching = {name: settings[name] for name in ("use_cache", "cache_implementation") if name in settings}
    return {"pad_token_id": pad_token_id(tokenizer), **for_stop_strings, **caching, **named}


def refused(error: Exception) -> InterventionError:
    """The error about options that transformers refused before it ran the model."""
    return InterventionError(
        f"options of generation that transformers refuses ({first_sentence(error)})",
        "options of its generate",
        "mend them, or the checkpoint's generation_config",
    )


def _made(config: Any) -> dict[str, Any]:
    """The settings of a generation config."""
    if config is None:
        return {}
    from transformers import GenerationConfig

    require_type(config, GenerationConfig, InterventionError, "hand in a GenerationConfig of transformers, or its settings by their names")
    told = ("transformers_version", *LENGTHS)
    return {name: value for name, value in config.to_dict().items() if value is not None and name not in told and name[0] != "_"}


def _shown(name: str, value: Any) -> str:
    return f"{name}={value!r}" if isinstance(value, bool | int | float | str) else name


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    return f"{type(value).__module__}.{type(value).__qualname__}"
