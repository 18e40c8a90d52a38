"""Efficient Attention: queries are a softmax over features, and each feature of the keys one over the tokens.

It sees later tokens, so that there is no experiment of the next token.
"""

from striate.configs.schema import System

system = System(
    paper="Shen et al. 2021, Efficient Attention",
    form='Layer(mixer="efficient")',
    tests="tests/models/test_bidirectional.py",
    asks={
        "time of twice as many tokens, least": (">=", 1.6),
        "time of twice as many tokens, most": ("<=", 2.6),
        "the same of the product with all pairs, least": (">=", 3.0),
    },
)
