"""Alphas from the similarity of layers, as pruning by merging finds them (MKA, Liu et al., arXiv 2406.16330).

What enters each layer, for one question a point, is embedded by a diffusion map. The ranks of its coordinates tell, by
nearest neighbours, how much two layers know of each other (KSG: Kraskov et al., arXiv cond-mat/0305641) and how much
there is to know (Kozachenko and Leonenko): NPIB_ij = I_ij / sqrt(H_i H_j), s_i = mean_j NPIB_ij, i itself included,
and alpha = sigmoid(s_i / (s_i + s_j)). Layers that are equally similar to all have alpha 0.6225.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from olmfast.errors import InputError
from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.encoding import make_batches

SCALE = 8.0  # of distances in the kernel exp(-sqrt(distance / SCALE))
DENSITY = 0.5  # the power of the density that the kernel is divided by
N_DIMS = 2  # of the embedding
NEIGHBOURS, OF_ENTROPY = 5, 50  # for mutual information, and for entropy


def entering(blockwise: BlockwiseModel, inputs: Sequence[Sequence[int]], batch_tokens: int) -> torch.Tensor:
    """(layers, inputs, hidden) float64 on the CPU: what enters each layer at the last token of each input."""
    found = torch.empty(len(blockwise.blocks), len(inputs), 0, dtype=torch.float64)
    for batch in make_batches([len(ids) for ids in inputs], batch_tokens):
        hidden = blockwise.enter(blockwise.pad([inputs[index] for index in batch]))
        last = torch.tensor([len(inputs[index]) - 1 for index in batch], device=hidden.device)
        if not found.shape[2]:
            found = found.new_empty(*found.shape[:2], hidden.shape[2])
        for block in range(len(blockwise.blocks)):
            found[block, batch] = hidden[torch.arange(len(batch), device=hidden.device), last].double().cpu()
            hidden = blockwise.run(hidden, block, block + 1)
    return found


def influences(blockwise: BlockwiseModel, inputs: Sequence[Sequence[int]], batch_tokens: int) -> list[float]:
    """How much each layer changes: 1 - the cosine of what enters and leaves it, a mean over all tokens (ShortGPT, Men
    et al., arXiv 2403.03853)."""
    totals, n_tokens = [0.0] * len(blockwise.blocks), sum(map(len, inputs))
    for batch in make_batches([len(ids) for ids in inputs], batch_tokens):
        hidden = blockwise.enter(blockwise.pad([inputs[index] for index in batch]))
        for block in range(len(blockwise.blocks)):
            leaving = blockwise.run(hidden, block, block + 1)
            cosines = torch.nn.functional.cosine_similarity(hidden.double(), leaving.double(), dim=2)
            for row, index in enumerate(batch):
                totals[block] += float((1 - cosines[row, : len(inputs[index])]).sum())
            hidden = leaving
    return [total / n_tokens for total in totals]


def similarities(states: torch.Tensor) -> np.ndarray:
    """(layers, layers) float64, NPIB of each two layers, from what enters them (layers, points, hidden).

    Raises InputError for too few points, or states that are no numbers.
    """
    n_points = states.shape[1]
    if n_points <= OF_ENTROPY:
        raise InputError(
            f"similarity: {n_points} questions, and it needs more than {OF_ENTROPY}; use more subjects (--num_tasks) "
            "or more questions of each (--num_samples)"
        )
    if not bool(states.isfinite().all()):
        raise InputError("similarity: what enters the layers is no number: it overflows; use another --dtype")
    embedded = [ranks(diffusion_map(own.numpy())) for own in states]
    entropies = [entropy(points) for points in embedded]
    n_layers = len(embedded)
    found = np.empty((n_layers, n_layers))
    for i in range(n_layers):
        for j in range(i + 1):
            size = math.sqrt(abs(entropies[i] * entropies[j]))
            found[i, j] = found[j, i] = mutual_information(embedded[i], embedded[j]) / max(size, 1e-12)
    return found


def alphas_by(similarity: np.ndarray, steps: Sequence[tuple[int, int]]) -> list[float]:
    """The alpha of each step (layer merged into, layer removed)."""
    rows = similarity.mean(axis=1)
    return [float(_sigmoid(rows[i] / (rows[i] + rows[j]) if rows[i] + rows[j] > 0 else 0.5)) for i, j in steps]


def diffusion_map(points: np.ndarray) -> np.ndarray:
    """(points, N_DIMS): the diffusion map (Coifman and Lafon, 2006) of points (points, hidden)."""
    from scipy.spatial.distance import cdist

    kernel = np.exp(-np.sqrt(cdist(points, points) / SCALE))
    density = kernel.sum(axis=0)
    kernel = kernel / np.outer(density, density) ** DENSITY
    root = np.sqrt(kernel.sum(axis=0))
    _, vectors = np.linalg.eigh(kernel / np.outer(root, root))
    vectors = vectors[:, ::-1]  # the largest eigenvalue first, whose vector is that of the density
    scaled: np.ndarray = vectors[:, 1 : N_DIMS + 1] / vectors[:, :1]
    return scaled


def ranks(values: np.ndarray) -> np.ndarray:
    """Each column's ranks, from above 0 to 1; equal values share theirs."""
    from scipy.stats import rankdata

    found: np.ndarray = rankdata(values, axis=0) / len(values)
    return found


def entropy(points: np.ndarray, k: int = OF_ENTROPY) -> float:
    """The differential entropy of points (points, dims), in nats, by their distances to the k-th neighbour."""
    from scipy.special import digamma, gammaln

    n, dims = points.shape
    ball = dims / 2 * math.log(math.pi) - gammaln(dims / 2 + 1)
    return float(dims * np.log(_distances(points, k)).mean() + ball + digamma(n) - digamma(k))


def mutual_information(first: np.ndarray, second: np.ndarray, k: int = NEIGHBOURS) -> float:
    """What two sets of points (points, dims) tell of each other, in nats, at least 0 (KSG's first estimator)."""
    from scipy.spatial import cKDTree
    from scipy.special import digamma

    n = len(first)
    radius = np.nextafter(_distances(np.hstack([first, second]), k, p=np.inf), 0)
    counts = [cKDTree(own).query_ball_point(own, radius, p=np.inf, return_length=True) for own in (first, second)]
    told = digamma(k) + digamma(n) - sum(np.mean(digamma(np.maximum(own, 1))) for own in counts)
    return max(0.0, float(told))


def _distances(points: np.ndarray, k: int, p: float = 2.0) -> np.ndarray:
    """Each point's distance to its k-th neighbour, itself not counted; never 0."""
    from scipy.spatial import cKDTree

    found: np.ndarray = np.maximum(cKDTree(points).query(points, k=[k + 1], p=p)[0][:, 0], 1e-12)
    return found


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
