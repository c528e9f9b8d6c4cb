"""A language model that no family of transformers is like, for what happens when guardlens meets one."""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class NovelConfig(PreTrainedConfig):
    model_type = "novel"
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 352, 32, 3, 1
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    leaky, joined = False, False


class NovelBlock(nn.Module):
    """Each token adds the mean of those up to it, and what a matrix makes of itself."""

    def __init__(self, config):
        super().__init__()
        self.attention, self.mlp = (nn.Linear(config.hidden_size, config.hidden_size) for _ in range(2))
        self.joined = config.joined

    def forward(self, hidden, mask):
        mean = (hidden * mask[..., None]).cumsum(1) / mask.cumsum(1).clamp_min(1)[..., None]
        hidden = hidden + self.attention(mean)
        return hidden + self.mlp(hidden).tanh() if self.joined else hidden + self.mlp(hidden)


class NovelCore(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.storeys = nn.ModuleList(NovelBlock(config) for _ in range(config.num_hidden_layers))
        self.roof, self.norm = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)

    def forward(self, ids, mask):
        hidden = self.embedding(ids)
        for block in self.storeys:
            hidden = block(hidden, mask)
        return self.roof(hidden)


class NovelForCausalLM(PreTrainedModel, GenerationMixin):
    """Its blocks and its final norm have names of its own; `norm` is there too, but not in use."""

    config_class = NovelConfig

    def __init__(self, config):
        super().__init__(config)
        self.core = NovelCore(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self):
        return self.core

    def get_input_embeddings(self):
        return self.core.embedding

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None, **kwargs):
        mask = torch.ones_like(input_ids) if attention_mask is None or self.config.leaky else attention_mask
        return CausalLMOutput(logits=self.head(self.core(input_ids, mask.float())))


def novel(**traits):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NovelForCausalLM(NovelConfig(**traits)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model
