# %% [markdown]
# # Your own VLM: LLaVA-1.5, Qwen2.5-VL, Gemma 3
#
# What do you type for a model of your own, which parts of guardlens work on it, and what will it cost? This page has the calls for three
# families, the memory and time to expect by arithmetic, and the whole way from a file of pairs to a saved guard. It downloads nothing: the
# code runs on tiny random models of the same families, and on the organism where numbers should mean something.
#
# ![The guard at every layer and strength, on pairs with images of their own from a JSONL file, with its placebo](7_your_own_vlm/end.png)
#
# You need guardlens, and a GPU for the real models. The cells take about 15 seconds on two CPU cores.

# %% [markdown]
# ## What to type
#
# Pass a hub id or the directory of a checkpoint. Other options go on to `from_pretrained`.
#
# ```python
# import guardlens as gl
#
# model = gl.load("llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device_map="auto")
# model = gl.load("Qwen/Qwen2.5-VL-7B-Instruct", dtype="bfloat16", device_map="auto")
# model = gl.load("google/gemma-3-4b-it", dtype="bfloat16", device_map="auto")
# ```
#
# If memory is short, load the model in 4 bits (`pip install "guardlens[quantised]"`):
#
# ```python
# from transformers import BitsAndBytesConfig
#
# four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
# model = gl.load("llava-hf/llava-1.5-7b-hf", quantization_config=four_bits, device_map="auto")
# ```
#
# Ask what works before you write any code:
#
# ```sh
# guardlens check llava-hf/llava-1.5-7b-hf --dtype bfloat16 --device-map auto
# ```
#
# Qwen's processor needs torchvision (`pip install "guardlens[vision]"`). Gemma is gated: log in with `hf auth login`.

# %% [markdown]
# ## Memory and time to expect
#
# These are the families' published configurations. On torch's `meta` device, a model has every shape and no memory, so its parameters can
# be counted exactly.

# %%
import json
import tempfile
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

import guardlens as gl
from guardlens import defences, directions, presentations
from guardlens.data.splits import split
from guardlens.errors import ModelError
from guardlens.models.checks import check

CLASSES = {"LLaVA-1.5-7B": LlavaForConditionalGeneration, "Qwen2.5-VL-7B": Qwen2_5_VLForConditionalGeneration,
           "Gemma 3 4B": Gemma3ForConditionalGeneration}  # fmt: skip
CONFIGS = {
    "LLaVA-1.5-7B": LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                       "num_attention_heads": 16, "image_size": 336, "patch_size": 14}),
    "Qwen2.5-VL-7B": Qwen2_5_VLConfig(
        text_config={"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                     "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}),
    "Gemma 3 4B": Gemma3Config(
        text_config={"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
                     "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208},
        vision_config={"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                       "image_size": 896, "patch_size": 14, "vision_use_head": False}),
}  # fmt: skip
SIZES, BLOCKS = {}, {}
for name, config in CONFIGS.items():
    with torch.device("meta"):
        sizes = {part: parameter.numel() for part, parameter in CLASSES[name](config).named_parameters()}
    SIZES[name], BLOCKS[name] = sum(sizes.values()), sum(size for part, size in sizes.items() if "language_model.layers" in part)
    print(f"{name}: {SIZES[name] / 1e9:.2f} billion parameters, {BLOCKS[name] / 1e9:.2f} of them in the language model's blocks")

# %% [markdown]
# The other parameters are mostly vision encoder and embeddings. Memory holds the weights, and the KV cache of the prompts in the batch.
# **All numbers in this part are arithmetic, not measurements.** A prompt is 40 tokens of text beside one image of 336 x 336; Qwen has one
# image token for 28 x 28 pixels, so larger images have more.

# %%
IMAGE_TOKENS = {"LLaVA-1.5-7B": (336 // 14) ** 2, "Qwen2.5-VL-7B": (336 // 28) ** 2, "Gemma 3 4B": 256}
GIB, rows = 2**30, []
for name, config in CONFIGS.items():
    llm, tokens = config.text_config, IMAGE_TOKENS[name] + 40
    head = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    cache = 2 * llm.num_hidden_layers * llm.num_key_value_heads * head * 2 * tokens  # keys and values, in bfloat16
    rows.append({"model": name, "tokens": tokens, "weights, bf16": 2 * SIZES[name] / GIB, "weights, 4 bits": SIZES[name] / 2 / GIB,
                 "keys and values of 32 prompts": 32 * cache / GIB})  # fmt: skip
print(pd.DataFrame(rows).round(2).to_string(index=False), "\nGiB")

# %% [markdown]
# A forward pass needs more, and 4 bits is a lower bound, since embeddings stay in 16 bits. If a batch doesn't fit, guardlens halves it and
# goes on. The result of `collect` is small: one vector per query and layer, in float32, on the CPU.

# %%
N = 200
for name, config in CONFIGS.items():
    llm = config.text_config
    kept = N * llm.num_hidden_layers * llm.hidden_size * 4
    print(f"{name}: {N} queries x {llm.num_hidden_layers} layers x {llm.hidden_size} numbers = {kept / 2**20:.0f} MiB")

# %% [markdown]
# How long does it take? A forward pass needs about two floating point operations per token and parameter of the blocks. The number of
# tokens depends on the task: a blank image is computed once for all prompts, a sweep adds the text twin and one token per cell, and
# generation is bound by reading the weights for each token. Insert your own device's rates; those below are round numbers, not measured on
# a device.

# %%
RATE, BANDWIDTH = 100e12, 1e12  # operations and bytes per second that your device really reaches
STRENGTHS, ARMS, ANSWER, BATCH = 3, 2, 128, 32
rows = []
for name, config in CONFIGS.items():
    image, layers = IMAGE_TOKENS[name], config.text_config.num_hidden_layers
    cost = lambda tokens, name=name: 2 * BLOCKS[name] * tokens / RATE  # noqa: E731
    rows.append({"model": name, "collect, text": cost(N * 40), "collect, one blank image": cost(image + N * 40),
                 "collect, own images": cost(N * (image + 40)), "sweep": cost(image + N * (2 * 40 + layers * STRENGTHS * ARMS)),
                 "evaluate, per defence": cost(image + N * 40) + N / BATCH * ANSWER * 2 * SIZES[name] / BANDWIDTH})  # fmt: skip
print(f"{N} queries; a sweep of all layers x {STRENGTHS} strengths x {ARMS} variants; answers of {ANSWER} tokens, {BATCH} at a time")
print(pd.DataFrame(rows).round(1).to_string(index=False), "\nseconds, by arithmetic")

# %% [markdown]
# Expect more: the estimate leaves out the vision encoder, attention and the unembedding, small batches don't fill a device, and Python adds
# overhead. But one blank image for all prompts costs next to nothing, while an image for each costs its tokens each time; and at these
# rates the answers under one defence cost more than the whole sweep. So collect and sweep as much as you like, and generate for the few
# defences that are left.

# %% [markdown]
# ## The loading path, on models that fit here
#
# We build tiny random models of the same three classes. They borrow the organism's words and share a plain chat template. (A real
# checkpoint needs none of this: its directory has everything.)

# %%
CHAT = (
    "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ 'IMAGE ' if p.type == 'image' else p.text }}{% endfor %}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(image: str, **special: str):
    """Make the organism's tokenizer with this family's special tokens; `image` is the text that stands for an image."""
    words = AutoTokenizer.from_pretrained(gl.organism.path(), extra_special_tokens=special)
    words.chat_template = CHAT.replace("IMAGE", image)
    return words


class ImagesOnly(Qwen2_5_VLProcessor):
    """Qwen's processor without its video part, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


# %% [markdown]
# Each family has its own processor and its own text for an image. guardlens hides these differences.

# %%
of_llava = tokenizer("<image>", image_token="<image>")
of_qwen = tokenizer("<|vision_start|><|image_pad|><|vision_end|>", image_token="<|image_pad|>", video_token="<|video_pad|>",
                    vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")  # fmt: skip
of_gemma = tokenizer("<start_of_image>", boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
square = {"height": 32, "width": 32}
processors = {
    "llava": LlavaProcessor(CLIPImageProcessorPil(size=square, crop_size=square), of_llava, patch_size=8, num_additional_image_tokens=1,
                            vision_feature_select_strategy="default", chat_template=of_llava.chat_template),
    "qwen": ImagesOnly(Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=1024), of_qwen, None,
                       chat_template=of_qwen.chat_template),
    "gemma": Gemma3Processor(Gemma3ImageProcessorPil(size=square), of_gemma, of_gemma.chat_template, image_seq_length=4),
}  # fmt: skip

# %% [markdown]
# The models have the classes of the large ones, and three layers each.

# %%
text = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
turned = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
eye = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
qwen_eye = {"depth": 2, "num_heads": 2, "hidden_size": 24, "out_hidden_size": 32, "intermediate_size": 32, "patch_size": 4,
            "window_size": 16, "fullatt_block_indexes": [1]}  # fmt: skip
ids = {"image_token_id": of_qwen.image_token_id, "video_token_id": of_qwen.video_token_id,
       "vision_start_token_id": of_qwen.vision_start_token_id, "vision_end_token_id": of_qwen.vision_end_token_id}  # fmt: skip
gemma_ids = {
    "boi_token_index": of_gemma.boi_token_id,
    "eoi_token_index": of_gemma.eoi_token_id,
    "image_token_index": of_gemma.image_token_id,
}
picture = of_llava.image_token_id
torch.manual_seed(0)
models = {
    "llava": LlavaForConditionalGeneration(LlavaConfig(text_config={"model_type": "llama"} | text, image_token_index=picture,
                                                       vision_config={"model_type": "clip_vision_model"} | eye)),
    "qwen": Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text | turned, vision_config=qwen_eye, **ids)),
    "gemma": Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=eye, mm_tokens_per_image=4, **gemma_ids)),
}  # fmt: skip

# %% [markdown]
# We save them like any checkpoint and load them by directory. We pass Qwen's processor, as you would if torchvision is missing.

# %%
gl.progress_bars(False)
folder = Path(tempfile.mkdtemp())
for name, hf in models.items():
    hf.save_pretrained(folder / name)
    if name != "qwen":
        processors[name].save_pretrained(folder / name)
loaded = {name: gl.load(folder / name, processor=processors[name] if name == "qwen" else None) for name in models}
print(*loaded.values(), sep="\n")

# %% [markdown]
# ## What works on it: `guardlens check`
#
# The command prints a table; the function behind it returns the same findings. These are the findings for one model in full.

# %%
findings = {name: check(model) for name, model in loaded.items()}
for found in findings["qwen"]:
    print(f"{ {True: 'yes', False: 'NO', None: '-'}[found.works]:4}{found.name:26}{found.detail}")

# %% [markdown]
# "Logits reproduced" says that what guardlens takes for the residual stream gives the model's own logits. "Images" says that the image
# tokens are those that another image changes. The next cell sums up all three families.

# %%
for name, each in findings.items():
    print(
        f"{name}: {sum(found.works is True for found in each)} of {len(each)} work",
        *(f"NO {f.name}: {f.detail}" for f in each if not f.works),
        sep="\n   ",
    )

# %% [markdown]
# Gemma fails at "images", and the detail says how: another image changes nothing. The check is right. transformers initialises Gemma's
# projector with zeros, and an untrained model sees nothing through it. With random numbers there, it passes.

# %%
with torch.no_grad():
    models["gemma"].model.multi_modal_projector.mm_input_projection_weight.normal_(0, 0.1)
images = next(found for found in check(gl.load(models["gemma"], processor=processors["gemma"])) if found.name == "images")
print(images.works, images.detail)

# %% [markdown]
# ## Your own pairs, with images
#
# The input is a JSONL file: one query per line, with its label, its pair and its image. From here on numbers should mean something, so the
# model is the organism, loaded from its directory like any other LLaVA, and the file has requests of its language with images.

# %%
(folder / "images").mkdir()
with (folder / "pairs.jsonl").open("w") as file:
    for number, query in enumerate(gl.organism.pairs().queries):
        query.images[0].save(folder / f"images/{number}.png")
        line = {"text": query.text, "label": query.label, "pair": query.pair, "images": f"images/{number}.png"}
        file.write(json.dumps(line) + "\n")
print(*(folder / "pairs.jsonl").read_text().splitlines()[:2], sep="\n")

# %% [markdown]
# `read_queries` reads the file, and `split` keeps pairs together: one half makes the directions, and we measure on the other half.

# %%
model = gl.load(gl.organism.path())
fit, held_out = split(gl.read_queries(folder / "pairs.jsonl"), (0.5, 0.5))
pairs = gl.QueryPairs.from_queries(fit)
print(model, f"{len(pairs)} pairs to fit, {len(held_out)} queries held out", sep="\n")

# %% [markdown]
# The LLM's view is text alone, and the VLM's view is each query beside its own image. For a blank image, pass your model's image size:
# `presentations.blank("grey", model.cfg.image_size or 336)`.

# %%
ssd = directions.ssd(gl.collect(model.llm, pairs))
llm = gl.collect(model.llm, held_out)
vlm = gl.collect(model, held_out, presentations.own_images)
gap = gl.compare(llm, vlm, ssd)
gap.plot()

# %% [markdown]
# Watch three things on a model of yours: does the AUROC rise above that of the words, does the accuracy at the LLM's threshold fall beside
# the image, and where? Then sweep the guard over all layers.

# %%
guard = defences.vlm_guard(ssd)
effect = gl.sweep(model, guard.intervention, held_out, presentations.own_images, strengths=[0.5, 1.0])
best = effect.best(1)
summary = effect.summary().query("score == 'refusal_logodds' and strength == 1 and layer == @best[0]")
print(f"bag of words: AUROC {gap.facts['bag_of_words'][0]:.2f}; layout: {effect.facts['layout']}; best layer: {best}")
print(summary[["variant", "label", "change", "low", "high", "n"]].round(2).to_string(index=False))

# %% [markdown]
# At that layer the guard raises the refusal log-odds of harmful requests, the placebo does far less, and harmless requests keep theirs.
# "branch" says that one forward pass per batch computed the whole map. Save what you will need again.

# %%
chosen = defences.vlm_guard(ssd, layers=best)
ssd.save(folder / "ssd.safetensors")
chosen.intervention.save(folder / "guard.safetensors")
for name, result in (("gap", gap), ("effect", effect)):
    result.save(folder / f"{name}.csv")
again = gl.Intervention.load(folder / "guard.safetensors")
print(again.fingerprint == chosen.intervention.fingerprint, sorted(path.name for path in folder.iterdir() if path.is_file()))

# %% [markdown]
# ## When loading refuses, or a check fails
#
# Errors say what was found, what was expected and what to do. A common one is a VLM with a tokenizer in place of its processor:

# %%
try:
    gl.load(models["llava"], processor=of_llava)
except ModelError as error:
    print(error)

# %% [markdown]
# Another is a name that leads nowhere. `names=` says what a part is called if the generic rule doesn't find it, or finds another.

# %%
try:
    gl.load(models["llava"], processor=processors["llava"], names={"stack": "model.language_model.blocks"})
except ModelError as error:
    print(error)
right = {"stack": "model.language_model.layers", "final_norm": "model.language_model.norm"}
print(gl.load(models["llava"], processor=processors["llava"], names=right))

# %% [markdown]
# A model of a family that the tests don't cover is checked when it is loaded, and refused if its parts don't compute the model's own
# logits, or if batches, edits or images go wrong. `self_check=False` loads the model all the same, at your own risk.
#
# ## Several GPUs
#
# `device_map="auto"` spreads the layers over the GPUs, and everything above stays as it is: directions and states are on the CPU, and edits
# run where their layer is. Leave out `device=` then. [Several GPUs](../how-to/several-gpus.md) has more.
#
# The last figure is the map of the guard on the pairs from the file.

# %%
effect.plot()

# %% [markdown]
# ## What this page doesn't say
#
# No real checkpoint was run for this page: the costs are arithmetic, the three tiny models are random, and the figures are the organism's.
# The gate, the layers and the strengths of your model are yours to find, on data of your own and with judges that you trust.
#
# ## Try next
#
# - One command runs all of it: `guardlens demo --model ID --data pairs.jsonl --out out/mine`.
# - [Evaluate defences](6_evaluate_defences.md) on your model; [your own data](../how-to/data.md); [export the guard](../how-to/export.md).
# - [Families](../families.md) says what is proven for which family; reference: [load and models](../api/model.md), [check](../api/demo.md).
