"""What was found of a model: its parts, its sizes, and which of its parts a run computes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from guardlens.errors import SiteError
from guardlens.hooks import BLOCKS, EYE, HOOKS, Point
from guardlens.models.architectures.parts import Part


@dataclass(frozen=True)
class Architecture:
    """The parts of a Hugging Face model, and its sizes.

    Attributes:
        parts: Where the value of each hook is.
        decoder: Path of the language model's stack of blocks.
        blocks: Path of each block.
        norm: Path of the final norm.
        unembed: Path of the unembedding.
        n_layers: Blocks of the language model.
        d_model: Width of its residual stream.
        n_heads: Attention heads in a block.
        n_kv_heads: Heads of keys and values.
        d_head: Width of a head; 0 where blocks differ, or queries and values, or it was not found.
        d_mlp: Number of neurons of an MLP; 0 where blocks differ, or it was not found.
        d_vocab: Size of the vocabulary.
        image_token_id: The token that stands for an image; None for a text-only model.
        image_size: Side of the square images that the vision tower sees, in pixels, where its config says so.
        proven: Whether the family is one that the tests run on.
        image_layers: Blocks that run only beside an image (cross-attention).
        residual_scale: What attention and MLP are multiplied by before they are added to the residual stream.
        logit_scale: What the unembedding's output is multiplied by.
        softcap: c of c tanh(logits / c), the last step to the logits; None without.
        packed: Inputs that have the images of all prompts behind each other in their last axis.
        narrows: Whether the last blocks compute only the tokens whose logits are asked for, unless all are.
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
        """All points of the model, in order of execution."""
        return sorted(self.parts, key=self._order)

    @cached_property
    def rank(self) -> dict[Point, int]:
        """Point -> its place in the order of execution."""
        return {point: place for place, point in enumerate(self.points)}

    def _order(self, point: Point) -> tuple[int | float, ...]:
        """The eye before the embedding where blocks see the image by cross-attention; patterns last of an attention that is read inside."""
        pattern = self.parts.get(Point("pattern", point.layer))
        if point.hook == "embed" and self.image_layers:
            return EYE, float("inf"), float("inf")
        if point.hook == "attn_out" and pattern and self.parts[point].path.startswith(f"{pattern.path}."):
            return (*point.order[:2], HOOKS["pattern"].rank - 0.5)
        return point.order

    @property
    def widths(self) -> dict[str, int]:
        """Width of the vectors at each kind of hook; see `guardlens.hooks.Hook.width`."""
        sizes = {"d_model": self.d_model, "vocab": self.d_vocab} | ({"neurons": self.d_mlp} if self.d_mlp else {})
        return sizes | ({"heads": self.n_heads * self.d_head, "kv_heads": self.n_kv_heads * self.d_head} if self.d_head else {})

    def computed(self, beside_image: bool) -> list[Point]:
        """The points that a run computes: without an image, of the blocks of `image_layers` only the residual stream, which passes them."""
        return [
            point
            for point in self.points
            if beside_image or ((self._runs(point, False) or point.hook.startswith("resid")) and HOOKS[point.hook].stage != EYE)
        ]

    def locate(self, point: Point, beside_image: bool = True) -> Part:
        """Where a point's value is.

        Args:
            point: The hook and the layer.
            beside_image: Whether the run sees an image. Without one, the residual stream passes the blocks of `image_layers` unchanged,
                so it is found at the next block that runs.

        Raises:
            SiteError: This model has no such point, or does not compute it without an image.
        """
        if point not in self.parts:
            name = point.hook if point.layer is None else point.name
            raise SiteError(f"{name}, which this model does not have", "one of model.hook_names", "choose another hook or layer")
        if self._runs(point, beside_image):
            return self.parts[point]
        if not point.hook.startswith("resid"):
            raise SiteError(f"{point.name} in a run without an image, where this block does not run", "a block that runs", "show an image")
        layer = next((layer for layer in range(point.layer or 0, self.n_layers) if layer not in self.image_layers), None)
        return self.parts[Point("ln_final")].before() if layer is None else self.parts[Point("resid_pre", layer)]

    def _runs(self, point: Point, beside_image: bool) -> bool:
        return beside_image or point.layer not in self.image_layers or HOOKS[point.hook].stage != BLOCKS

    def finish(self, logits: Tensor) -> Tensor:
        """What the model does to the unembedding's output: a scale, a cap."""
        scaled = logits * self.logit_scale
        return scaled if self.softcap is None else self.softcap * (scaled / self.softcap).tanh()
