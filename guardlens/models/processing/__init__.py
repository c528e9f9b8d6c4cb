"""From queries to input tensors: chat template, image preprocessing, and the text twin of a prompt.

A *processor* is what `AutoProcessor` loads for a vision-language model (chat template, tokenizer and image processor), or the tokenizer of
a text-only model. Processors from remote code need not inherit from transformers, so no class is required of them. They must accept
`processor(text=..., images=...)`, render prompts by `apply_chat_template`, and hold their parts as `tokenizer` and `image_processor`.
"""
