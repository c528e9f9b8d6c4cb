"""How much goes into one forward pass. Every limit of the engine stands here."""

BRANCH_TOKENS_PER_FORWARD = 4096
"""Copied tokens of all branches in one forward pass."""

BRANCH_TOKENS_PER_ROW = 1024
"""Copied tokens of branches in one row. Attention is quadratic in them: each attends to all others of its row, masked or not."""

TILES_PER_FORWARD = 4
"""Copies of the batch in one forward pass. More would not be halved together with a batch that does not fit in memory."""

LOGIT_ROWS = 48
"""Tokens whose logits are computed at once while they are taken lane by lane. Fewer would read the unembedding's weights too often."""

PREFIX_ROW_TOKENS = 256
"""Tokens that a row after a shared prefix may always hold, however short the prefix is."""

PREFIX_WORTH_TOKENS = 256
"""Tokens that a shared prefix must save in a batch to be computed by itself."""
