"""The linear recurrence: every rule and decay, in chunks and token by token, with documents and states."""

import numpy as np
import pytest

from striate import UserError
from suites.linear import (
    KINDS,
    alike,
    attend,
    check_decays,
    check_gradients,
    check_isolation,
    check_that_a_state_goes_on,
    check_values,
    first_state,
    kinds,
    problem,
)

FORMS = [{"implementation": "reference"}, {"implementation": "parallel"}, {"chunk": 32}]


@pytest.mark.parametrize("how", FORMS, ids=str)
@pytest.mark.parametrize("kind", kinds())
def test_every_form_is_the_recurrence(kind, how):
    check_values(problem(*kind), **how)


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_keys_may_resemble_each_other(share):
    given = alike(problem("delta", False, "token", length=200, strength=1e-3), share)
    check_values(given, chunk=64)
    check_gradients(given, chunk=64)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 48, 64, 128, 256])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_chunk_gives_the_same(kind, chunk):
    given = problem(*kind, length=300)
    check_values(given, chunk=chunk)
    check_gradients(given, before=first_state(given), chunk=chunk)


@pytest.mark.long
@pytest.mark.parametrize("kind", kinds())
def test_gradients_are_those_of_the_recurrence(kind):
    given = problem(*kind)
    check_gradients(given, before=first_state(given), chunk=32)


@pytest.mark.parametrize("kind", kinds())
def test_a_state_goes_on_where_it_was_left(kind):
    check_that_a_state_goes_on(problem(*kind), (0, 20, 21, 22, 75), chunk=16)


@pytest.mark.long
@pytest.mark.parametrize("strength", [1e-6, 50.0, 1e4])
@pytest.mark.parametrize("kind", [kind for kind in kinds() if "none" not in kind.id])
def test_weak_and_strong_decays(kind, strength):
    check_decays(problem(*kind, strength=strength))


@pytest.mark.long
@pytest.mark.parametrize("kind", kinds())
def test_a_document_changes_no_bit_of_another(kind):
    check_isolation(kind, length=100, chunk=16)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"rule": "sums"}, "rule 'sums' is not known; there are 'sum', 'delta'"),
        ({"beta": np.ones((2, 75, 2), np.float32)}, "beta has shape .* under the rule 'sum'"),
        ({"log_decay": np.zeros(3, np.float32)}, r"log_decay has shape \(3,\); it needs one of \(2,\), \(2, 75, 2\)"),
        ({"q": np.ones((2, 75, 3, 8), np.float32)}, "heads a multiple of k's heads"),
        ({"v": np.ones((2, 74, 2, 8), np.float32)}, "do not fit"),
    ],
)
def test_bad_input_is_answered(change, answer):
    with pytest.raises(UserError, match=answer):
        attend(problem("sum", False, "none")._replace(**change))
    with pytest.raises(UserError, match="chunk is 0"):
        attend(problem("sum", False, "none"), chunk=0)
