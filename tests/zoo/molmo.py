"""Molmo 2: image features are added to the embedding of their token."""

from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Molmo2Config, Molmo2ForConditionalGeneration, Molmo2Processor
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

from tests.zoo.family import Family, assemble, build, tokenizer
from tests.zoo.parts import CHATML, TURNS
from tests.zoo.text import SMALL

TEMPLATE = "{{ bos_token }}" + CHATML.replace("IMAGE", "'<|image|>'")
SPECIALS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<im_low>", "<frame_start>", "<frame_end>",
            "<|image|>", "<|video|>", *TURNS)  # fmt: skip
IDS = {"image_start_token_id": 340, "image_end_token_id": 341, "image_patch_id": 342, "low_res_image_start_token_id": 344,
       "frame_start_token_id": 346, "frame_end_token_id": 347}  # fmt: skip
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12, "hidden_size": 24}


def molmo2(**traits: Any):
    text = SMALL | {"vocab_size": 340, "additional_vocab_size": 16, "head_dim": 8} | traits
    eye = HEADS | {"intermediate_size": 32, "num_hidden_layers": 3, "image_size": [32, 32], "patch_size": 4}
    adapter = HEADS | {"vision_feature_layer": [2, 1], "intermediate_size": 32, "text_hidden_size": 32}
    config = Molmo2Config(text_config=text, vision_config=eye, adapter_config=adapter, **IDS)
    return build(Molmo2ForConditionalGeneration, config)


class Molmo2ImageProcessorTorch(Molmo2ImageProcessor):
    """The real one; only what it leaves to torchvision, resizing and normalising, is torch's."""

    def resize(self, image: Tensor, size: Any, **options: Any) -> Tensor:
        return interpolate(image.float(), (size.height, size.width), mode="bilinear")

    def normalize(self, image: Tensor, mean: Tensor, std: Tensor, **options: Any) -> Tensor:
        return (image - mean[:, None, None]) / std[:, None, None]


def molmo2_processor():
    eye = Molmo2ImageProcessorTorch(size={"height": 32, "width": 32}, patch_size=4, overlap_margins=[1, 1], max_crops=2)
    return assemble(Molmo2Processor, image_processor=eye, video_processor=None, tokenizer=tokenizer(TEMPLATE, *SPECIALS),
                    chat_template=TEMPLATE)  # fmt: skip


FAMILIES = (
    Family("Molmo 2", molmo2, molmo2_processor, "model.language_model.layers", "model.vision_tower.layers",
           "model.multi_modal_projector", ((40, 20), (32, 32))),
    Family("Molmo 2-O", lambda: molmo2(norm_after=True, qk_norm_type="olmo"), molmo2_processor, "model.language_model.layers",
           "model.vision_tower.layers", "model.multi_modal_projector", ((40, 20), (32, 32))),
)  # fmt: skip
