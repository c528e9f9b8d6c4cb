"""The result of discovery: a model's parts and sizes, and which of its parts a forward pass computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from guardlens.errors import SiteError
from guardlens.hooks import BLOCKS, HOOKS, VISION, Point
from guardlens.models.architectures.parts import Part


@dataclass(frozen=True)
class Architecture:
    """The parts of a Hugging Face model, and its sizes.

    Attributes:
        parts: Hook and layer -> where to find the value.
        decoder: Path of the language model's stack of blocks.
        blocks: Path of each block.
        norm: Path of the final norm.
        unembed: Path of the unembedding.
        n_layers: Number of the language model's layers.
        d_model: Width of its residual stream.
        n_heads: Attention heads per layer.
        n_kv_heads: Key and value heads per layer.
        d_head: Width of a head; 0 if blocks differ, if queries and values differ, or if it was not found.
        d_mlp: Number of neurons of an MLP; 0 if blocks differ or if it was not found.
        d_vocab: Size of the vocabulary.
        image_token_id: The token that stands for an image; None for a text-only model.
        image_size: Side of the square images that the vision encoder sees, in pixels; None if its config does not say.
        proven: Whether the tests cover the family.
        image_layers: Layers that run only if the prompt has an image (cross-attention).
        residual_scale: The factor that multiplies attention and MLP before they are added to the residual stream.
        logit_scale: The factor that multiplies the unembedding's output.
        softcap: The c of c tanh(logits / c), applied last to the logits; None if there is no soft cap.
        packed: Inputs that concatenate the images of all prompts along their last axis.
        narrows: Whether the last blocks compute only the tokens whose logits are requested.
    """

    parts: Mapping[Point, Part]
    decoder: str
    blocks: tuple[str, ...]
    norm: str
    unembed: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    image_token_id: int | None
    image_size: int | None
    proven: bool = False
    image_layers: frozenset[int] = frozenset()
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None
    packed: frozenset[str] = frozenset()
    narrows: bool = False

    @cached_property
    def points(self) -> list[Point]:
        """All points (hook and layer) of the model, in order of execution."""
        return sorted(self.parts, key=self._order)

    @cached_property
    def rank(self) -> dict[Point, int]:
        """Point -> its index in the order of execution."""
        return {point: place for place, point in enumerate(self.points)}

    def _order(self, point: Point) -> tuple[int | float, ...]:
        """The sort key of a point.

        It deviates from `point.order` in two cases: in cross-attention models the vision encoder runs before the embedding, and if
        `attn_out` is read inside the attention, the attention pattern becomes available only after it.
        """
        pattern = self.parts.get(Point("pattern", point.layer))
        if point.hook == "embed" and self.image_layers:
            return VISION, float("inf"), float("inf")
        if point.hook == "attn_out" and pattern and self.parts[point].path.startswith(f"{pattern.path}."):
            return (*point.order[:2], HOOKS["pattern"].rank - 0.5)
        return point.order

    @property
    def widths(self) -> dict[str, int]:
        """Width of the vectors at each kind of hook; see `guardlens.hooks.Hook.width`. Unknown widths are left out."""
        sizes = {"d_model": self.d_model, "vocab": self.d_vocab}
        if self.d_mlp:
            sizes["neurons"] = self.d_mlp
        if self.d_head:
            sizes["heads"] = self.n_heads * self.d_head
            sizes["kv_heads"] = self.n_kv_heads * self.d_head
        return sizes

    def computed(self, beside_image: bool) -> list[Point]:
        """The points that a forward pass computes.

        Without an image, the vision encoder does not run. Neither do the layers in `image_layers`; the residual stream passes them
        unchanged, so it is the one value that they have.
        """
        return [point for point in self.points if beside_image or self._has_value_without_image(point)]

    def _has_value_without_image(self, point: Point) -> bool:
        if HOOKS[point.hook].stage == VISION:
            return False
        return self._runs(point, beside_image=False) or point.hook.startswith("resid")

    def locate(self, point: Point, beside_image: bool = True) -> Part:
        """Return where to find a point's value.

        Args:
            point: The hook and the layer.
            beside_image: Whether the prompts show an image. Without one, the residual stream passes the layers in `image_layers` unchanged,
                so its value is found at the next layer that runs.

        Raises:
            SiteError: This model has no such point, or does not compute it without an image.
        """
        if point not in self.parts:
            name = point.hook if point.layer is None else point.name
            raise SiteError(f"{name}, which this model does not have", "one of model.hook_names")
        if self._runs(point, beside_image):
            return self.parts[point]
        if not point.hook.startswith("resid"):
            raise SiteError(f"{point.name} in a run without an image, where this layer does not run", "a layer that runs", "show an image")
        next_layer = next((layer for layer in range(point.layer or 0, self.n_layers) if layer not in self.image_layers), None)
        if next_layer is None:
            return self.parts[Point("ln_final")].before()
        return self.parts[Point("resid_pre", next_layer)]

    def _runs(self, point: Point, beside_image: bool) -> bool:
        return beside_image or point.layer not in self.image_layers or HOOKS[point.hook].stage != BLOCKS

    def finish(self, logits: Tensor) -> Tensor:
        """Apply what follows the unembedding in the model: the logit scale and the soft cap."""
        scaled = logits if self.logit_scale == 1 else logits * self.logit_scale  # a product would copy them all
        if self.softcap is None:
            return scaled
        return self.softcap * (scaled / self.softcap).tanh()
