"""How well translations find each other, over all directions of a set of languages at once. Pure functions.

`states` are sentence embeddings [languages, sentences, hidden], where sentence n of every language is a translation of
sentence n of the others. `ids` [languages, sentences] number the distinct texts of each language: two rows of one
language with the same id are the same sentence.

Sentence i of `src` is *found* in `tgt` if a right row of `tgt` scores higher than every wrong one. Right is row i, and
any row whose text, or whose translation's text, is the same as that of row i: the same answer, or another translation
of the same question. So repeated sentences never compete, and a tie with a wrong row, to rounding, is no find.

The cosines of an LLM's middle layers may all lie above 0.9999, where fp32 and the more so bf16 have too few digits left
to tell them apart. So unit rows are made in fp64 and their common mean is taken off, which leaves every distance as it
is and is exact where they crowd; products are then in fp32. Work is done in blocks of languages.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

NEIGHBOURS = 4  #: k of the margins: Artetxe & Schwenk 2019, section 3.2, and LASER
_TIE = 2.0**-20  #: of the rows' mean squared length: what fp32 products of that size may be off
_BLOCK = 2**22  #: similarities held at once: 16 MB, near a CPU's cache and enough for a GPU


def retrieval(states: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every direction's top-1 accuracy by cosine and by margin, and MEXA: name -> [src languages, tgt languages].

    `cosine`: the nearest row by cosine. It is what LASER calls margin `absolute`.
    `margin_distance`, `margin_ratio`: of the k = 4 nearest rows by cosine, the one with the best margin. With a =
    cos(x, y) and b = half the mean cosine of x to its k nearest in tgt plus half that of y to its k nearest in src,
    the margin is a - b or a / b (Artetxe & Schwenk 2019, "Margin-based Parallel Corpus Mining", section 3.2; the
    candidates are those of LASER's xsim; which of several rows that tie for the k-th place is one, is open).
    `xsim`: 1 - margin_ratio, the error rate (LASER, "xSIM").
    `mexa`: the share of sentences found by cosine in both directions: c_ii > max_j(c_ij, c_ji), j != i (Kargaran et al.
    2024, "MEXA", section 3). The same for both directions.

    Args: states [languages, sentences, hidden]; ids [languages, sentences], see above.
    Returns: matrices, fp64 on the CPU, NaN on the diagonal.
    """
    languages, sentences, hidden = states.shape
    # cos - 1 = -|x - y|^2 / 2 = xy - y^2 / 2 - x^2 / 2 for unit x and y: the product of (x, 1, -x^2 / 2) with rows
    rows = torch.ones(languages, sentences, hidden + 2, device=states.device)
    for row, centred in zip(rows, _centred(states)):
        row[:, :hidden], row[:, hidden] = centred, -centred.square().sum(1) / 2
    tie = -2 * _TIE * rows[:, :, hidden].mean()
    names = ("cosine", "margin_distance", "margin_ratio", "mexa")
    scores = {name: torch.full((languages, languages), torch.nan, dtype=torch.float64) for name in names}
    k = min(NEIGHBOURS, sentences)
    step = max(_BLOCK // sentences**2, 1)
    for a in range(languages):
        own = rows[a, :, [*range(hidden), hidden + 1, hidden]]
        for first in range(a + 1, languages, step):
            block = slice(first, min(first + step, languages))
            nearness = own @ rows[block].transpose(1, 2)  # [block, sentences of a, sentences of b]
            there, back = nearness.topk(k, dim=2), nearness.topk(k, dim=1)
            back_values, back_indices = back.values.transpose(1, 2), back.indices.transpose(1, 2)
            found = _found(there.values, there.indices, back_values, ids[a], ids[block], tie)
            found_back = _found(back_values, back_indices, there.values, ids[block], ids[a], tie)
            for name, each in found.items():
                scores[name][a, block] = each.double().mean(1).cpu()
                scores[name][block, a] = found_back[name].double().mean(1).cpu()
            both = (found["cosine"] & found_back["cosine"]).double().mean(1).cpu()
            scores["mexa"][a, block] = scores["mexa"][block, a] = both
    return scores | {"xsim": 1 - scores["margin_ratio"]}


def anisotropy(states: torch.Tensor) -> torch.Tensor:
    """Mean cosine of sentences that do not translate each other, i != j (Ethayarajh 2019, section 4.1), per direction.

    [languages, languages], fp64 on the CPU; the diagonal holds the mean within each language.
    """
    _, sentences, _ = states.shape
    rows = _unit(states)
    sums = rows.sum(1).double()
    flat = rows.flatten(1)
    unrelated = sums @ sums.T - (flat @ flat.T).double()
    return (unrelated / (sentences * (sentences - 1))).cpu()


def linear_cka(states: torch.Tensor) -> torch.Tensor:
    """Linear CKA of every two languages: |X'Y|^2 / (|X'X| |Y'Y|), Frobenius norms of centred X, Y [sentences, hidden].

    Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", section 3. It is biased upwards
    where there are fewer sentences than hidden dimensions. Computed by <XX', YY'> = |X'Y|^2 in blocks of rows, so that
    every language's Gram matrix is made once.

    Returns: [languages, languages], fp64 on the CPU; NaN for a language whose rows are all the same.
    """
    languages, sentences, _ = states.shape
    centred = states.float() - states.float().mean(1, keepdim=True)
    # Where all rows are the same, what is left is rounding.
    constant = centred.flatten(1).norm(dim=1) <= 1e-5 * states.float().flatten(1).norm(dim=1)
    centred /= centred.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None]  # CKA is free of scale; fp32 is not
    products = torch.zeros(languages, languages, dtype=torch.float64)
    step = max(_BLOCK // (languages * sentences), 1)
    for first in range(0, sentences, step):
        grams = (centred[:, first : first + step] @ centred.transpose(1, 2)).flatten(1)
        products += (grams @ grams.T).double().cpu()
    norms = products.diagonal().sqrt()
    norms[constant.cpu()] = torch.nan
    return products / (norms[:, None] * norms)


def separability(states: list[torch.Tensor]) -> torch.Tensor:
    """How well the nearest centroid tells the language: the share of each language's sentences put right.

    Centroids are of unit rows of one half of the sentences (even, odd), tried on the other half: a linear classifier,
    as in Libovický et al. 2020, "On the Language Neutrality of Pre-trained Multilingual Representations", section 3.

    Args: states: per language [its sentences, hidden].
    Returns: [languages], fp64 on the CPU; 1 / languages is chance.
    """
    rows = list(_centred(states))
    right = torch.zeros(len(rows), dtype=torch.float64)
    for half in (0, 1):
        centroids = torch.stack([each[half::2].mean(0) for each in rows])
        for number, each in enumerate(rows):
            # The largest x.c - |c|^2 / 2 is the smallest |x - c|.
            nearness = each[1 - half :: 2] @ centroids.T - centroids.square().sum(1) / 2
            nearness = nearness.nan_to_num(-torch.inf)  # the centroid of no row
            right[number] += (nearness.argmax(1) == number).sum().item()
    return right / torch.tensor([len(each) for each in rows])


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows.float(), dim=-1)


def _centred(states: torch.Tensor | list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Unit rows less their common mean, language by language in fp64: per language [sentences, hidden], fp32."""
    mean = sum(F.normalize(each.double(), dim=-1).mean(0) for each in states) / len(states)
    for each in states:
        yield (F.normalize(each.double(), dim=-1) - mean).float()


def _found(
    near: torch.Tensor,
    index: torch.Tensor,
    near_back: torch.Tensor,
    src_ids: torch.Tensor,
    tgt_ids: torch.Tensor,
    tie: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Per sentence of src, whether its best candidate is a right one, by cosine and by margin: name -> [block, n].

    Args: near, index [block, n, k]: cos - 1 and rows of the nearest of tgt; near_back [block, n, k]: cos - 1 of each
    row of tgt to its nearest of src; src_ids, tgt_ids [n] or [block, n]; tie: what the same score may differ by.
    """
    block, n, k = near.shape
    src_ids, tgt_ids = src_ids.expand(block, n), tgt_ids.expand(block, n)

    def of_candidates(values: torch.Tensor) -> torch.Tensor:
        return values.gather(1, index.reshape(block, n * k)).view(block, n, k)

    right = (of_candidates(tgt_ids) == tgt_ids[..., None]) | (of_candidates(src_ids) == src_ids[..., None])
    average = (near.mean(2)[..., None] + of_candidates(near_back.mean(2))) / 2
    distance = near - average
    # With a = 1 + near and b = 1 + average the ratio a / b is 1 + distance / b.
    scores = {"cosine": near, "margin_distance": distance, "margin_ratio": distance / (1 + average)}
    return {
        name: score.masked_fill(~right, -torch.inf).amax(2) > score.masked_fill(right, -torch.inf).amax(2) + tie
        for name, score in scores.items()
    }
