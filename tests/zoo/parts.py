"""What several families of VLMs share: a small eye, small pixels, chat templates."""

EYE = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
PIXELS = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}

USER_ASSISTANT = (
    "{{ bos_token }}{% for m in messages %}{{ m.role.upper() + ': ' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}"
    "{{ ' ' if m.role != 'assistant' else '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA-1.5's. Replace `<image>` by the family's placeholder."""

CONTENT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ IMAGE if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
)
"""What a turn holds. Replace IMAGE by a Jinja string."""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    + CONTENT
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Qwen's and InternVL's. Replace IMAGE by a Jinja string."""

TURNS = ("<|im_start|>", "<|im_end|>")
