"""Independent references: raw PyTorch forward hooks on the Hugging Face model, no guardlens code."""

from contextlib import ExitStack

import torch


def blocks(hf):
    return hf.get_decoder().layers


def with_hooks(hf, inputs, edits=None, pre_edits=None, keep=None):
    """Logits of a forward: `edits[layer]` maps a block's output, `pre_edits[layer]` its input; outputs are kept in `keep`."""
    with ExitStack() as stack, torch.no_grad():
        for layer, block in enumerate(blocks(hf)):
            if pre_edits and layer in pre_edits:
                hook = lambda m, args, kwargs, f=pre_edits[layer]: ((f(args[0]), *args[1:]), kwargs)  # noqa: E731
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if edits and layer in edits:
                stack.callback(block.register_forward_hook(lambda m, a, out, f=edits[layer]: f(out)).remove)
            if keep is not None:
                stack.callback(block.register_forward_hook(lambda m, a, out, i=layer: keep.__setitem__(i, out.clone())).remove)
        return hf(**inputs, use_cache=False).logits


def at_last(edit):
    """A hook for `with_hooks` that maps the last column (left padding)."""

    def hook(out):
        out = out.clone()
        out[:, -1] = edit(out[:, -1])
        return out

    return hook


def generate(hf, inputs, layer, fn, phase, new_tokens):
    """Greedy tokens while one block's output in the last column is mapped by `fn`, in the prefill, the decode steps, or always."""

    def hook(module, args, out):
        prefill = out.shape[1] > 1
        if phase != "always" and prefill != (phase == "prefill"):
            return out
        out = out.clone()
        out[:, -1] = fn(out[:, -1])
        return out

    handle = blocks(hf)[layer].register_forward_hook(hook)
    try:
        return hf.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[:, inputs["input_ids"].shape[1] :]
    finally:
        handle.remove()


def last(states, mask):
    """States of the last real token of each row, either padding."""
    index = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    return states[torch.arange(len(states)), index]


def inputs_of(hf, inputs, paths):
    """What each named module takes first, in one forward."""
    return _kept(hf, inputs, paths, lambda module, keep: module.register_forward_pre_hook(
        lambda m, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True))  # fmt: skip


def outputs_of(hf, inputs, paths):
    """What each named module gives, the first of it where it gives several, in one forward."""
    return _kept(hf, inputs, paths, lambda module, keep: module.register_forward_hook(
        lambda m, args, out: keep(out[0] if isinstance(out, tuple) else out)))  # fmt: skip


def _kept(hf, inputs, paths, register):
    kept = {}
    with ExitStack() as stack, torch.no_grad():
        for path in paths:
            keep = lambda value, path=path: kept.__setitem__(path, value.clone())  # noqa: E731
            stack.callback(register(hf.get_submodule(path), keep).remove)
        hf(**inputs, use_cache=False)
    return kept
