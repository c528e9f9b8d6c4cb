"""The how-to page does what it says. Run without the tests' type checks, as users do."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "how-to.md"

CHECKS = """
assert ssd.layers == tuple(range(8)) and pairs.harmless[1].label == "harmless"
assert model.batch(query, presentations.own).image.any() and not model.batch(query).image.any()
assert model.tokenizer.decode(model.batch("how ?", begun).inputs["input_ids"][0, -2:]) == "sure :"
assert len(set(warm)) > 1 and warm[1] == model.generate("how to mend the hat ?", grey, do_sample=True, temperature=3.0, seed=1)
expected = mine.vectors[0, 0] * 4
site = gl.Site(layers=(5,))
plain, moved = model.run(model.batch("how ?"), [iv.nothing, iv.add(mine, 4.0).at(layers=[5])], read=[site]).reads[site][:, 0, 0]
torch.testing.assert_close(moved - plain, expected, atol=1e-4, rtol=0)
assert len(cache) == 9 and states.shape[0] == 1 and states.shape[2] == model.cfg.d_model
assert not torch.allclose(logits, model.run_with_cache("how to mend the hat ?", grey)[0])
assert {"layers", "strength", "value"} <= set(rows.columns) and len(rates) == 4 and rates["asr"].between(0, 1).all()
"""


def test_its_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 8
    done = subprocess.run([sys.executable, "-W", "error", "-c", "".join(blocks) + CHECKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
