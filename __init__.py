"""striate: attention on long sequences. Any mask, any token order, any mesh; see README.md and docs/design.md."""

from striate.lib import layouts, masks, parallel, positions, scores
from striate.lib.attention import attention, merge
from striate.lib.errors import UserError
from striate.lib.linear_attention import linear_attention
from striate.lib.tokens import Tokens

__all__ = [
    "Tokens",
    "UserError",
    "attention",
    "layouts",
    "linear_attention",
    "masks",
    "merge",
    "parallel",
    "positions",
    "scores",
]
