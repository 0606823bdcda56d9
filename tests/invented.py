"""Variants that nobody published, each with a structure that no shipped spec has: what the compiler must see by itself.

The sizes fit weights whose sides are even. Each is (definitions, steps).
"""

from __future__ import annotations

import surgery

LOW_RANK = "add low_rank(2, 4)"
FACTORS = "param A[2, in] ~ normal(std = 0.1)\n param B[out, 2] = 0"
BLOCKS = "transform turns() on n {\n param S[n / 2, 2, 2] = 0\n return block_diag(cayley(skew(S)))\n}"
GAINS = "transform gains() on n {\n param m[n] = col_norm(W)\n return diag(m / detach(col_norm(W)))\n}"


def _update(body: str) -> tuple[str, str]:
    return f"update own() {{\n {body}\n}}", "add own()"


def _transform(body: str, steps: str = f"{LOW_RANK}  post own()") -> tuple[str, str]:
    return f"transform own() on n {{\n {body}\n}}", steps


INVENTED = {
    # norms of what was turned, gained and added to
    "a magnitude after a rotation": ("", f"{LOW_RANK}  post orthogonal(1)  post magnitude()"),
    "a magnitude after blocks": (BLOCKS, f"pre turns()  {LOW_RANK}  post turns()  post magnitude()"),
    "a magnitude after gains of columns": ("", f"pre diagonal() on in  {LOW_RANK}  post magnitude()"),
    "rows and columns in turn": (
        GAINS, f"pre magnitude()  pre gains() on in  {LOW_RANK}  post magnitude()  post gains() on in"),
    "a magnitude with its gradient": _transform("param m[n] = row_norm(W)\n return diag(m / row_norm(W))",
                                                f"pre diagonal() on in  {LOW_RANK}  post orthogonal(1)  post own()"),
    "a size for the whole": _transform("param s = norm(W)\n"
                                       " return (s / norm(W)) * I(n)", f"pre diagonal()  {LOW_RANK}  post own()"),
    # low-rank terms, and what stands in them
    "a normalised product": _update("param A[2, in] ~ normal()\n param B[out, 2] ~ normal()\n param g = 0\n"
                                    " return g * norm(W) * (B @ A) / (norm(B) * norm(A))"),
    "gates on rows and columns": _update(f"{FACTORS}\n param g[out] = 1\n param h[in] = 0\n"
                                         f" return diag(tanh(g)) @ B @ A @ diag(sigmoid(h))"),
    "a turned update": _update("param A[2, in] ~ normal()\n param B[out, 2] = 0\n"
                               " param P[out, 1] ~ normal()\n param Q[out, 1] = P\n"
                               " param S[in / 2, 2, 2] = 0\n"
                               " return cayley(skew(P @ Q.T)) @ B @ A @ block_diag(cayley(skew(S)))"),
    "two mixed by a gate": _update(f"{FACTORS}\n param C[1, in] ~ normal()\n param D[out, 1] = 0\n param g = 0\n"
                                   " return sigmoid(g) * (B @ A) + (1 - sigmoid(g)) * (D @ C)"),
    "the weight times a product": _update("param P[in, 2] = 0\n"
                                          " param Q[in, 2] ~ normal(std = 0.1)\n return W @ (P @ Q.T)"),
    "one half of a fused layer": _update(
        "param A[2, in] ~ normal()\n param B[out / 2, 2] = 0\n return side_by_side(A.T @ B.T, 0 * (A.T @ B.T)).T"),
    "factors for all modules": _update("shared param A[2, in] ~ normal()\n"
                                       " shared param B[out, 2] ~ normal()\n param g[2] = 0\n"
                                       " param d[out] = 1\n return diag(d) @ B @ diag(g) @ A"),
    "a chain of weights": _update("param P[out, 2] = 0\n param Q[out, 2] ~ normal(std = 0.1)\n"
                                  " return P @ Q.T @ W @ W.T @ W / (norm(W) * norm(W))"),
    "gains of rows as a matrix": _update("param d[out, 1] = 0\n return (d @ ones(1, in)) * W"),
    "a bias from the weight": ("update own() on bias {\n param v[in] = 0\n return W @ v\n}",
                               f"{LOW_RANK}  add own()  post orthogonal(1) with bias"),
    "a product and one number": _update(f"{FACTORS}\n param c = 0\n return B @ A + c"),
    "thin blocks": _update("param P[2, out / 2, 1] = 0\n"
                           " param Q[2, 1, in / 2] ~ normal(std = 0.1)\n return block_diag(P @ Q)"),
    "half of it detached": _update(f"{FACTORS}\n return detach(B @ A) / 2 + B @ A / 2"),
    "a part between chosen rows and columns": _update(
        "frozen param i[2] ~ sample(of = out)\n frozen param j[2] ~ sample(of = in)\n param M[2, 2] = 0\n"
        " return columns(I(out), i) @ M @ rows(I(in), j)"),
    "a turn of a few rows": _transform("param Q[2, 2] = 0\n let S = rows(I(n), range(1, 3))\n"
                                       " return I(n) + S.T @ (cayley(skew(Q)) - I(2)) @ S"),
    "a magnitude after columns at places": (
        "update own() {\n frozen param at[2] ~ sample(of = in)\n param C[out, 2] = 0\n return C @ rows(I(in), at)\n}",
        "add own()  post magnitude()"),
    "one choice of columns for two steps": (
        "update own() {\n frozen shared(module) param at[2] ~ sample(of = in)\n param C[out, 2] = 0\n"
        " return C @ rows(I(in), at)\n}", "add own()  add own()"),
    "few entries, turned and under a magnitude": (
        "update own() {\n frozen param at[2] ~ integers(below = out * in)\n param v[2] = 0\n"
        " param C[in, 1] ~ normal()\n param D[in, 1] = C\n"
        " return scatter(v, at, out, in) @ cayley(skew(C @ D.T))\n}", f"{LOW_RANK}  add own()  post magnitude()"),
    "a few entries of I and more, on the inputs": _transform(
        "frozen param at[2] ~ sample(of = n * n)\n param v[2] = 0\n return I(n) + 2 * scatter(v, at, n, n).T",
        f"pre own() on in  {LOW_RANK}  post own()"),
    "a low-rank update at the largest entries alone": _update(
        f"{FACTORS}\n frozen param at[2] = top(abs(W), 2)\n return scatter(ones(2), at, out, in) * (B @ A)"),
    "a few columns of a Kronecker product": _update(
        "param K[2, 2] ~ normal()\n param B[2, in] = 0\n"
        " return kron(I(out / 2), K) @ columns(kron(K, I(out / 2)), 2) @ B"),
    # functions of matrices
    "an exponential series": _transform("param P[n, 1] ~ normal(std = 0.1)\n param Q[n, 1] = P\n"
                                        " let K = skew(P @ Q.T)\n"
                                        " return I(n) + K + K @ K / 2"),
    "an exponential of gains": _transform("param d[n] = 0\n return expm(diag(d)) @ cayley(diag(d))"),
    "the same block everywhere": _transform("param K[2, 2] = 0\n return cayley(kron(I(n / 2), skew(K)))"),
    "blocks to the first order": _transform("param S[n / 2, 2, 2] = 0\n param d[n] = 0\n"
                                            " return I(n) + block_diag(skew(S)) + diag(d)"),
    "a part of the mean": _transform("param g = 0\n return I(n) - (g / n) * ones(n, n)"),
    "between two rotations": _transform("param U[n, 1] ~ normal()\n param V[n, 1] = U\n"
                                        " param t = 0\n let R = reflect(U) @ reflect(V).T\n"
                                        " return cos(t) * R + (1 - cos(t)) * I(n)"),
    "gains in a turned basis": _transform("param S[n / 2, 2, 2] ~ normal(std = 0.1)\n"
                                          " param d[n] = 0\n let R = block_diag(cayley(skew(S)))\n"
                                          " return R @ diag(exp(d)) @ R.T"),
    "columns of a rotation": _update("param P[out, 2] ~ normal()\n param R[out, 2] ~ normal()\n"
                                     " param A[2, in] ~ normal()\n param s[2] = 0\n"
                                     " return columns(cayley(P @ R.T - R @ P.T), 2) @ diag(s) @ A"),
}


def spec(name: str, pattern: str = "**") -> surgery.Spec:
    """An invented spec on the layers that a pattern names."""
    return surgery.parse(text(name).replace('"**"', f'"{pattern}"'))


def text(name: str) -> str:
    definitions, steps = INVENTED[name]
    return f'{definitions}\nspec own()\ntarget "**" {{\n {steps}\n}}\n'
