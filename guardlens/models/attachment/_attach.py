"""`attach`: check that an intervention can run on a model, and put it there."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from guardlens.data.presentations import text_only
from guardlens.errors import InterventionError, ModelError, quoted, require_type
from guardlens.interventions.held_states import State
from guardlens.interventions.intervention import Intervention, require_intervention
from guardlens.models.architectures import KNOWN, Architecture, find, fingerprint, require_named
from guardlens.models.attachment._attachment import Attachment, require_uncompiled
from guardlens.models.attachment._guarded_run import RunStarter
from guardlens.models.attachment._inputs import Inputs
from guardlens.models.engine.held_states import wanted_states
from guardlens.models.processing.chat_template import tokenizer_of
from guardlens.models.processing.text_twin import ImageRemover


def attach(
    intervention: Intervention,
    hf: Any,
    processor: Any = None,
    *,
    twin: Callable[[Inputs], Inputs] | None = None,
    names: Mapping[str, str] = MappingProxyType({}),
) -> Attachment:
    """Put an intervention on a Hugging Face model: it then guards every call of the model, of its `generate` and of pipelines with it.

    The intervention runs as under `HookedModel`, but by torch's own hooks. The weights are not changed, and nnsight is not imported.

    Args:
        intervention: What to change, made for this model: a guard's `intervention`, or a loaded `Intervention`.
        hf: The Hugging Face model.
        processor: Its processor; needed for a VLM if the intervention uses the text twin.
        twin: Makes the inputs of the text twin from those of a prompt, for processors whose images cannot be removed from the text.
        names: The names of the model's parts, if `load` needs them as well.

    Raises:
        MismatchError: The intervention was made for another model, or for a separate LLM (`load(..., llm=...)`): here, the states of the
            text twin come from the model itself, shown no image.
        SiteError: The model does not have a hook or a layer of the intervention.
        InterventionError: The intervention needs more than the tokens of a prompt (`"instruction"`, another presentation), or the model is
            guarded already.
        ModelError: The text twin cannot be made, or an adapter puts tokens of its own before the prompt.

    Examples:
        >>> inputs = model.batch("how to mend the hat ?", grey).inputs  # what model.processor makes of a prompt
        >>> with gl.attach(guard.at(layers=7), model.hf, model.processor) as handle:
        ...     tokens = model.hf.generate(**inputs, max_new_tokens=16)
        >>> handle.decisions[0, 7]  # (step of the intervention, layer) -> which prompts the gate opened for
        tensor([False])
    """
    require_intervention(intervention)
    require_type(hf, nn.Module, ModelError, "hand in the model of transformers and its processor; of a HookedModel, its .hf and .processor")
    require_uncompiled(hf)
    require_named(hf, names)
    cfg = find(hf, KNOWN.preferring(names))
    _require_unguarded(hf)
    _require_known_from_tokens(intervention, cfg.n_layers)
    intervention.require_fit((f"{type(hf).__name__}@{fingerprint(hf)}",), cfg.n_layers, cfg.widths)
    for step in intervention.steps:
        for point in step.site.points(cfg.n_layers):
            cfg.locate(point)
    made = Attachment(RunStarter(intervention, hf, cfg, _twin_maker(intervention, cfg, processor, twin)))
    made._hook()
    return made


def _twin_maker(
    intervention: Intervention, cfg: Architecture, processor: Any, twin: Callable[[Inputs], Inputs] | None
) -> Callable[[Inputs], Inputs] | None:
    """The function that makes the text twin: the user's own, or one learned from the processor; None if the intervention needs none."""
    token = cfg.image_token_id
    needed = token is not None and bool(wanted_states([intervention], cfg.n_layers))
    if needed and processor is None and twin is None:
        raise ModelError(
            "an intervention that asks for the text twin, without a processor",
            "the model's processor",
            "call attach(intervention, hf, processor)",
        )
    if twin is not None and not callable(twin):
        raise InterventionError(f"twin={quoted(twin)}", "a function of a prompt's inputs", "leave it out, and hand in the processor")
    if processor is not None and not hasattr(tokenizer_of(processor), "convert_ids_to_tokens"):
        raise ModelError(
            f"a processor of type {type(processor).__name__}", "the model's processor", "hand in AutoProcessor.from_pretrained(...)"
        )
    if twin is not None or not needed or token is None:
        return twin
    return ImageRemover.learn(processor, token)


def _require_unguarded(hf: Any) -> None:
    there = Attachment.on(hf)
    if there is not None:
        raise InterventionError(
            f"a second guard on a model with {there!r}",
            "one guard on a model",
            "join the interventions with >>, or call .remove() on the first",
        )


def _require_known_from_tokens(intervention: Intervention, n_layers: int) -> None:
    """Reject positions and presentations that cannot be told from a prompt's tokens."""
    states: list[State] = list(intervention.requires(n_layers))
    other = next((state.presentation for state in states if state.presentation not in (None, text_only)), None)
    if other is not None:
        raise InterventionError(
            f"a state of the presentation {other.name!r}",
            "states of this run or of the text twin",
            "run this intervention with a HookedModel",
        )
    for positions in (*(step.site.positions for step in intervention.steps), *(state.positions for state in states)):
        if positions in ("instruction", "post_instruction"):
            raise InterventionError(
                f"the positions {positions!r}, which tokens alone do not tell",
                "'last', 'all', 'image' or (start, stop)",
                "choose these with .at(positions=...), or run this intervention with a HookedModel",
            )
