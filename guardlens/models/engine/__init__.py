"""How interventions run: a request is compiled to taps, laid out on the rows of a batch, and driven through forward passes.

The words of this package:

    lane       one intervention in a run; every result has a lane axis
    tap        a function at one hook; the compiler turns interventions and reads into taps
    driver     runs taps inside a forward pass
    strategy   a way to run many lanes at once: tiles, branches, forks, answers
    tile       a copy of the batch for each lane, stacked along the batch dimension
    branch     a copy of the prompts' ends for each lane, which continues from the KV cache of the unedited prompts
    fork       a lane that continues the unedited run at the first layer that its intervention touches
    answer     tokens that are generated, or scored, after the prompts
    prefix     the tokens that all prompts of a batch begin with; one row of a KV cache serves them all

Branches of two prompts in two lanes. Each prompt's row of the KV cache is followed by copies of its last token, one per lane:

               KV cache of the prompts   |  computed in this forward pass
    prompt a   a1  a2  a3  a4  a5        |  a5 in lane 0   a5 in lane 1
    prompt b   pad b1  b2  b3  b4        |  b4 in lane 0   b4 in lane 1

A copy attends to the cached tokens before it (a1 to a4) and to the tokens of its own prompt and lane (itself). After a shared prefix p,
several prompts may share one row, since one row of the cache serves all of them:

               KV cache of the prefix    |  computed in this forward pass
    row 0      p1  p2  p3  p4            |  a5 in lane 0   b5 b6 in lane 0   a5 in lane 1   b5 b6 in lane 1
"""
