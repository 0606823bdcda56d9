"""Methods of specs/ a second time, each W' written with torch from the paper's equation or as the authors' code computes it.

`SOURCES` says for each what was read; `PAPERS` are cases like those of the zoo, which run here alone. What a frozen tensor
starts at (singular vectors, draws) is checked by tests/semantics/test_reference.py.
"""

from __future__ import annotations

import torch
from case import Case
from torch import Tensor
from torch.nn.functional import relu


def _paper(name: str, formula, count, source: str, **more) -> Case:
    SOURCES[name] = source
    return Case(name, "", formula, count, **more)


def _of(step: str, formula):
    """A formula of W and of one step's tensors by their names."""
    return lambda w, p: formula(w, **p.of_step(step))


# with tests of their own: of two targets (tests/runtime/test_papers.py), of starts from data (test_from_data.py)
SOURCES: dict[str, str] = {
    "s2ft": "code: Infini-AI-Lab/S2FT", "corda": "code: iboing/CorDA", "eva": "code: ml-jku/EVA, but for its mean",
    "lora_ga": "code: Outsider565/LoRA-GA", "lora_one": "code: YuanheZ/LoRA-One", "lora_sb": "code: CERT-Lab/lora-sb"}


# --------------------------------------------------------------------------------------------------- parts of formulas


def _cayley(x: Tensor) -> Tensor:
    """(I + K)(I - K)⁻¹ of each skew part K = (x - xᵀ) / 2, as OFT's code and those after it write it."""
    skew = 0.5 * (x - x.mT)
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.linalg.solve(eye - skew, eye + skew, left=False)


def _mirrors(u: Tensor, v: Tensor) -> Tensor:
    """Reflections one after the other, and those of v in reverse order."""
    q = torch.eye(len(u), dtype=u.dtype)
    for x in (*u.T, *v.T.flip(0)):
        q = q - 2 * torch.outer(q @ x, x) / x.dot(x)
    return q


def _shuffled(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """GSOFT's product with rows x: blocks, a transposition of the axes (r l), blocks, and (l s) back to (s l)."""
    blocks, size, _ = right.shape
    out = torch.einsum("kqp,bkp->bkq", right, x.reshape(len(x), blocks, size))
    out = out.reshape(len(x), size, blocks).transpose(1, 2)
    return torch.einsum("lsr,blr->bsl", left, out).reshape(len(x), -1)


def _polar(w, X, Y, theta):
    return w + 6 / 3 * X @ theta @ Y.T


def _khatri_rao(w, B, V):
    """The row-wise product by broadcasting, its first columns, on the shorter side."""
    update = (B.unsqueeze(1) * V.unsqueeze(-1)).reshape(len(B), -1)
    update = update.T if w.shape[0] > w.shape[1] else update
    return w + 0.5 * update[:w.shape[0], :w.shape[1]]


def _abba(w, B1, A1, B2, A2):
    """By Khatri-Rao products of rank r², as the code runs it."""
    left = (B1.unsqueeze(2) * B2.unsqueeze(1)).flatten(1) * 5
    right = (A1.unsqueeze(1) * A2.unsqueeze(0)).flatten(0, 1)
    return w + left @ right


def _kasa(w, A, d, B, C, V):
    return (w - C @ V) + 6 / 3 * (B * d) @ A


def _ssvd(w, U, size, V, K, m, gate):
    """A tall layer turns the rows of V, a wide one those of Uᵀ."""
    rotation = torch.eye(len(K), dtype=w.dtype) - 2 * (K - K.T)
    sigma = size + m * torch.sigmoid(gate)
    rest = w - (U * size) @ V
    return rest + ((V.T * sigma) @ (rotation @ U.T)).T if len(w) < w.shape[1] else rest + (U * sigma) @ (rotation @ V)


def _ether(w, u):
    """The mirror of each block by batched products, on the rows of Wᵀ."""
    eye = torch.eye(u.shape[1], dtype=w.dtype)
    h = eye - 2 * torch.einsum("bi,bj->bij", u, u) / (u * u).sum(1)[:, None, None]
    return torch.einsum("rnm,rmd->rnd", h, w.T.reshape(len(u), -1, len(w))).reshape(w.T.shape).T


def _relaxed(w, u, v):
    eye, square = torch.eye(u.shape[1], dtype=w.dtype), lambda x: torch.einsum("bi,bj->bij", x, x)
    h = (eye - square(u) / (u * u).sum(1)[:, None, None] + square(v) / (v * v).sum(1)[:, None, None])
    return torch.einsum("rnm,rmd->rnd", h, w.reshape(len(u), -1, w.shape[1])).reshape(w.shape)


def _ether_plus(w, p):
    inner = _relaxed(w.T, p["pre_relaxed", "u"], p["pre_relaxed", "v"]).T
    return _relaxed(inner, p["pre_relaxed_2", "u"], p["pre_relaxed_2", "v"])


def _mora(w, M):
    """The code's own delta: columns of M repeated over the inputs, then the whole over the outputs."""
    side, (out, in_) = len(M), w.shape
    wide = torch.stack([M[:, i % side] for i in range(in_)], 1)
    return w + torch.cat([wide] * (out // side), 0)


def _mora_rope(w, M, c, s):
    """Type 6 of the code, on one-hot inputs: groups turned, M on each; of a wide layer the outputs that are kept."""
    side, (out, in_) = len(M), w.shape
    x = torch.eye(in_, dtype=w.dtype).view(in_, -1, side)[:, :len(c) // side]
    turned = torch.cat((-x[..., side // 2:], x[..., :side // 2]), dim=-1)
    y = ((x * c.view(-1, side) + turned * s.view(-1, side)) @ M.T).reshape(in_, -1)[..., :out]
    return w + torch.cat([y] * -(-out // y.shape[1]), dim=-1)[..., :out].T


def _loca(w, a, at, C, D):
    """The sum of the chosen waves, one by one."""
    return w + 2 * sum(x * torch.outer(C[k // w.shape[1]], D[k % w.shape[1]]) for x, k in zip(a, at.tolist()))


def _oplora(w, A, B, U, V):
    left, right = torch.eye(len(w), dtype=w.dtype) - U @ U.T, torch.eye(w.shape[1], dtype=w.dtype) - V.T @ V
    return w + 6 / 3 * left @ B @ A @ right


def _prolora(w, Au, As, Bu, Bs):
    """By gathering, as the code does it: chunk j has the ranks i + j r / chunks, and the rest is set beside it."""
    def unfolded(chunk: Tensor, unshared: Tensor) -> Tensor:
        r, times = len(chunk), 2
        at = (torch.arange(r)[:, None, None] + torch.arange(times) * (r // times)).expand(*chunk.shape, times) % r
        chunks = torch.gather(chunk.unsqueeze(-1).repeat(1, 1, times), 0, at)
        whole = torch.cat(torch.split(chunks, 1, dim=-1), dim=-2).squeeze(-1).t()
        return torch.cat([whole, unshared.t()], dim=-1)

    return w + 9 / 6 * (unfolded(As, Au) @ unfolded(Bs.t(), Bu.t()).t()).T


def _wora(w, A, B, a, g, m):
    v = g * w + a * (A.T @ B.T).T
    return m * (v / v.norm(p=2, dim=0, keepdim=True))


def _quanta(w, S1, S2, S3, T1, T2, T3):
    """Applied to one-hot inputs, axis by axis, as in training, and cut off to the layer's sides."""
    n = max(w.shape)
    p, q, r = 2, 3, n // 6

    def circuit(first, second, third):
        x = torch.eye(n, dtype=w.dtype).reshape(n, p, q, r)
        x = torch.einsum("zabc,efbc->zaef", x, first.reshape(q, r, q, r))
        x = torch.einsum("zaef,diaf->zdei", x, second.reshape(p, r, p, r))
        return torch.einsum("zdei,ghde->zghi", x, third.reshape(p, q, p, q)).reshape(n, n).T

    return w + (circuit(T1, T2, T3) - circuit(S1, S2, S3))[:w.shape[0], :w.shape[1]]


def _blocks_of(w, blocks):
    """Blocks along the diagonal, each [its outputs, its inputs]."""
    return w + torch.block_diag(*blocks)


def _cur(w, U, i, j):
    return w + 2 * w[:, i] @ U @ w[j, :]


def _places(w, values, at):
    flat = torch.zeros(w.numel(), dtype=w.dtype).index_add(0, at, values)
    return flat.reshape(w.shape)


def _nola(w, PA, PB, A0, a, b):
    left = sum(x * m.reshape(len(w), 3) for x, m in zip(b, PB))
    right = A0 + sum(x * m.reshape(3, -1) for x, m in zip(a, PA))
    return w + 6 / 3 * left @ right


def _tensor_train(w, G1, G2, G3, G4):
    cores = (G1[None], G2, G3, G4[..., None])
    return w + 2 * torch.einsum("ijk,klm,mno,opq->jlnp", *cores).reshape(w.shape)


def _set_rows(w, R):
    return torch.cat([w[:2] + R, w[2:]], 0)


def _set_columns(w, C, at):
    return w.index_add(1, at, 6 / 3 * C)


def _shoft(w, p):
    left, right = p.of_step("pre_householder"), p.of_step("pre_householder_2")
    d = p.get(("pre_diagonal", "d"), torch.ones(len(w), dtype=w.dtype))
    return _mirrors(left["U"], left["V"]) @ (d[:, None] * w) @ _mirrors(right["U"], right["V"])


def _gsoft(w, p):
    # the rows of W are what the code's product with an input gives, since it is linear in it
    left, right = (p["pre_group_and_shuffle", name] for name in "LR")
    turned = _shuffled(torch.eye(w.shape[1], dtype=w.dtype), _cayley(left), _cayley(right)).T
    return p["pre_diagonal", "d"][:, None] * (w @ turned)


def _oft_shared(w, p):
    q = p["pre_shared_rotation", "Q"]
    skew, eye = 0.5 * (q - q.T), torch.eye(len(q), dtype=q.dtype)
    rotation = torch.linalg.solve(eye + skew, eye - skew, left=False)
    rotated = torch.block_diag(*[rotation] * (w.shape[1] // len(q))) @ w.T
    return rotated.T * p["post_diagonal", "d"][:, None]


def _conditioned(y, C, D, scale):
    """What SORA's code makes of an output y, whose last axis is that of C and D."""
    s = torch.clamp(scale / (torch.linalg.norm(C) + torch.linalg.norm(D) + 1e-6), max=1.0)
    return y + s * ((y @ C) @ D.T - (y @ D) @ C.T)


def _sora(w, p):
    y = w.T * p["pre_diagonal", "d"] + 5 / 3 * (p["add_low_rank", "B"] @ p["add_low_rank", "A"]).T
    return _conditioned(y, p["post_skew_rotation", "C"], p["post_skew_rotation", "D"], 1.0).T


def _sora_bias(b, p):
    return _conditioned(b * p["pre_diagonal", "d"], p["post_skew_rotation", "C"], p["post_skew_rotation", "D"], 1.0)


def _sora_input(w, p):
    # (W + s B A) P with P = I + s_p (D Cᵀ - C Dᵀ), so the transpose of what an output gets
    y = w + 5 / 3 * p["add_low_rank", "B"] @ p["add_low_rank", "A"]
    return _conditioned(y, p["post_skew_rotation", "D"], p["post_skew_rotation", "C"], 0.5)


def _hydra(w, p):
    (a, b), (c, d) = p.of_step("pre_sequential").values(), p.of_step("add_parallel").values()
    return w + 2 * (d @ c + b @ a @ w)


def _hydra_bias(b, p):
    down, up = p.of_step("pre_sequential").values()
    return b + 2 * up @ (down @ b)


def _pooled(w, A, B):
    """A on the means of neighbouring inputs, as torch pools them."""
    pooled = torch.nn.functional.avg_pool1d(torch.eye(w.shape[1], dtype=w.dtype)[None], 2)[0]
    return w + 6 / 3 * (pooled @ A.T @ B.T).T


def _monarch(w, L, R):
    """The code's products with one-hot inputs: blocks, features in another order, blocks, outputs in another."""
    x = torch.eye(w.shape[1], dtype=w.dtype)
    middle = torch.bmm(x.reshape(len(x), len(L), -1).transpose(0, 1), L.mT).transpose(0, 1)
    middle = middle.reshape(len(x), R.shape[2], len(R)).permute(2, 0, 1)
    return w + torch.bmm(middle, R.mT).permute(1, 2, 0).reshape(len(x), -1).T


def _poet(w, p):
    """As the code runs it on one-hot inputs, with the exact Cayley transform in the place of its series."""
    def turned(x: Tensor, rotations: Tensor) -> Tensor:
        return torch.einsum("tbi,bij->tbj", x.reshape(len(x), *rotations.shape[:2]), rotations).reshape(x.shape)

    (at, G), (at_in, G_in) = p.of_step("pre_shuffled_rotation").values(), p.of_step("pre_shuffled_rotation_2").values()
    x = torch.eye(w.shape[1], dtype=w.dtype)[:, at_in]
    y = turned(turned(x, _cayley(2 * G_in)) @ w[at][:, at_in].T, _cayley(2 * G))
    return y[:, at.argsort()].T


def _hadamard_blocks(w, A, B):
    """Each block of the weight times its own low-rank matrix, set side by side and below one another."""
    rows = [[block * (1 + B[i, j] @ A[i, j]) for j, block in enumerate(row.chunk(len(A), 1))]
            for i, row in enumerate(w.chunk(len(A), 0))]
    return torch.cat([torch.cat(row, 1) for row in rows], 0)


def _tucker(w, p):
    """As the code runs it on one-hot inputs: down, the core of the layer's own place, up."""
    core = p["shared", "C"] @ p["add_tucker_of_layers", "p"]
    return w + 2 * (p["shared", "U"].T @ core @ p["shared", "V"].T).T


def _rank_sharing(w, A, B, C, D, e, f):
    return w + torch.cat([B, D], 1) @ (torch.cat([e, f])[:, None] * torch.cat([A, C], 0))


def _sparsity_preserved(w, A, b):
    return w + 6 / 3 * torch.repeat_interleave(A, len(w) // len(A), 0) * b.view(-1, 1) * w


_SORA = {"rank": 3, "alpha": 5, "skew_rank": 2, "dropout": 0.0}
PAPERS = (
    _paper("abba", _of("add_hadamard_of_pairs", _abba), lambda m, n: 6 * (m + n), "code: CERT-Lab/abba",
           shipped={"rank": 3, "alpha": 5}),
    _paper("bhra", _of("add_hadamard_blocks", _hadamard_blocks), lambda m, n: 6 * (m + n), "the paper's abstract",
           shipped={"rank": 6, "grid": 3}),
    _paper("curlora", _of("add_cur", _cur), lambda m, n: 9, "code: MNoorFawi/curlora",
           shipped={"rank": 3, "scale": 2}),
    _paper("diablo", _of("add_diagonal_blocks", lambda w, D: _blocks_of(w, D)), lambda m, n: m * n // 3,
           "code: ziyangjoy/DiaBlo", shipped={"blocks": 3}),
    _paper("ether", _of("pre_mirrors", _ether), lambda m, n: n, "code: mwbini/ether", claims=2, shifted=True,
           shipped={"blocks": 3}),
    _paper("ether_plus", _ether_plus, lambda m, n: 2 * (m + n), "code: mwbini/ether", claims=2, shipped={"blocks": 3}),
    _paper("fact", lambda w, p: w + 2 * p["shared", "V"] @ p["add_tensor_of_layers", "T"] @ p["shared", "U"],
           lambda m, n: 2 * (m + n) + 4, "code: JieShibo/PETL-ViT", shipped={"rank": 2, "scale": 2}),
    _paper("fact_tk", _tucker, lambda m, n: 2 * (m + n) + 8 + 2, "code: JieShibo/PETL-ViT",
           shipped={"rank": 2, "scale": 2}),
    _paper("gift", lambda w, p: w + w @ p["pre_generated", "phi"] @ p["pre_generated", "psi"], lambda m, n: 6 * n,
           "the paper's abstract", shipped={"rank": 3}),
    _paper("gsoft", _gsoft, lambda m, n: 6 * n + m, "code: Skonor/group_and_shuffle", claims=2, shipped={"block": 3}),
    _paper("hydra", _hydra, lambda m, n: 4 * m + 2 * (m + n), "code: extremebird/Hydra", bias=_hydra_bias,
           shipped={"scale": 2}),
    _paper("hoft", _shoft, lambda m, n: 4 * (m + n), "a summary of the paper", claims=2, shipped={"count": 2}),
    _paper("hyperadapt", lambda w, p: torch.einsum("i,ij,j->ij", p["pre_diagonal", "d"], w, p["pre_diagonal_2", "d"]),
           lambda m, n: m + n, "the paper's abstract", claims=2),
    _paper("kasa", _of("add_knowledge_aware", _kasa), lambda m, n: 3 * (m + n) + 3, "code: juyongjiang/KaSA, PEFT",
           shifted=True, shipped={"rank": 3, "alpha": 6}),
    _paper("kradapter", _of("add_khatri_rao", _khatri_rao), lambda m, n: min(m, n) * (3 + -(-max(m, n) // 3)),
           "code: PaulAlbert31/KRAdapter", shipped={"scale": 0.5}),
    _paper("krona", _of("add_kronecker", lambda w, A, B: w + 2 * torch.einsum("pq,mn->pmqn", A, B).reshape(w.shape)),
           lambda m, n: 6 + m * n // 6, "the paper's abstract", shipped={"p": 2, "q": 3, "scale": 2}),
    _paper("lift", _of("add_principal_weights", lambda w, v, at: w + _places(w, v, at)), lambda m, n: m + n,
           "code: zihanghliu/LIFT", shipped={"rank": 3, "like": 1}),
    _paper("loca", _of("add_cosines", _loca), lambda m, n: 7, "the paper's equation, as a summary has it",
           shipped={"count": 7, "scale": 2}),
    _paper("lora_fa", _of("add_frozen_a", lambda w, A, B: w + 5 / 3 * B @ A), lambda m, n: 3 * m,
           "PEFT's optimiser", shipped={"rank": 3, "alpha": 5}),
    _paper("lora_plus", _of("add_two_rates", lambda w, A, B: w + 5 / 3 * B @ A), lambda m, n: 3 * (m + n),
           "the formula of LoRA; its ratio of rates is from memory", shipped={"rank": 3, "alpha": 5}),
    _paper("lora_xs", _of("add_between_singular", lambda w, A, B, R: w + 5 / 3 * B @ R @ A), lambda m, n: 9,
           "code: MohammadrezaBanaei/LoRA-XS", shipped={"rank": 3, "alpha": 5}),
    _paper("lorma", _of("pre_multiplied", lambda w, A, B: (B @ (A @ w)) * 5 / 3 + w), lambda m, n: 6 * m,
           "code: Exploration-Lab/LoRMA", shipped={"rank": 3, "alpha": 5}),
    _paper("melora", _of("add_ensemble", lambda w, A, B: _blocks_of(w, [5 / 2 * b @ a for a, b in zip(A, B)])),
           lambda m, n: 2 * (m + n), "code: ChasonShi/MELoRA", shipped={"count": 3, "rank": 2, "alpha": 5}),
    _paper("mica", _of("add_minor_directions", lambda w, A, B: w + 5 / 3 * B @ A), lambda m, n: 3 * n, "PEFT's code",
           shipped={"rank": 3, "alpha": 5}),
    _paper("milora", _of("add_minor", lambda w, A, B, A0, B0: w - 2 * B0 @ A0 + 2 * B @ A), lambda m, n: 3 * (m + n),
           "code: sufenlp/MiLoRA", shipped={"rank": 3, "alpha": 6}),
    _paper("mora", _of("add_square", _mora), lambda m, n: 36, "code: kongds/MoRA", shipped={"side": 6}),
    _paper("mora_rope", _of("add_turned_groups", _mora_rope), lambda m, n: 36, "code: kongds/MoRA, type 6",
           shipped={"side": 6}),
    _paper("more", _of("add_monarch", _monarch), lambda m, n: 2 * (m + n), "code: SprocketLab/sparse_matrix_fine_tuning",
           shipped={"blocks": 3, "rank": 2}),
    _paper("mos_lora", _of("add_mixed_subspaces", lambda w, A, M, B: w + 6 / 3 * B @ (M @ A)),
           lambda m, n: 3 * (m + n) + 9, "code: wutaiqiang/MoSLoRA", shipped={"rank": 3, "alpha": 6}),
    _paper("neuroada", _of("add_bypass_of_neurons", lambda w, v, at: w + _places(w, v, at)), lambda m, n: 2 * m,
           "code: FightingFighting/NeuroAda", shipped={"k": 2}),
    _paper("nlora", _of("add_nystrom", lambda w, A, N, B: w + 6 / 3 * B @ N @ A), lambda m, n: 3 * (m + n) + 9,
           "code: TracyGuo2001/NLoRA", shifted=True, shipped={"rank": 3, "alpha": 6}),
    _paper("nola", _of("add_random_basis", _nola), lambda m, n: 10, "code: UCDvision/NOLA",
           shipped={"rank": 3, "alpha": 6, "count": 5}),
    _paper("one_lora", lambda w, p: w + p["add_summed", "b"].expand(w.shape), lambda m, n: m, "a summary of the paper"),
    _paper("oft_shared", _oft_shared, lambda m, n: (n // 3)**2 + m, "code: MaeChd/SORA", claims=2,
           shipped={"blocks": 3}),
    _paper("oplora", _of("add_projected", _oplora), lambda m, n: 3 * (m + n), "the paper's abstract",
           shipped={"rank": 3, "alpha": 6, "kept": 4}),
    _paper("paca", _of("add_partial", _set_columns), lambda m, n: 3 * m, "code: WooSunghyeon/paca",
           shipped={"rank": 3, "alpha": 6}),
    _paper("peanut", _of("add_on_weight", lambda w, A, B: w + 2 * (relu(w.T @ A.T) @ B.T).T), lambda m, n: 6 * m,
           "PEFT's code", shipped={"rank": 3, "scale": 2}),
    _paper("poet", _poet, lambda m, n: 3 * (m + n), "code: Sphere-AI-Lab/poet", claims=2, shipped={"block": 3}),
    _paper("polar", _of("add_polar_form", _polar), lambda m, n: 3 * (m + n) + 9, "code: kcc-lion/polar",
           shipped={"rank": 3, "alpha": 6}),
    _paper("prolora", _of("add_partly_rotated", _prolora), lambda m, n: 2 * (m + n) + 2 * (m + n),
           "code: Forence1999/PRoLoRA", shipped={"rank": 6, "unshared": 2, "chunks": 2, "alpha": 9}),
    _paper("propulsion", lambda w, p: w * torch.pow(p["pre_pushed", "z"], 5)[:, None], lambda m, n: m,
           "code: Kowsher/Propulsion", bias=lambda b, p: b * torch.pow(p["pre_pushed", "z"], 5), claims=1,
           shipped={"degree": 5}),
    _paper("qa_lora", _of("add_on_pooled", _pooled), lambda m, n: 3 * m + 3 * n // 2, "code: yuhuixu1993/qa-lora",
           shipped={"rank": 3, "alpha": 6, "group": 2}),
    _paper("quanta", _of("add_circuit", _quanta), lambda m, n: sum((max(m, n) // k)**2 for k in (2, 3)) + 36,
           "code: quanta-fine-tuning/quanta", shipped={"p": 2, "q": 3}),
    _paper("rasa", _of("add_rank_sharing", _rank_sharing), lambda m, n: 3 * (m + n) + 3, "code: zwhe99/RaSA",
           shipped={"rank": 3, "alpha": 6, "common": 1}),
    _paper("red", lambda w, p: p["pre_diagonal", "d"][:, None] * w, lambda m, n: 2 * m, "code: mlwu22/RED", claims=1,
           bias=lambda b, p: p["pre_diagonal", "d"] * b + p["add_shift", "beta"]),
    _paper("rocoft", _of("add_first_rows", _set_rows), lambda m, n: 2 * n, "code: Kowsher/RoCoFT",
           shipped={"count": 2}),
    _paper("rosa", _of("add_sparse_and_low_rank", lambda w, A, B, v, at: w + _places(w, v, at) + 5 / 3 * B @ A),
           lambda m, n: m * n // 4 + 3 * (m + n), "code: IST-DASLab/peft-rosa",
           shipped={"rank": 3, "alpha": 5, "density": 0.25}),
    _paper("shoft", _shoft, lambda m, n: 4 * (m + n) + m, "a summary of the paper", claims=3, shipped={"count": 2}),
    _paper("sora_input", _sora_input, lambda m, n: 3 * (m + n) + 4 * n, "the description of its authors' bytecode",
           shipped={**_SORA, "skew_scale": 0.5}),
    _paper("sora_reference", _sora, lambda m, n: 3 * (m + n) + m + 4 * m, "code: MaeChd/SORA", claims=1,
           bias=_sora_bias, shipped=_SORA),
    _paper("sorsa", _of("add_principal_triples", lambda w, U, s, V, U0, s0, V0: w - (U0 * s0) @ V0 + (U * s) @ V),
           lambda m, n: 3 * (m + n) + 3, "code: Gunale0926/SORSA", shipped={"rank": 3}),
    _paper("spectral_adapter", _of("add_moved_vectors", lambda w, U, size, V, P, Q: (
        (w - U @ size.diag() @ V) + (U + P) @ size.diag() @ (V + Q))), lambda m, n: 3 * (m + n),
        "code: pilancilab/spectral_adapter", shipped={"rank": 3}),
    _paper("spectral_rotation", _of("add_turned_vectors", lambda w, U, size, V, A, B, c: (
        (w - U @ size.diag() @ V) + U @ _cayley(A).T @ (size * c).diag() @ (V.T @ _cayley(B).T).T)),
        lambda m, n: 21, "code: pilancilab/spectral_adapter", shipped={"rank": 3}),
    _paper("spp", _of("add_sparsity_preserved", _sparsity_preserved), lambda m, n: m + 3 * n,
           "code: Lucky-Lance/SPP", shipped={"rank": 3, "alpha": 6}),
    _paper("ssvd", _of("add_structured", _ssvd), lambda m, n: 13, "code: espnet/espnet", shipped={"rank": 3}),
    _paper("stella", _of("add_three_factors", lambda w, U, V, S: w + 2 * U @ S @ V.T), lambda m, n: 3 * (m + n) + 9,
           "code: SonyResearch/stella", shifted=True, shipped={"rank": 3, "alpha": 6}),
    _paper("svdiff", _of("add_spectral_shift", lambda w, U, size, V, delta: (
        (w - (U * size) @ V) + U @ torch.diag(relu(size + 2 * delta)) @ V)), lambda m, n: min(m, n),
        "code: mkshing/svdiff-pytorch", shipped={"scale": 2}),
    _paper("svf", _of("add_singular_gains", lambda w, U, size, V, z: (w - (U * size) @ V) + (U * (size * z)) @ V),
           lambda m, n: min(m, n), "code: SakanaAI/self-adaptive-llms, but for its sigmoid and its sum",),
    _paper("svft", _of("add_singular_values", lambda w, U, V, m, gate: w + U @ torch.diag(m * gate.sigmoid()) @ V),
           lambda m, n: min(m, n) + 1, "code: VijayLingam95/SVFT, espnet/espnet"),
    _paper("svfit", _of("add_largest_values", lambda w, U, V, size, s: (w - (U * size) @ V) + U @ s.diag() @ V),
           lambda m, n: 3, "a summary of the paper", shipped={"rank": 3}),
    _paper("tlora", _of("add_three_matrices", lambda w, A, C, B, alpha: w + alpha * (A @ (B @ C))), lambda m, n: 10,
           "a summary of the paper", shipped={"rank": 3}),
    _paper("tt_lora", _of("add_tensor_train", _tensor_train), lambda m, n: 16 + 2 * m + 2 * n // 3,
           "code in use of the method (tensorly)", shipped={"rank": 2, "p": 2, "q": 3, "scale": 2}),
    _paper("vectorfit", _of("add_singular_values", lambda w, U, V, s, s0: w - (U * s0) @ V + (U * s) @ V),
           lambda m, n: min(m, n) + m, "the authors' page, without code", bias=lambda b, p: b + p["add_shift", "beta"]),
    _paper("wora", _of("add_weighted", _wora), lambda m, n: 3 * (m + n) + 2 + n, "code: JT-Sun/Filtering-WoRA",
           shipped={"rank": 3, "alpha": 6}),
)
