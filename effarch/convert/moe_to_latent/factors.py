"""Matrices of a group of experts as private cores behind one shared projection: W_e ~ B A_e.

    M = [W_1 ... W_k] = U S V^T      B = U_L,   [A_1 ... A_k] = U_L^T M      least |M - B A|^2
    with C = E[x x^T] = R R^T:       R^T M = U S V^T      B = R^-T U_L,   A = U_L^T R^T M
                                                                       least E |x (M - B A)|^2

Eckart and Young, Psychometrika 1, 211 (1936). The first is the factorization of MoLE, arXiv 2503.23100;
fitting outputs instead of weights is ours. U are the eigenvectors of M M^T, so that nothing of M's size
is decomposed. Any Q gives the same product by (B Q)(Q^-1 A): Q is chosen diagonal, so that each latent's
column of B and row of A are equally long and further training sees balanced gradients.

Legend: K = experts of a group. All in float64; x W is the product, so W is [D, F].
"""

import numpy as np
from jaxtyping import Float

EPSILON = 1e-4
"""What is added to the covariance's diagonal, in units of its mean."""


def shared_in(
    w_KDF: Float[np.ndarray, "K D F"],
    rank: int,
    moment_DD: Float[np.ndarray, "D D"] | None = None,
) -> tuple[Float[np.ndarray, "D L"], Float[np.ndarray, "K L F"]]:
    """B [D,L] and the A of each expert [K,L,F]; `moment` is E[x x^T] of what enters, or None."""
    K, D, F = w_KDF.shape
    m_DN = np.moveaxis(w_KDF.astype(np.float64), 0, 1).reshape(D, K * F)
    if moment_DD is None:
        u_DL = _leading(m_DN @ m_DN.T, rank)
        b_DL, a_LN = u_DL, u_DL.T @ m_DN
    else:
        root_DD = _root(moment_DD)
        seen_DN = root_DD.T @ m_DN
        u_DL = _leading(seen_DN @ seen_DN.T, rank)
        b_DL, a_LN = np.linalg.solve(root_DD.T, u_DL), u_DL.T @ seen_DN
    b_DL, a_LN = _balanced(b_DL, a_LN)
    return b_DL, np.moveaxis(a_LN.reshape(rank, K, F), 1, 0)


def shared_out(
    w_KFD: Float[np.ndarray, "K F D"], rank: int
) -> tuple[Float[np.ndarray, "K F L"], Float[np.ndarray, "L D"]]:
    """The A of each expert [K,F,L] and B [L,D] of W_e ~ A_e B."""
    b_DL, a_KLF = shared_in(w_KFD.swapaxes(1, 2), rank)
    return a_KLF.swapaxes(1, 2), b_DL.T


def reduced(w_KDF: Float[np.ndarray, "K D F"], rank: int) -> Float[np.ndarray, "K D F"]:
    """Each matrix by itself at that rank: the paper's first phase, which only adds to the error."""
    u, s, v = np.linalg.svd(w_KDF.astype(np.float64), full_matrices=False)
    return u[..., :rank] * s[:, None, :rank] @ v[:, :rank]


def weights_lost(w: np.ndarray, approximation: np.ndarray) -> float:
    """|W - W'|^2 / |W|^2."""
    w = w.astype(np.float64)
    return float(np.sum((w - approximation) ** 2) / max(np.sum(w**2), 1e-300))


def outputs_lost(
    w_KDF: np.ndarray, approximation: np.ndarray, moment_DD: Float[np.ndarray, "D D"]
) -> float:
    """E |x (W - W')|^2 / E |x W|^2 over all experts of the group."""
    root_DD = _root(moment_DD)
    w_KDF = w_KDF.astype(np.float64)
    return weights_lost(root_DD.T @ w_KDF, root_DD.T @ approximation)


def _leading(gram_DD, rank: int):
    """The eigenvectors [D,L] of the largest eigenvalues, largest first."""
    return np.linalg.eigh(gram_DD)[1][:, ::-1][:, :rank]


def _root(moment_DD):
    """R with R R^T = C, C scaled to a mean of 1 on its diagonal and made regular."""
    D = len(moment_DD)
    c_DD = moment_DD.astype(np.float64) / max(np.trace(moment_DD) / D, 1e-300)
    return np.linalg.cholesky(c_DD + EPSILON * np.eye(D))


def _balanced(b_DL, a_LN):
    """The same product, with B's column as long as A's row; a latent that is not used stays short."""
    long_b, long_a = (np.linalg.norm(x, axis=axis) for x, axis in ((b_DL, 0), (a_LN, 1)))
    floor = 1e-3 * max(long_a.max(), 1e-300)
    scale_L = np.sqrt(np.maximum(long_a, floor) / np.maximum(long_b, 1e-300))
    return b_DL * scale_L, a_LN / scale_L[:, None]
