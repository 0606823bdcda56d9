"""The oracle: W' from the papers' formulas, built naively, entry by entry or row by row, in float64.

Imports nothing of the package's and uses none of torch's matrix functions, so that a mistake is not shared. Everything
is made of differentiable steps: its gradients are the oracle's too. Slow on purpose; for matrices of a few dozen rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import factorial

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------ small linear algebra


def mul(a: Tensor, b: Tensor) -> Tensor:
    """a b, the sum over k of column k of a times row k of b; for matrices, vectors and stacks."""
    if a.ndim == 1:
        return mul(a[None], b)[0]
    if b.ndim == 1:
        return mul(a, b[:, None])[..., 0]
    return sum(a[..., :, k, None] * b[..., None, k, :] for k in range(b.shape[-2]))


def chain(*factors: Tensor) -> Tensor:
    """The product of several matrices, left to right."""
    result = factors[0]
    for factor in factors[1:]:
        result = mul(result, factor)
    return result


def t(a: Tensor) -> Tensor:
    return torch.stack([torch.stack([row[..., j] for row in a.unbind(-2)], -1) for j in range(a.shape[-1])], -2)


def eye(n: int) -> Tensor:
    return torch.tensor([[float(i == j) for j in range(n)] for i in range(n)], dtype=torch.float64)


def _each(one, stack: Tensor) -> Tensor:
    """`one` on every matrix of a stack."""
    return torch.stack([_each(one, a) for a in stack]) if stack.ndim > 2 else one(stack)


def diag(d: Tensor) -> Tensor:
    if d.ndim > 1:
        return torch.stack([diag(each) for each in d])
    zero = d.new_zeros(())
    return torch.stack([torch.stack([d[i] if i == j else zero for j in range(len(d))]) for i in range(len(d))])


def block_diag(blocks: Tensor) -> Tensor:
    count, rows, columns = blocks.shape
    whole = blocks.new_zeros(count * rows, count * columns)
    for b, i, j in product(range(count), range(rows), range(columns)):
        whole[b * rows + i, b * columns + j] = blocks[b, i, j]
    return whole


def kron(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 1:
        return torch.cat([x * b for x in a])
    return torch.cat([torch.cat([x * b for x in row], 1) for row in a], 0)


def skew(a: Tensor) -> Tensor:
    return a - t(a)


def solve(a: Tensor, b: Tensor) -> Tensor:
    """x with a x = b, by Gauss-Jordan elimination with pivots."""
    rows = [torch.cat([x, y]) for x, y in zip(a, b)]
    for k in range(len(rows)):
        best = max(range(k, len(rows)), key=lambda i: rows[i][k].abs().item())
        rows[k], rows[best] = rows[best], rows[k]
        rows[k] = rows[k] / rows[k][k]
        rows = [row if i == k else row - row[k] * rows[k] for i, row in enumerate(rows)]
    return torch.stack([row[len(rows):] for row in rows])


def cayley(k: Tensor) -> Tensor:
    """(I - k/2)⁻¹ (I + k/2)."""
    return _each(lambda m: solve(eye(len(m)) - m / 2, eye(len(m)) + m / 2), k)


def expm(k: Tensor, halvings: int = 6, terms: int = 14) -> Tensor:
    """The power series of e^(k / 2^halvings), then squared as often."""
    power, result = None, 0
    for term in range(terms):
        power = _each(lambda m: eye(len(m)), k) if power is None else mul(power, k / 2**halvings)
        result = result + power / factorial(term)
    for _ in range(halvings):
        result = mul(result, result)
    return result


def reflect(u: Tensor) -> Tensor:
    """Π (I - 2 u uᵀ / uᵀu), the first column's mirror leftmost."""
    result = eye(u.shape[0])
    for k in range(u.shape[1]):
        column = u[:, k]
        mirror = eye(len(column)) - 2 * column[:, None] * column[None, :] / (column * column).sum()
        result = mul(result, mirror)
    return result


def inverse(a: Tensor) -> Tensor:
    return _each(lambda m: solve(m, eye(len(m))), a)


def singular_parts(a: Tensor, k: int, sweeps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, Vᵀ) of the k largest singular values, by Jacobi's rotations of pairs of columns until all are
    perpendicular; the largest entry of each left vector is positive."""
    is_wide = a.shape[1] > a.shape[0]
    columns, turned = [*a.unbind(0 if is_wide else 1)], [*eye(min(a.shape))]
    for _, i, j in product(range(sweeps), range(len(columns)), range(len(columns))):
        off = (columns[i] * columns[j]).sum()
        if i < j and off.item():
            angle = torch.atan2(2 * off, (columns[i] * columns[i]).sum() - (columns[j] * columns[j]).sum()) / 2
            for each in (columns, turned):
                each[i], each[j] = (angle.cos() * each[i] + angle.sin() * each[j],
                                    angle.cos() * each[j] - angle.sin() * each[i])
    best = sorted(range(len(columns)), key=lambda i: -norm(columns[i]).item())[:k]
    s = torch.stack([norm(columns[i]) for i in best])
    sides = torch.stack([columns[i] / norm(columns[i]) for i in best]), torch.stack([turned[i] for i in best])
    u, v = sides[::-1] if is_wide else sides
    signs = torch.stack([row[row.abs().argmax()].sign() for row in u])
    return t(u * signs[:, None]), s, v * signs[:, None]


def norm(a: Tensor) -> Tensor:
    return (a * a).sum().sqrt()


def row_norm(a: Tensor) -> Tensor:
    return torch.stack([row_norm(m) for m in a]) if a.ndim > 2 else torch.stack([norm(row) for row in a])


def col_norm(a: Tensor) -> Tensor:
    return torch.stack([col_norm(m) for m in a]) if a.ndim > 2 else torch.stack([norm(row) for row in a.unbind(1)])


def detach(a: Tensor) -> Tensor:
    return a.detach()


# ------------------------------------------------------------------------------------- the layer's map, run with W'


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y_o = Σ_i W'[o, i] x_i + b'_o."""
    y = torch.stack([(x * row).sum(-1) for row in weight], -1)
    return y if bias is None else y + bias


def embedding(ids: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = torch.stack([weight[int(i)] for i in ids.flatten()])
    return rows.reshape(*ids.shape, -1)


def in_groups(groups: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A convolution whose channels are as many equal parts, each with its own run of the rows of W."""
    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        parts = zip(x.chunk(groups, 1), weight.chunk(groups), [None] * groups if bias is None else bias.chunk(groups))
        return torch.cat([convolution(*part) for part in parts], 1)

    return run


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: int = 3) -> Tensor:
    """Every patch of the input [b, c, *space] as one row; stride 1, no padding; one or two axes of space."""
    places = list(product(*(range(n - kernel + 1) for n in x.shape[2:])))
    windows = [(..., *(slice(p, p + kernel) for p in place)) for place in places]
    columns = torch.stack([linear(x[window].flatten(1), weight, bias) for window in windows], -1)
    return columns.reshape(*columns.shape[:2], *(n - kernel + 1 for n in x.shape[2:]))


# ----------------------------------------------------------------------------------- W' of the methods, by their papers


def low_rank(p, rank: int, alpha: float, step: str = "add_low_rank") -> Tensor:
    """(α / r) B A (arXiv 2106.09685, section 4.1)."""
    return (alpha / rank) * mul(p[step, "B"], p[step, "A"])


def gains(p, step: str) -> Tensor:
    return diag(p[step, "d"])


def magnitude(w: Tensor, p, step: str = "post_magnitude") -> Tensor:
    """diag(m / ‖W‖_row), the norm a constant to the gradient (arXiv 2402.09353, equation 5 and section 4.3)."""
    return diag(p[step, "m"] / row_norm(w).detach())


def rotation(p, step: str) -> Tensor:
    """The Cayley map of C Dᵀ - D Cᵀ (arXiv 2511.00051)."""
    c, d = p[step, "C"], p[step, "D"]
    return cayley(mul(c, t(d)) - mul(d, t(c)))


def first_order_rotation(p, scale: float, step: str = "post_skew_rotation") -> Tensor:
    """I + s (D Cᵀ - C Dᵀ), s = min(1, scale / (‖C‖ + ‖D‖ + 1e-6)): SORA's reference code."""
    c, d = p[step, "C"], p[step, "D"]
    s = scale / (norm(c) + norm(d) + 1e-6)
    return eye(c.shape[0]) + (s if s.item() < 1 else 1.0) * (mul(d, t(c)) - mul(c, t(d)))


def block_rotation(p, step: str) -> Tensor:
    """A Cayley rotation for each block (arXiv 2306.07280)."""
    return block_diag(cayley(skew(p[step, "Q"])))


def reflections(p, step: str) -> Tensor:
    """H(u_1) ... H(u_k) H(v_k) ... H(v_1)."""
    return mul(reflect(p[step, "U"]), t(reflect(p[step, "V"])))


# --------------------------------------------------------------------- the published methods of specs/, entry by entry


def near_rotation(p, eps: float, step: str = "pre_near_rotation") -> Tensor:
    """OFT's rotation, half of each block's skew part brought back to a norm of at most eps / √(number of blocks)."""
    halves = [skew(q) / 2 for q in p[step, "Q"]]
    radius = eps / len(halves)**0.5
    near = [half if norm(half) <= radius else radius / norm(half) * half for half in halves]
    return block_diag(torch.stack([cayley(2 * half) for half in near]))


def pair_map(first: Tensor, second: Tensor, group: int) -> Tensor:
    """y_i = first_i x_i ∓ second_i x_j, j half a group on (minus) or back (plus): RoAd (arXiv 2409.00119, eq. 4)."""
    n, half = len(first), group // 2
    rows = []
    for i in range(n):
        row = [first.new_zeros(())] * n
        row[i] = first[i]
        is_lower = i % group < half
        row[i + half if is_lower else i - half] = -second[i] if is_lower else second[i]
        rows.append(torch.stack(row))
    return torch.stack(rows)


def in_pairs(values: Tensor) -> Tensor:
    """One number for each pair [groups, half] as one for each entry, both of a pair alike."""
    return torch.cat([torch.cat([row, row]) for row in values])


def shared_low_rank(p, step: str = "add_shared_low_rank") -> Tensor:
    return chain(diag(p[step, "b"]), p[step, "B"], diag(p[step, "d"]), p[step, "A"])


def bounded(w: Tensor, p, rank: int, step: str = "add_bounded") -> Tensor:
    """Σ_k λ / (r ‖a_k‖ ‖b_k‖) b_k a_kᵀ, its column j times ‖w_j‖."""
    a, b = p[step, "A"], p[step, "B"]
    terms = [p[step, "l"] / rank / (norm(a[k]).clamp(min=1e-4) * norm(b[:, k]).clamp(min=1e-4)) * b[:, k, None] * a[k]
             for k in range(rank)]
    return sum(terms) * col_norm(w).detach()


def block_grid(p, rank: int, alpha: float, grid: int, step: str = "add_block_grid") -> Tensor:
    """Block (i, j) is B_i's slice j times A_j's slice i (arXiv 2505.20355)."""
    a, b, k = p[step, "A"], p[step, "B"], rank // grid
    at = [slice(i * k, (i + 1) * k) for i in range(grid)]
    rows = [torch.cat([mul(b[i][:, at[j]], a[j][at[i]]) for j in range(grid)], 1) for i in range(grid)]
    return alpha / rank * torch.cat(rows, 0)


def repeated(m: Tensor, columns: int) -> Tensor:
    """Column j is the column j mod r of M."""
    return torch.stack([m[:, j % m.shape[1]] for j in range(columns)], 1)


def block_affine(w: Tensor, m: Tensor) -> Tensor:
    """What is added to each block W_ij: W_ij M_i + M_i."""
    r = m.shape[1]
    rows = [torch.cat([mul(w[i * r:(i + 1) * r, j * r:(j + 1) * r], m[i]) + m[i] for j in range(w.shape[1] // r)], 1)
            for i in range(len(m))]
    return torch.cat(rows, 0)


def circulants(c: Tensor) -> Tensor:
    """Entry (i, j) of block (p, q) is c[p, q, (j - i) mod b]."""
    blocks, across, b = c.shape
    return torch.stack([torch.stack([c[p, q, (j - i) % b] for q in range(across) for j in range(b)])
                        for p in range(blocks) for i in range(b)])


def scattered(values: Tensor, places: Tensor, rows: int, columns: int) -> Tensor:
    zero = values.new_zeros(())
    entries = [sum((value for value, at in zip(values, places) if int(at) == k), zero) for k in range(rows * columns)]
    return torch.stack(entries).reshape(rows, columns)


def in_their_columns(c: Tensor, places: Tensor, columns: int) -> Tensor:
    """Column k of c stands at place k among columns of zeros, several at one place added up."""
    zero = c.new_zeros(len(c))
    return torch.stack([sum((c[:, k] for k, place in enumerate(places) if int(place) == j), zero)
                        for j in range(columns)], 1)


def spectrum(s: Tensor) -> Tensor:
    """The real part of the inverse Fourier transform: Σ s_uv cos(2π (u i / m + v j / n)) / (m n)."""
    m, n = s.shape
    u, v = (torch.arange(k, dtype=torch.float64) for k in (m, n))
    return torch.stack([torch.stack([(s * torch.cos(2 * torch.pi * (u[:, None] * i / m + v * j / n))).sum() / (m * n)
                                     for j in range(n)]) for i in range(m)])


def haar(s: Tensor) -> Tensor:
    """One level of the inverse Haar transform: entries 2 i and 2 i + 1 are (a_i ± d_i) / √2, rows, then columns."""
    def columns(x: Tensor) -> Tensor:
        half = len(x) // 2
        return torch.stack([(x[i // 2] + (1 - 2 * (i % 2)) * x[half + i // 2]) / 2**0.5 for i in range(len(x))])

    return t(columns(t(columns(s))))


def random_bases(p, rank: int, alpha: float, is_wide: bool, step: str = "add_random_bases") -> Tensor:
    """s Σ_n B_n diag(l_n) A diag(g_n), turned for a weight that is wider than tall (arXiv 2502.00987, equation 4)."""
    a, b, left, g = (p[step, name] for name in ("A", "B", "l", "g"))
    parts = [chain(b[:, k * rank:(k + 1) * rank], diag(left[k]), a, diag(g[k])) for k in range(len(left))]
    return alpha / rank * (t(sum(parts)) if is_wide else sum(parts))


def taken(theta: Tensor, places: Tensor) -> Tensor:
    return torch.stack([torch.stack([theta[int(place)] for place in row]) for row in places])


def from_bank(logits: Tensor, bank: Tensor, best: int) -> Tensor:
    """For each last row of logits, the mix of the bank's vectors by the softmax over its `best` largest."""
    if logits.ndim > 1:
        return torch.stack([from_bank(each, bank, best) for each in logits])
    chosen = sorted(range(len(logits)), key=lambda i: -logits[i].item())[:best]
    weights = torch.stack([logits[i].exp() for i in chosen])
    return sum(w / weights.sum() * bank[i] for w, i in zip(weights, chosen))


def qr(a: Tensor) -> Tensor:
    """Q of a = Q R by Householder reflections, R's diagonal signed as LAPACK does."""
    n, k = a.shape
    q = eye(n)
    for j in range(k):
        x = mul(t(q), a)[:, j]
        v = torch.stack([x.new_zeros(()) if i < j else x[i] for i in range(n)])
        sign = 1.0 if x[j].item() >= 0 else -1.0
        v = v + sign * norm(v) * eye(n)[j]
        q = mul(q, eye(n) - 2 * v[:, None] * v / (v * v).sum())
    return q[:, :k]
