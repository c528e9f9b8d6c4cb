import numpy as np
import pytest
import torch

from guardlens import ActivationCache, errors
from guardlens.hooks import Point


@pytest.fixture
def cache():
    points = [Point("embed"), *(Point(hook, layer) for layer in range(3) for hook in ("resid_pre", "resid_post"))]
    return ActivationCache({point: torch.full((1, 2, 4), float(i)) for i, point in enumerate(points)}, n_layers=3)


def test_cache_lookups(cache):
    same = [cache["blocks.2.hook_resid_post"], cache["blocks.2.hook_out"], cache["resid_post", 2], cache["resid_post", -1]]
    assert all(tensor is same[0] for tensor in same) and float(same[0].mean()) == 6
    assert cache["embed"] is cache["hook_embed"] and list(cache)[1] == "blocks.0.hook_resid_pre" and len(cache) == 7
    assert ("resid_post", 1) in cache and ("resid_post", 3) not in cache and "resid_post" not in cache and 3 not in cache
    assert cache.stack("resid_post")[:, 0, 0, 0].tolist() == [2, 4, 6]
    assert dict(cache).keys() == set(cache)


def test_a_cache_is_a_mapping(cache):
    assert cache.get(("resid_post", 1)) is cache["resid_post", 1] and cache.get("embed", 0) is cache["embed"]
    for lacking in (
        "mlp_out",
        ("mlp_out", 1),
        ("resid_post", 7),
        ("resid_post", 1.0),
        ("resid_post", None),
        "resid_pots",
        5,
        None,
        ("a",),
        (),
    ):
        assert lacking not in cache and cache.get(lacking) is None and cache.get(lacking, 0) == 0
        with pytest.raises(KeyError) as caught:
            cache[lacking]
        assert isinstance(caught.value, errors.SiteError)
    assert cache["resid_post", np.int64(2)] is cache["resid_post", 2]


def test_cache_says_what_it_holds(cache):
    with pytest.raises(
        errors.SiteError,
        match=r"Found no \('mlp_out', 1\) in this cache\.\nExpected what it holds: embed, resid_pre, resid_post\.\nNext: ask for it",
    ):
        cache["mlp_out", 1]
    some = ActivationCache({Point("resid_post", layer): torch.zeros(1, 2, 4) for layer in (0, 2)}, n_layers=3)
    with pytest.raises(errors.SiteError, match=r"no \('resid_post', 1\) in this.*\nExpected a layer of resid_post that it holds: \[0, 2\]"):
        some["resid_post", 1]
    with pytest.raises(errors.SiteError, match=r"no 'attn_out' in this cache"):
        cache.stack("attn_out")
    with pytest.raises(errors.SiteError, match=r"did you mean 'resid_post'"):
        cache["resid_pots", 1]
    with pytest.raises(errors.SiteError, match=r"no 'blocks.0.attn.hook_pattern'.*\n.*\nNext: load the model with attn_impl.*eager"):
        cache["blocks.0.attn.hook_pattern"]
    for key in ("resid_post", "hook_resid_post"):
        with pytest.raises(
            errors.SiteError, match=rf"'{key}' without a layer\.\nExpected one, as in \('resid_post', 3\).*\n.*cache.stack\('resid_post'\)"
        ):
            cache[key]


def test_a_saved_cache_is_read_back(cache, tmp_path):
    scaled = ActivationCache({Point(*p): cache[p] for p in (("resid_post", 2), ("resid_pre", 0))}, 3, residual_scale=0.5)
    scaled.save(tmp_path / "c")
    loaded = ActivationCache.load(tmp_path / "c")
    assert list(loaded) == ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"] and loaded._residual_scale == 0.5
    assert torch.equal(loaded["resid_post", -1], cache["resid_post", 2]) and torch.equal(loaded["resid_pre", 0], cache["resid_pre", 0])
    with pytest.raises(errors.SiteError, match="a cache without its model"):
        loaded.logit_lens()
