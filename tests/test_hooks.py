import numpy as np
import pytest

from guardlens import errors
from guardlens.hooks import HOOKS, Point, Site, as_layers, hook_names, parse


@pytest.mark.parametrize(
    ("old", "new"),
    [("hook_resid_pre", "hook_in"), ("hook_attn_out", "attn.hook_out"), ("hook_mlp_out", "mlp.hook_out"), ("hook_resid_post", "hook_out")],
)
def test_both_generations_of_names_mean_the_same_point(old, new):
    assert parse(f"blocks.3.{old}") == parse(f"blocks.3.{new}") == Point(old.removeprefix("hook_"), 3)
    assert parse(f"blocks.3.{new}").name == f"blocks.3.{old}"
    assert parse("blocks.3.mlp.out.hook_in").name == "blocks.3.mlp.hook_post"


def test_short_names_leave_the_layer_open():
    assert parse("resid_post") == parse("hook_resid_post") == Point("resid_post", None)
    assert parse("hook_embed") == Point("embed") and parse("ln_final.hook_out") == Point("ln_final")


def test_hook_names_are_in_order_of_execution():
    kinds = (*("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.hook_pattern"),
             *("hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out", "hook_resid_post"))  # fmt: skip
    eye = ["vision.blocks.0.hook_resid_post", "vision.blocks.1.hook_resid_post", "projector.hook_out"]
    blocks = [f"blocks.{layer}.{kind}" for layer in (0, 1) for kind in kinds]
    expected = ["hook_embed", *eye, *blocks, "ln_final.hook_normalized", "ln_final.hook_out", "unembed.hook_out"]
    assert hook_names(2) == expected
    assert sorted(map(parse, reversed(expected)), key=lambda point: point.order) == [parse(name) for name in expected]


def test_layers_beyond_nine_sort_as_numbers():
    assert [point.layer for name in hook_names(12) if (point := parse(name)).hook == "resid_post"] == list(range(12))


@pytest.mark.parametrize("name", ["projector", "vision.blocks.0.hook_resid_post", "pattern"])
def test_a_site_needs_a_vector_per_token(name):
    with pytest.raises(errors.SiteError, match=r"has no vector per token of the prompt[\s\S]*model.run_with_cache"):
        Site(name)


def test_unknown_name_suggests_the_closest():
    with pytest.raises(
        errors.SiteError,
        match=r"Found the hook name 'blocks.7.hook_resid_pots'.\nExpected.*\nNext: did you mean 'blocks.7.hook_resid_post'",
    ):
        parse("blocks.7.hook_resid_pots")
    with pytest.raises(errors.SiteError, match=r"did you mean 'mlp_out'"):
        parse("mlpout")


@pytest.mark.parametrize("name", ["blocks.0.mlp.hook_pre", "blocks.0.hook_attn_in", "blocks.2.attn.hook_result"])
def test_a_name_that_is_like_no_other_suggests_none(name):
    with pytest.raises(errors.SiteError, match=r"Found the hook name '.*'\.\n.*\nNext: choose one of those; this one is not offered"):
        parse(name)


def test_negative_layers_in_a_name():
    with pytest.raises(errors.SiteError, match=r"a negative layer in 'blocks.-1.hook_resid_post'\.\nExpected layers counted from 0"):
        parse("blocks.-1.hook_resid_post", 4)


def test_what_adds_up_to_the_residual_stream_is_one_space():
    one = {name for name, hook in HOOKS.items() if hook.space == "resid_post"}
    assert one == {"embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"}
    assert all(HOOKS[name].space == name for name in HOOKS.keys() - one)


def test_layer_out_of_range():
    with pytest.raises(errors.SiteError, match=r"Found layer 4\.\nExpected a layer from 0 to 3\.\nNext: choose one"):
        parse("blocks.4.hook_out", n_layers=4)
    with pytest.raises(errors.SiteError, match=r"Found layer=-1\.\nExpected a whole number, 0 or more"):
        Site(layers=(-1,))
    assert parse("blocks.3.hook_out", n_layers=4).layer == 3


def test_site_is_normalised_and_hashable():
    assert Site("blocks.3.hook_out") == Site("resid_post", (3,)) and hash(Site("blocks.3.hook_out")) == hash(Site("resid_post", (3,)))
    assert Site(layers=(5, 1, 5)).layers == (1, 5)
    assert as_layers(3) == (3,) and as_layers(None) is None and as_layers(range(2)) == (0, 1)
    assert [type(layer) for layer in as_layers(np.arange(2)) or ()] == [int, int]
    assert Site().points(2) == (Point("resid_post", 0), Point("resid_post", 1))
    assert Site("ln_final").points(2) == (Point("ln_final"),) and not Site("ln_final").free
    assert Site("blocks.3.hook_out", (3,)) == Site("resid_post", (3,)) and not Site(layers=(3,)).free and Site().free


def test_places_that_contradict_themselves():
    with pytest.raises(errors.SiteError, match=r"Found the layers \[5\] beside the hook blocks.3.hook_resid_post.*\n.*\nNext: say hook="):
        Site("blocks.3.hook_resid_post", (5,))
    with pytest.raises(errors.SiteError, match=r"Found the layers \[5\] of hook_embed, which is in no layer"):
        Site("embed", (5,))


@pytest.mark.parametrize("positions", ["first", (3, 3), (3, 1), (-1, -2)])
def test_bad_positions(positions):
    with pytest.raises(errors.SiteError, match=r"Found the positions [\s\S]*Expected one of 'last'[\s\S]*Next: name tokens of the prompt"):
        Site(positions=positions)


@pytest.mark.parametrize("positions", ["image", (None, None), (0, 2), (-3, -1), (2, -1), (-2, None)])
def test_good_positions(positions):
    assert Site(positions=positions).positions == positions
