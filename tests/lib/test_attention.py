"""Attention on one device: the suite for every implementation, random masks, shapes, transformations and bad input."""

import pytest
from suites import attention as suite
from suites.attention import System


@pytest.mark.parametrize("system", [System("xla")], ids=str)
class TestXla(suite.AttentionSuite):
    pass
