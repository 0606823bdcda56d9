"""The zoo, as data: every kind of formula that the language has, each written a second time with the oracle.

Every test of meaning is parametrised over `CASES`.
"""

from __future__ import annotations

from dataclasses import replace

import oracle as o
import torch
from case import Case, transform, update

# ------------------------------------------------------------------------------------------------- the shipped specs

_LORA = {"rank": 3, "alpha": 5, "dropout": 0.0}
SHIPPED = (
    Case("lora", "", lambda w, p: w + o.low_rank(p, 3, 5), lambda m, n: 3 * (m + n), shipped=_LORA),
    Case("dora", "", lambda w, p: o.mul(o.magnitude(w + o.low_rank(p, 3, 5), p), w + o.low_rank(p, 3, 5)),
         lambda m, n: 3 * (m + n) + m, claims=1, shipped=_LORA),
    Case("post_diag", "", lambda w, p: o.mul(o.gains(p, "post_diagonal"), w + o.low_rank(p, 3, 5)),
         lambda m, n: 3 * (m + n) + m, claims=1, shipped=_LORA),
    Case("pre_diag", "", lambda w, p: o.mul(o.gains(p, "pre_diagonal"), w) + o.low_rank(p, 3, 5),
         lambda m, n: 3 * (m + n) + m, claims=1, shipped=_LORA),
    Case("sora", "", lambda w, p: o.mul(o.rotation(p, "post_orthogonal"),
                                        o.mul(o.gains(p, "pre_diagonal"), w) + o.low_rank(p, 3, 5)),
         lambda m, n: 3 * (m + n) + m + 4 * m, claims=2, shipped={**_LORA, "skew_rank": 2}),
    Case("sora_reference", "", lambda w, p: o.mul(o.first_order_rotation(p, 1),
                                                  o.mul(o.gains(p, "pre_diagonal"), w) + o.low_rank(p, 3, 5)),
         lambda m, n: 3 * (m + n) + m + 4 * m, claims=1, shipped={**_LORA, "skew_rank": 2},
         bias=lambda b, p: o.mul(o.first_order_rotation(p, 1), p["pre_diagonal", "d"] * b)),
    Case("oft", "", lambda w, p: o.mul(w, o.block_rotation(p, "pre_block_orthogonal")),
         lambda m, n: 3 * n, claims=1, shipped={"block": 3}),
    Case("rslora", "", lambda w, p: w + o.low_rank(p, 1, 5 / 3**0.5), lambda m, n: 3 * (m + n), shipped=_LORA),
    Case("coft", "", lambda w, p: o.mul(w, o.near_rotation(p, 1.2)), lambda m, n: 3 * n, claims=1,
         shipped={"block": 3, "eps": 1.2}),
    Case("hra", "", lambda w, p: o.mul(w, o.reflections(p, "pre_householder")), lambda m, n: 4 * n, claims=1,
         shipped={"rank": 4}),
    Case("road_1", "", lambda w, p: o.mul(_road_1(p), w), lambda m, n: m, bias=lambda b, p: o.mul(_road_1(p), b),
         shipped={"group": 6}),
    Case("road_2", "", lambda w, p: o.mul(_road_2(p), w), lambda m, n: 2 * m, bias=lambda b, p: o.mul(_road_2(p), b),
         shipped={"group": 6}),
    Case("road_4", "", lambda w, p: o.mul(_road_4(p), w), lambda m, n: 4 * m, bias=lambda b, p: o.mul(_road_4(p), b),
         shipped={"group": 6}),
    Case("vera", "", lambda w, p: w + o.shared_low_rank(p), lambda m, n: m + 4, shipped={"rank": 4}),
    Case("loha", "",
         lambda w, p: w + 2.5 * _product(p, "add_hadamard", "B1", "A1") * _product(p, "add_hadamard", "B2", "A2"),
         lambda m, n: 4 * (m + n), shipped={"rank": 2, "alpha": 5}),
    Case("lokr", "", lambda w, p: w + 2.5 * o.kron(p["add_kronecker", "C"], _product(p, "add_kronecker", "B", "A")),
         lambda m, n: 9 + 2 * (m + n) // 3, shipped={"rank": 2, "alpha": 5}),
    Case("hira", "", lambda w, p: w * (1 + _product(p, "add_weight_times_low_rank", "B", "A")),
         lambda m, n: 3 * (m + n), shipped={"rank": 3}),
    Case("delora", "", lambda w, p: w + o.bounded(w, p, 3), lambda m, n: 3 * (m + n) + 1, shipped={"rank": 3}),
    Case("gralora", "", lambda w, p: w + o.block_grid(p, 4, 6, 2), lambda m, n: 4 * (m + n),
         shipped={"rank": 4, "alpha": 6, "grid": 2}),
    Case("miss", "", lambda w, p: w + o.repeated(p["add_repeated", "M"], w.shape[1]), lambda m, n: 3 * m,
         shipped={"rank": 3}),
    Case("miss_bat", "", lambda w, p: w + o.block_affine(w, p["add_block_affine", "M"]), lambda m, n: 3 * m,
         shipped={"rank": 3}),
    Case("c3a", "", lambda w, p: w + o.circulants(p["add_convolution", "c"]) / w.shape[1], lambda m, n: m * n // 3,
         shipped={"block": 3}),
    Case("fourierft", "", lambda w, p: w + 9 * o.spectrum(_scattered(w, p, "add_spectrum", "c")), lambda m, n: 7,
         shipped={"count": 7, "scale": 9}),
    Case("waveft", "", lambda w, p: w + 3 * o.haar(_scattered(w, p, "add_wavelets", "c")), lambda m, n: 7,
         shipped={"count": 7, "scale": 3}),
    Case("shira", "", lambda w, p: w + _scattered(w, p, "add_sparse", "v"), lambda m, n: 2 * (m + n),
         shipped={"rank": 2}),
    Case("supertuning", "", lambda w, p: w + _scattered(w, p, "add_sparse_at_top", "v"), lambda m, n: m * n // 4,
         shipped={"sparsity": 0.75}),
    Case("randlora", "", lambda w, p: w + o.random_bases(p, 3, 6, w.shape[0] < w.shape[1]),
         lambda m, n: min(m, n) + min(m, n)**2 // 3, shipped={"rank": 3, "alpha": 6}),
    Case("psoft", "", lambda w, p: w + _subspace_rotation(p, "add_subspace_rotation"), lambda m, n: 9 + 6,
         shipped={"rank": 3}),
    Case("tinylora", "", lambda w, p: w + _tiny(p, "add_tiny"), lambda m, n: 5, shipped={"rank": 2, "count": 5}),
    Case("unilora", "", lambda w, p: w + o.mul(*(o.taken(
        p["add_one_vector", "size"] * p["add_one_vector", "theta"], p["add_one_vector", f"at_{x}"]) for x in "BA")),
        lambda m, n: 16, shifted=True,
        shipped={"rank": 2, "length": 16, "bound": 0.5}),
    Case("vblora", "", lambda w, p: w + _bank(p, "add_from_bank"), lambda m, n: 15 + 2 * 5 * (m + n) // 3, shifted=True,
         shipped={"rank": 2, "count": 5, "length": 3, "best": 2, "bound": 1.0}),
    Case("deft", "", lambda w, p: w + _deft(w, p, "add_decompose", lambda x: x, lambda x: x.clamp(min=0)),
         lambda m, n: 3 * (m + n), shipped={"rank": 3}),
    Case("deft_qr", "", lambda w, p: w + _deft(w, p, "add_decompose_orthogonal", o.qr, o.qr), lambda m, n: 3 * (m + n),
         shipped={"rank": 3}),
    Case("pissa", "", lambda w, p: w + _from_start(p, "add_principal", 2), lambda m, n: 3 * (m + n),
         shipped={"rank": 3, "alpha": 6}),
    Case("olora", "", lambda w, p: w + _from_start(p, "add_orthonormal", 2), lambda m, n: 3 * (m + n),
         shipped={"rank": 3, "alpha": 6}),
)


def _product(p, step: str, left: str, right: str):
    return o.mul(p[step, left], p[step, right])


def _scattered(w, p, step: str, values: str):
    return o.scattered(p[step, values], p[step, "at"], *w.shape)


def _road_1(p):
    theta, alpha = (o.in_pairs(p["post_pair_turn", name]) for name in ("theta", "alpha"))
    return o.pair_map(alpha * theta.cos(), alpha * theta.sin(), 6)


def _road_2(p):
    theta, alpha = (p["post_pair_mix", name] for name in ("theta", "alpha"))
    return o.pair_map(alpha * theta.cos(), alpha * theta.sin(), 6)


def _road_4(p):
    theta, alpha, off, by = (p["post_pair_map", name] for name in ("theta", "alpha", "theta_off", "alpha_off"))
    return o.pair_map(alpha * theta.cos(), by * off.sin(), 6)


def _subspace_rotation(p, step: str):
    q = o.cayley(o.skew(p[step, "Q"]))
    turned = o.chain(o.diag(p[step, "b"]), q, o.diag(p[step, "a"])) - o.eye(len(q))
    return o.chain(p[step, "B"], turned, p[step, "A"])


def _tiny(p, step: str):
    mixed = sum(v * each for v, each in zip(p[step, "v"], p[step, "P"]))
    return o.chain(p[step, "B"], mixed, p[step, "A"])


def _bank(p, step: str):
    a, b = (o.from_bank(p[step, name], p[step, "bank"], 2) for name in ("L_A", "L_B"))
    rows = [[b[i, r, j] for r in range(2)] for i in range(len(b)) for j in range(3)]
    return o.mul(torch.stack([torch.stack(row) for row in rows]), a.flatten(1))


def _deft(w, p, step: str, left, right):
    projected = o.mul(o.t(right(p[step, "P"])), w)
    return o.mul(left(p[step, "P"]), p[step, "R"] - projected)


def _from_start(p, step: str, scaling: float):
    return scaling * (_product(p, step, "B", "A") - _product(p, step, "B0", "A0"))

# ------------------------------------------------------------------------- the standard library, placed in other ways

PLACED = (
    Case("scale", "pre scale()", lambda w, p: p["pre_scale", "g"] * w, lambda m, n: 1, claims=1),
    Case("ia3", "pre diagonal() with bias", lambda w, p: o.mul(o.gains(p, "pre_diagonal"), w), lambda m, n: m,
         bias=lambda b, p: p["pre_diagonal", "d"] * b, claims=1),
    Case("gains on both sides", "pre diagonal()\n  pre diagonal() on in",
         lambda w, p: o.chain(o.gains(p, "pre_diagonal"), w, o.gains(p, "pre_diagonal_2")), lambda m, n: m + n,
         claims=2),
    Case("blocks on out with bias", "post block_orthogonal(6) with bias", lambda w, p: o.mul(_post_blocks(p), w),
         lambda m, n: 6 * m, bias=lambda b, p: o.mul(_post_blocks(p), b), claims=1),
    Case("mirrors on out", "add low_rank(2)\n  post householder(3)",
         lambda w, p: o.mul(o.reflections(p, "post_householder"), w + o.low_rank(p, 2, 16)),
         lambda m, n: 2 * (m + n) + 6 * m, claims=1),
    Case("mirrors on in", "pre householder(2) on in", lambda w, p: o.mul(w, o.reflections(p, "pre_householder")),
         lambda m, n: 4 * n, claims=1),
    Case("rotation on in", "add low_rank(2)\n  post orthogonal(2) on in",
         lambda w, p: o.mul(w + o.low_rank(p, 2, 16), o.rotation(p, "post_orthogonal")),
         lambda m, n: 2 * (m + n) + 4 * n, claims=1),
    Case("rotations on both sides", "pre orthogonal(1)\n  post orthogonal(3) on in",
         lambda w, p: o.chain(o.rotation(p, "pre_orthogonal"), w, o.rotation(p, "post_orthogonal")),
         lambda m, n: 2 * m + 6 * n, claims=2),
    Case("two updates", "add low_rank(2, 3)\n  add low_rank(3, 1)",
         lambda w, p: w + o.low_rank(p, 2, 3) + o.low_rank(p, 3, 1, "add_low_rank_2"), lambda m, n: 5 * (m + n)),
    Case("order of steps", "post orthogonal(2)\n  pre diagonal()\n  post magnitude()\n  add low_rank(2, 2)",
         lambda w, p: _magnitude_of(o.mul(o.rotation(p, "post_orthogonal"),
                                          o.mul(o.gains(p, "pre_diagonal"), w) + o.low_rank(p, 2, 2)), p),
         lambda m, n: 2 * (m + n) + 4 * m + 2 * m, claims=3),
    Case("everything", "pre diagonal()\n  pre diagonal() on in\n  add low_rank(2, 4)\n  post block_orthogonal(3)\n"
         " post householder(2)",
         lambda w, p: o.chain(
             o.reflections(p, "post_householder"), o.block_rotation(p, "post_block_orthogonal"),
             o.chain(o.gains(p, "pre_diagonal"), w, o.gains(p, "pre_diagonal_2")) + o.low_rank(p, 2, 4)),
         lambda m, n: m + n + 2 * (m + n) + 3 * m + 4 * m, claims=4),
)


def _post_blocks(p):
    return o.block_rotation(p, "post_block_orthogonal")


def _magnitude_of(w, p):
    return o.mul(o.magnitude(w, p), w)


# ------------------------------------------------------------------- updates of a user's own: published and invented

A, B = "param A[r, in] ~ kaiming_uniform()", "param B[out, r] = 0"
A2, B2 = "param A2[r, in] ~ normal(std = 0.5)", "param B2[out, r] = 0"
B3 = "param B2[out, r] ~ normal(std = 0.5)"


def pair(m: int, n: int) -> int:
    """The parameters of B A with rank 2."""
    return 2 * (m + n)


def two_pairs(m: int, n: int) -> int:
    return 2 * pair(m, n)


UPDATES = (
    update("glora", lambda w, A, B, A2, B2: w * o.mul(B, A) + o.mul(B2, A2), two_pairs, A, B, A2, B2,
           "W * (B @ A) + B2 @ A2"),
    update("lokr with full factors", lambda w, S, F: o.kron(S, F), lambda m, n: m * n // 9 + 9,
           "param S[out / 3, in / 3] = 0", "param F[3, 3] ~ normal()", "kron(S, F)"),
    update("a sum of krons of low-rank factors",
           lambda w, S, A, B: o.kron(o.mul(B, A), S) + 0.5 * o.kron(S, o.mul(B, A)),
           lambda m, n: 9 + 2 * (m + n) // 3, "param S[3, 3] ~ normal()", "param A[r, in / 3] ~ normal()",
           "param B[out / 3, r] = 0", "kron(B @ A, S) + 0.5 * kron(S, B @ A)"),
    update("own vera", lambda w, b, d, A, B: o.chain(o.diag(b), B, o.diag(d), A), lambda m, n: m + 2,
           "frozen shared param A[r, in] ~ kaiming_uniform()", "frozen shared param B[out, r] ~ kaiming_uniform()",
           "param b[out] = 0", "param d[r] = 0.1", "diag(b) @ B @ diag(d) @ A"),
    update("psoft", lambda w, A, B, Q, a, b: o.chain(
        B, o.chain(o.diag(b), o.cayley(o.skew(Q)), o.diag(a)) - o.eye(2), A), lambda m, n: 8,
        "frozen param A[r, in] ~ kaiming_uniform()", "frozen param B[out, r] ~ kaiming_uniform()", "param Q[r, r] = 0",
        "param a[r] = 1", "param b[r] = 1", "B @ (diag(b) @ cayley(skew(Q)) @ diag(a) - I(r)) @ A"),
    update("deft", lambda w, Q, R: o.mul(Q, R) - o.chain(Q, o.t(Q), w), pair,
           "param Q[out, r] ~ normal(std = 0.3)", "param R[r, in] = Q.T @ W", "Q @ R - Q @ (Q.T @ W)"),
    update("tanh of a product", lambda w, A, B: o.mul(B, A).tanh(), pair, A, B, "tanh(B @ A)"),
    update("sigmoid of a product", lambda w, A, B: 1 / (1 + (-o.mul(B, A)).exp()) - 0.5, pair, A, B,
           "sigmoid(B @ A) - 0.5"),
    update("a chain of factors", lambda w, A, B, M, N: o.chain(B, M, N, A), lambda m, n: pair(m, n) + 12, A, B,
           "param M[r, 3] ~ normal()", "param N[3, r] ~ normal()", "B @ M @ N @ A"),
    update("a chain through the inner side", lambda w, A, B, V: o.chain(B, A, V, o.t(V)),
           lambda m, n: pair(m, n) + 2 * n, A, B, "param V[in, r] ~ normal(std = 0.3)", "B @ (A @ V) @ V.T"),
    update("a sum of products", lambda w, A, B, A2, B2: 2 * o.mul(B, A) - o.mul(B2, A2) / 3 + o.mul(B, A2), two_pairs,
           A, B, A2, B2, "2 * (B @ A) - B2 @ A2 / 3 + B @ A2"),
    update("transposes", lambda w, A, B: o.mul(o.t(B), o.t(A)), pair, "param A[in, r] ~ normal()",
           "param B[r, out] = 0", "((A.T).T @ (B.T).T).T + (A @ B).T - B.T @ A.T"),
    update("a gain on W", lambda w, g: g * w, lambda m, n: 1, "param g = 0", "g * W"),
    update("W among the factors", lambda w, A, B: o.chain(B, A, o.t(w), w), pair, A, B, "B @ A @ W.T @ W / 10 * 10"),
    update("a norm of parameters", lambda w, A, B: o.mul(B, A) / (1 + o.norm(A) + 2 * o.norm(o.mul(B, A))), pair,
           A, B, "B @ A / (1 + norm(A) + 2 * norm(B @ A))"),
    update("a norm of a number", lambda w, A, B, g: 2 * o.mul(B, A), pair, A, B, "frozen param g = 1",
           "norm(0 * g - 2) * (B @ A)"),
    update("a full update", lambda w, F: F.abs() - F, lambda m, n: m * n, "param F[out, in] = 0", "abs(F) - F"),
    update("rows and columns", lambda w, b, c: w * o.mul(b, c), lambda m, n: m + n, "param b[out, 1] = 0",
           "param c[1, in] = 1", "W * (b @ c)"),
    replace(update("the singular values of a product", lambda w, A, B2: _singular_of(o.mul(B2, A) + w), pair, A, B3,
                   "let M = B2 @ A + W", "left_singular(M, 2) @ diag(singular(M, 2) - 1) @ right_singular(M, 3 - 1)"),
            shifted=True),
    update("rows in their place", lambda w, A, B: o.mul(B, torch.cat([A[0:1], A[0:1] * A[1:2]])), pair,
           "param A[2, in] ~ normal()", "param B[out, 2] = 0", "let first = reshape(columns(A.T, 1), 1, in)",
           "(if r == 2 then B else 0 * B) @ stacked(first, first * reshape([[0, 1]] @ A, 1, in))"),
    update("columns at random places", lambda w, C, at: o.in_their_columns(C, at, w.shape[1]), lambda m, n: 2 * m,
           "frozen param at[r] ~ sample(of = in)", "param C[out, r] = 0", "C @ rows(I(in), at)"),
    update("rows at places that W says", lambda w, R: o.t(o.in_their_columns(o.t(R), _longest_rows(w), len(w))),
           lambda m, n: 2 * n, "param R[r, in] = 0", "columns(I(out), top(row_norm(W), r)) @ R"),
    update("columns and rows of W", lambda w, U, at: o.chain(w[:, 1:3], U, torch.stack([w[int(i)] for i in at])),
           lambda m, n: 4, "frozen param at[r] ~ integers(below = out)", "param U[2, r] = 0",
           "columns(W, range(1, 3)) @ U @ rows(W, at)"),
    update("let and if", lambda w, A, B: 4 * o.mul(B, A), pair, A, B, "let product = B @ A",
           "let twice = product + product", "if r >= 2 and not (r == 3) then 2 * twice else product"),
)

# ----------------------------------------------------------------------------------------- transforms of a user's own

C, D = "param C[n, r] ~ kaiming_uniform()", "param D[n, r] = C"


def _longest_rows(w: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(sorted(range(len(w)), key=lambda i: -float(o.norm(w[i])))[:2]))


def thin(n: int) -> int:
    """The parameters of two factors [n, 2]."""
    return 4 * n


def _skew_of(C, D):
    return o.mul(C, o.t(D)) - o.mul(D, o.t(C))


def _square(q):
    return o.mul(q, o.t(q))


def _expm_low_rank(w, C, D):
    return o.expm(_skew_of(C, D))


TRANSFORMS = (
    transform("expm of a low-rank skew", _expm_low_rank, thin, C, D, "expm(C @ D.T - D @ C.T)", claims="orthogonal"),
    transform("expm on in", _expm_low_rank, thin, C, D, "expm(C @ D.T - D @ C.T)", side="in", claims="orthogonal"),
    transform("cayley of a product that is not skew", lambda w, C, D: o.cayley(o.mul(C - D, o.t(D)) / 4), thin,
              C, D, "cayley((C - D) @ D.T / 4)"),
    transform("a full cayley", lambda w, X: o.cayley(o.skew(X)), lambda n: n * n, "param X[n, n] = 0",
              "cayley(skew(X))", claims="orthogonal"),
    transform("a full expm on in", lambda w, X: o.expm(o.skew(X)), lambda n: n * n, "param X[n, n] = 0",
              "expm(skew(X))", side="in", claims="orthogonal"),
    transform("block_diag of expm", lambda w, Q: o.block_diag(o.expm(o.skew(Q))), lambda n: 3 * n,
              "param Q[n / 3, 3, 3] = 0", "block_diag(expm(skew(Q)))", claims="orthogonal"),
    transform("blocks on both sides of a gain", lambda w, Q, d: o.chain(
        o.block_diag(o.cayley(o.skew(Q))), o.diag(d), o.t(o.block_diag(o.cayley(o.skew(Q))))), lambda n: 4 * n,
        "param Q[n / 3, 3, 3] = 0", "param d[n] = 1", "let R = block_diag(cayley(skew(Q)))", "R @ diag(d) @ R.T",
        claims="symmetric"),
    transform("one block for all", lambda w, Q: o.kron(o.eye(len(w) // 3), o.cayley(o.skew(Q))), lambda n: 9,
              "param Q[3, 3] = 0", "kron(I(n / 3), cayley(skew(Q)))", claims="orthogonal"),
    transform("kron of a gain and I", lambda w, g: o.kron(o.diag(g.exp()), o.eye(len(w) // 3)), lambda n: 3,
              "param g[3] = 0", "kron(diag(exp(g)), I(n / 3))", claims="diagonal"),
    transform("kron of two rotations", lambda w, P, Q: o.kron(o.cayley(o.skew(P)), o.expm(o.skew(Q))),
              lambda n: 9 + n * n // 9, "param P[3, 3] = 0", "param Q[n / 3, n / 3] = 0",
              "kron(cayley(skew(P)), expm(skew(Q)))", claims="orthogonal"),
    transform("a norm with its gradient", lambda w, m: o.diag(m / o.row_norm(w)), lambda n: n,
              "param m[n] = row_norm(W)", "diag(m / row_norm(W))", claims="diagonal"),
    transform("a magnitude per column", lambda w, m: o.diag(m / o.col_norm(w).detach()), lambda n: n,
              "param m[n] = col_norm(W)", "diag(m / detach(col_norm(W)))", side="in", claims="diagonal"),
    transform("a magnitude per column with its gradient", lambda w, m: o.diag(m / o.col_norm(w)), lambda n: n,
              "param m[n] = col_norm(W)", "diag(m / col_norm(W))", side="in", claims="diagonal"),
    transform("one magnitude for all", lambda w, m: (m / o.norm(w)) * o.eye(len(w)), lambda n: 1,
              "param m = norm(W)", "(m / norm(W)) * I(n)"),
    transform("a projection that depends on W",
              lambda w, g: o.eye(len(w)) - g * o.mul(w, o.t(w)) / (o.norm(w) * o.norm(w)), lambda n: 1,
              "param g = 0", "I(n) - g * (W @ W.T) / (norm(W) * norm(W))", claims="symmetric"),
    replace(transform("a projection from W on in", lambda w, Q: o.eye(w.shape[1]) - _square(o.mul(o.t(w), Q)), thin,
                      "param Q[out, r] = 0", "let P = W.T @ Q", "I(n) - P @ P.T", side="in"),
            count=lambda m, n: 2 * (m + n) + 2 * m),
    transform("I - Q Q.T", lambda w, Q: o.eye(len(w)) - _square(Q), lambda n: 2 * n,
              "param Q[n, r] ~ normal(std = 0.2)", "I(n) - Q @ Q.T", claims="symmetric", shifted=True),
    transform("I plus a product", lambda w, C, D: o.eye(len(w)) + o.mul(C, o.t(D)), thin,
              "param C[n, r] ~ normal(std = 0.3)", "param D[n, r] = 0", "C @ D.T + I(n)"),
    transform("mirrors started in pairs", lambda w, U: o.reflect(U), lambda n: 2 * n, "param U[n, r] = 1", "reflect(U)",
              claims="orthogonal"),
    transform("mirrors on in", lambda w, U: o.t(o.reflect(U)), lambda n: 2 * n, "param U[n, r] = 1", "reflect(U).T",
              side="in", claims="orthogonal"),
    transform("a gain through every elementwise function", lambda w, a, b: o.diag(_busy(a, b)), lambda n: 2 * n,
              "param a[n] = 0", "param b[n] = 0",
              "let busy = sqrt(1 + abs(a)) * exp(tanh(b)) - sigmoid(b) * a + max(a, b) * min(a, 0.1) - -a",
              "diag(busy)"),
    transform("a gain from a product of vectors", lambda w, M, v: o.diag(1 + o.mul(M, v)), lambda n: 2 * n + 2,
              "param M[n, r] = 0", "param v[r] ~ normal()", "diag(1 + M @ v)"),
    transform("a scalar between matrices", lambda w, g, X: o.cayley(g * o.skew(X)) * (g / 2 + 0.5), lambda n: n * n + 1,
              "param g = 1", "param X[n, n] = 0", "cayley(g * skew(X)) * (g / 2 + 0.5)"),
    transform("the inverse of a low-rank map", lambda w, C, D: o.inverse(o.eye(len(w)) + o.mul(C, o.t(C - D))),
              thin, C, D, "inverse(I(n) + C @ (C - D).T)"),
    transform("a full inverse on in", lambda w, X: o.inverse(o.eye(w.shape[1]) + X / 4), lambda n: n * n,
              "param X[n, n] = 0", "inverse(I(n) + X / 4)", side="in"),
    transform("blocks between and their inverse", lambda w, Q: o.block_diag(o.inverse(o.expm(Q))), lambda n: 3 * n,
              "param Q[n / 3, 3, 3] = 0", "inverse(block_diag(expm(Q)))"),
    transform("a gain with corners", lambda w, a, b: o.diag(_cornered(a, b)), lambda n: 2 * n,
              "param a[n] ~ normal()", "param b[n] = 0",
              "diag(1 + sign(a) * b * relu(a) + clamp(b, -abs(a), sin(pi / 2)))"),
    transform("a gain and a skew part", lambda w, d, X: o.diag(d) + o.skew(X), lambda n: n * n + n,
              "param d[n] = 1", "param X[n, n] = 0", "diag(d) + skew(X)"),
)


def _busy(a, b):
    larger, smaller = a.where(a > b, b), a.clamp(max=0.1)
    return (1 + a.abs()).sqrt() * b.tanh().exp() - a / (1 + (-b).exp()) + larger * smaller + a


def _cornered(a, b):
    zero = torch.zeros_like(a)
    lower = b.where(b > -a.abs(), -a.abs())
    return 1 + a.detach().sign() * b * a.where(a > 0, zero) + lower.where(lower < 1, zero + 1)


def _singular_of(m):
    u, s, v = o.singular_parts(m, 2)
    return o.chain(u, o.diag(s - 1), v)


CASES = SHIPPED + PLACED + UPDATES + TRANSFORMS
