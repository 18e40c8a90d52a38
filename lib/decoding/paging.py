"""Attention over keys and values that lie in pages: where a row's tokens are is said by a table."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from striate.lib import masks, scores
from striate.lib.attention import attention, check_arrays, check_language, choose
from striate.lib.errors import UserError
from striate.lib.masks import Mask
from striate.lib.scores import LowRankBias, Score
from striate.lib.tokens import Tokens

HELD = "_held"  # 1 for the tokens of a page that is there


def paged_attention(
    q_BTHD: jax.Array,
    k_PLKD: jax.Array,
    v_PLKV: jax.Array,
    table_BN: jax.Array,
    *,
    q_tokens: Tokens,
    k_tokens: Tokens,
    mask: Mask | None = None,
    score: Score | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_lse: bool = False,
):
    """Attention to keys and values in pages of L tokens, which the rows of a batch share as the table says.

    Kernels read the pages where they lie, each once, and those that the mask hides never; for a mask with switches per
    head they read them once for each formula. That of a TPU takes up to 16 queries and pages of a multiple of 128
    tokens, or, where widths are multiples of 128, of 8, 16, 32 or 64. That of a GPU ("pallas_gpu") takes up to 128
    queries of a group of heads, widths that are multiples of 64 and pages of a multiple of 8 tokens. Elsewhere, for
    more queries, for other pages and for a low-rank bias the pages of a row are put together first, and so they are for
    gradients.

    Args:
      q_BTHD: queries, (batch, length, heads, head_dim), a floating dtype.
      k_PLKD, v_PLKV: (pages, L, key/value heads, head_dim) and (pages, L, key/value heads, value width).
      table_BN: int32 (batch, N): the page that holds the tokens i L .. (i + 1) L - 1 of a row. One that is negative
        holds none: nobody sees them.
      q_tokens: Tokens of the queries, (batch, length).
      k_tokens: Tokens of the keys, (batch, N L), in the order of the table; the document of an empty slot is -1.
      others: as in `striate.attention`.

    Returns:
      out, and with return_lse also lse, as `striate.attention`.

    Raises:
      UserError: shapes, dtypes or Tokens that do not fit together.
      NotImplementedError: an implementation asked for by name that cannot run here.

    Source: Kwon et al. 2023 (PagedAttention), section 4.1.
    """
    mask, score = masks.everything() if mask is None else mask, scores.plain() if score is None else score
    _check(q_BTHD, k_PLKD, v_PLKV, table_BN, q_tokens, k_tokens)
    check_language(mask, score, q_BTHD.shape[2], q_tokens, k_tokens)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else float(scale)
    form = choose(implementation, None, q_BTHD.dtype)
    held = jnp.repeat((table_BN >= 0).astype(jnp.int32), k_PLKD.shape[1], axis=1)
    arrays = score, q_BTHD, k_PLKD, v_PLKV, table_BN, q_tokens, k_tokens.replace(**{HELD: held})
    mask = mask & masks.key(HELD, 1, 1)
    in_place = form.startswith("pallas") and _fits(form, score, q_BTHD, k_PLKD, v_PLKV)
    out, lse = (_in_place if in_place else _put_together)(mask, scale, form, *arrays)
    return (out, lse) if return_lse else out


def _put_together(mask, scale, form, score, q, k_pages, v_pages, table, q_tokens, k_tokens):
    """Copies the pages of every row, then attends."""

    def whole(pages):
        # A page that is not there is nobody's: any other may stand for it.
        return pages[jnp.maximum(table, 0)].reshape(len(table), -1, *pages.shape[2:])

    how = {"mask": mask, "score": score, "scale": scale, "implementation": form, "return_lse": True}
    return attention(q, whole(k_pages), whole(v_pages), q_tokens=q_tokens, k_tokens=k_tokens, **how)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_place(mask, scale, form, score, q, k_pages, v_pages, table, q_tokens, k_tokens):
    heads, pages = q.shape[2], table.shape[1]
    out, lse = jnp.zeros((*q.shape[:3], v_pages.shape[3]), v_pages.dtype), jnp.zeros(q.shape[:3], jnp.float32)
    fields = q_tokens.as_queries().fields(), k_tokens.fields()
    in_tiles = jax.tree.map(lambda x: x.astype(jnp.float32), score)
    for formula, members in mask.by_formula(heads).items():
        kernel = _kernel(form).over_pages(formula, scale, q, k_pages, pages, interpret=form.endswith("interpret"))
        own = kernel.attend_pages(in_tiles, q, k_pages, v_pages, table, *fields)
        chosen = jnp.isin(jnp.arange(heads), jnp.array(members))
        out = jnp.where(chosen[None, None, :, None], own[0].astype(out.dtype), out)
        lse = jnp.where(chosen[None, None], own[1], lse)
    return score.finish(out, lse)


def _forward(mask, scale, form, *arrays):
    return _in_place(mask, scale, form, *arrays), arrays


def _backward(mask, scale, form, arrays, cotangents):
    *differentiable, table, q_tokens, k_tokens = arrays
    _, pull = jax.vjp(lambda *x: _put_together(mask, scale, form, *x, table, q_tokens, k_tokens), *differentiable)
    return (*pull(cotangents), None, None, None)


_in_place.defvjp(_forward, _backward)


def _kernel(form: str):
    """The kernel of few queries that reads pages."""
    # Imported when asked for: Pallas takes a moment.
    if "gpu" in form:
        from striate.pallas_kernels.gpu.attention import Few

        return Few
    from striate.pallas_kernels.tpu.decode import Decode

    return Decode


def _fits(form: str, score, q_BTHD, k_PLKD, v_PLKV) -> bool:
    """Whether the kernel takes these arrays as they are."""
    parts = score.parts if isinstance(score, scores.Composed) else (score,)
    fits = _kernel(form).takes_pages(q_BTHD, k_PLKD, v_PLKV)
    return fits and not any(isinstance(part, LowRankBias) for part in parts)


def _check(q, k_pages, v_pages, table, q_tokens, k_tokens) -> None:
    """Raises UserError for shapes, dtypes or Tokens that do not fit together."""
    if table.ndim != 2 or not jnp.issubdtype(table.dtype, jnp.integer):
        raise UserError(
            f"The table of pages has shape {table.shape} and dtype {table.dtype}; it needs integers (batch, pages of a "
            "row)."
        )
    if len(table) != len(q):
        raise UserError(f"The table of pages has {len(table)} rows and q {len(q)}: it needs one for each.")
    if k_pages.ndim != 4 or v_pages.ndim != 4 or k_pages.shape[:3] != v_pages.shape[:3]:
        raise UserError(
            f"Pages of keys {k_pages.shape} and of values {v_pages.shape} do not fit: they need (pages, tokens of a "
            "page, key/value heads, width), the first three alike."
        )
    length = table.shape[1] * k_pages.shape[1]
    # As the arrays that the pages of all rows would make.
    whole = [jax.ShapeDtypeStruct((len(table), length, *x.shape[2:]), x.dtype) for x in (k_pages, v_pages)]
    check_arrays(q, *whole)
    for name, tokens, shape in (("q_tokens", q_tokens, q.shape[:2]), ("k_tokens", k_tokens, (len(table), length))):
        if tokens.shape != shape:
            raise UserError(
                f"{name} have shape {tokens.shape}; they need {shape}: (batch, length of the table's pages)."
            )
