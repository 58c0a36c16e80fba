"""Every measure against a naive loop over sentences in double precision, ties and repeated sentences included."""

import json
import math
from pathlib import Path

import pytest
import torch

from mlalign import retrieval

DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(x, y))
    return dot / math.sqrt(sum(float(p) ** 2 for p in x) * sum(float(q) ** 2 for q in y))


def found(scores: list[list[float]], candidates: list[list[int]], src_ids, tgt_ids) -> list[bool]:
    """Whether the best right candidate of each row scores higher than every wrong one."""
    result = []
    for i, row in enumerate(scores):
        right = [j for j in candidates[i] if tgt_ids[j] == tgt_ids[i] or src_ids[j] == src_ids[i]]
        wrong = [j for j in candidates[i] if j not in right]
        best = max((row[j] for j in right), default=-math.inf)
        result.append(best > max((row[j] for j in wrong), default=-math.inf))
    return result


def naive(src: torch.Tensor, tgt: torch.Tensor, src_ids, tgt_ids, k: int = 4) -> dict[str, float]:
    n = len(src)
    cos = [[cosine(x, y) for y in tgt] for x in src]
    back = [[cos[i][j] for i in range(n)] for j in range(n)]
    every = [list(range(n))] * n
    near = [sorted(range(n), key=lambda j, i=i: -cos[i][j])[:k] for i in range(n)]
    near_src = [sum(sorted(row)[-k:]) / min(k, n) for row in cos]
    near_tgt = [sum(sorted(row)[-k:]) / min(k, n) for row in back]
    average = [[(near_src[i] + near_tgt[j]) / 2 for j in range(n)] for i in range(n)]
    distance = [[cos[i][j] - average[i][j] for j in range(n)] for i in range(n)]
    ratio = [[cos[i][j] / average[i][j] for j in range(n)] for i in range(n)]
    there = found(cos, every, src_ids, tgt_ids)
    mexa = [a and b for a, b in zip(there, found(back, every, tgt_ids, src_ids))]
    by_ratio = found(ratio, near, src_ids, tgt_ids)
    return {
        "cosine": sum(there) / n,
        "margin_distance": sum(found(distance, near, src_ids, tgt_ids)) / n,
        "margin_ratio": sum(by_ratio) / n,
        "xsim": 1 - sum(by_ratio) / n,
        "mexa": sum(mexa) / n,
    }


def check_all_directions(states: torch.Tensor, ids: torch.Tensor, measures) -> None:
    scores = retrieval.retrieval(states, ids)
    for a in range(len(states)):
        assert all(torch.isnan(scores[name][a, a]) for name in measures)
        for b in range(len(states)):
            if a != b:
                expected = naive(states[a], states[b], ids[a].tolist(), ids[b].tolist())
                for name in measures:
                    assert scores[name][a, b].item() == pytest.approx(expected[name], abs=1e-12), (name, a, b)


def noisy_translations(languages: int, sentences: int, hidden: int, seed: int) -> torch.Tensor:
    """States that retrieval finds about half of, all of them leaning one way, as an LLM's do."""
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(1, sentences, hidden, generator=generator)
    noise = torch.randn(languages, sentences, hidden, generator=generator)
    return meaning + 1.2 * noise + 3


@pytest.mark.parametrize("seed", range(3))
def test_all_directions_equal_a_naive_loop(seed):
    states = noisy_translations(4, 23, 8, seed)
    ids = torch.arange(23).expand(4, -1)
    check_all_directions(states, ids, ("cosine", "margin_distance", "margin_ratio", "xsim", "mexa"))
    assert 0.1 < retrieval.retrieval(states, ids)["margin_ratio"][0, 1] < 0.95


@pytest.mark.parametrize("block", [1, 23 * 23, 2 * 23 * 23])
def test_the_size_of_blocks_changes_nothing(block, monkeypatch):
    states, ids = noisy_translations(5, 23, 8, 0), torch.arange(23).expand(5, -1)
    whole = retrieval.retrieval(states, ids) | {"cka": retrieval.linear_cka(states)}
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    parts = retrieval.retrieval(states, ids) | {"cka": retrieval.linear_cka(states)}
    for name in whole:
        assert torch.allclose(whole[name], parts[name], equal_nan=True, atol=1e-6), name


def test_repeated_sentences_do_not_compete():
    states = noisy_translations(3, 20, 8, 1)
    ids = torch.arange(20).repeat(3, 1)
    for language, (copy, original) in ((0, (7, 2)), (1, (7, 2)), (1, (11, 2)), (2, (19, 0)), (0, (5, 4))):
        states[language, copy], ids[language, copy] = states[language, original], ids[language, original]
    check_all_directions(states, ids, ("cosine", "margin_distance", "margin_ratio", "xsim", "mexa"))


def test_five_times_the_same_sentence_fills_all_candidates():
    states = noisy_translations(2, 12, 8, 2)
    ids = torch.arange(12).repeat(2, 1)
    states[1, 3:8], ids[1, 3:8] = states[1, 3].clone(), 3
    check_all_directions(states, ids, ("cosine", "margin_distance", "margin_ratio", "mexa"))


def test_a_tie_with_another_sentence_is_no_find():
    """Different sentences with the very same state, as where all end with a full stop and the last token is pooled."""
    states = noisy_translations(3, 20, 64, 3)
    ids = torch.arange(20).expand(3, -1)
    states[1, 4] = states[1, 9]
    states[2, :] = states[2, 0].clone()
    check_all_directions(states, ids, ("cosine", "mexa"))
    scores = retrieval.retrieval(states, ids)
    assert scores["cosine"][0, 2] == scores["margin_ratio"][0, 2] == scores["mexa"][0, 2] == 0


@pytest.mark.parametrize("seed", range(5))
def test_ties_everywhere(seed):
    """Corners of a cube: a handful of different cosines, all of them exact in floating point."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randint(0, 2, (3, 10, 4), generator=generator) * 2.0 - 1
    ids = torch.arange(10).expand(3, -1)
    check_all_directions(states, ids, ("cosine", "mexa"))


@pytest.mark.parametrize("scale", [1, 100, 10_000])
def test_layers_where_every_cosine_is_nearly_one_are_exact(scale):
    """As where one coordinate of an LLM's states outgrows all others: plain fp32 cosines find next to nothing there."""
    generator = torch.Generator().manual_seed(8)
    meaning, noise = (torch.randn(size, 300, 512, generator=generator) for size in (1, 2))
    states = meaning + 2 * noise
    states[..., 0] += 30 * scale
    x, y = torch.nn.functional.normalize(states.double(), dim=2)
    cosines = x @ y.T
    assert cosines.min() > {1: 0.0, 100: 0.99, 10_000: 0.9999999}[scale]
    near, index = cosines.topk(4, dim=1)
    average = (near.mean(1, keepdim=True) + cosines.topk(4, dim=0).values.mean(0)[index]) / 2
    best = {"cosine": near, "margin_distance": near - average, "margin_ratio": near / average}
    scores = retrieval.retrieval(states, torch.arange(300).expand(2, -1))
    for name, values in best.items():
        found = index.gather(1, values.argmax(1, keepdim=True)).squeeze(1) == torch.arange(300)
        assert scores[name][0, 1].item() == pytest.approx(found.double().mean().item(), abs=1.5 / 300), name
        assert scores[name][0, 1] > 0.5
    if scale == 10_000:
        x, y = torch.nn.functional.normalize(states, dim=2)
        assert ((x @ y.T).argmax(1) == torch.arange(300)).float().mean() < 0.2


def test_cka_of_a_language_whose_states_are_all_the_same_is_not_a_number():
    states = noisy_translations(3, 12, 8, 9)
    states[1] = states[1, :1] + 0.1
    measured = retrieval.linear_cka(states)
    assert measured[1].isnan().all()
    assert measured[0, 2].isfinite()


def laser_xsim(x: torch.Tensor, y: torch.Tensor, margin: str, k: int = 4) -> float:
    """xSIM of Heffernan et al. 2022 with the margins of Artetxe & Schwenk 2019, equations 1 to 3, sentence by sentence.

    score(x, y) = margin(cos(x, y), sum of cos(x, z) / 2k over the k nearest z of x + the same of y), of the k nearest.
    """
    errors = 0
    for i in range(len(x)):
        cosines = [cosine(x[i], row) for row in y]
        nearest = sorted(range(len(y)), key=lambda j: -cosines[j])[:k]
        scores = []
        for j in nearest:
            others = sorted((cosine(row, y[j]) for row in x), reverse=True)[:k]
            average = sum(cosines[z] for z in nearest) / (2 * k) + sum(others) / (2 * k)
            a = cosines[j]
            scores.append({"absolute": a, "distance": a - average, "ratio": a / average}[margin])
        errors += nearest[max(range(k), key=lambda place: scores[place])] != i
    return errors / len(x)


@pytest.mark.skipif(not DATA.exists(), reason="needs the data pack beside the project (../shared/data)")
def test_margins_are_those_of_lasers_xsim_on_real_sentences(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model).eval(), AutoTokenizer.from_pretrained(tiny_model)
    states = []
    for language in ("deu_Latn", "afr_Latn"):
        lines = (DATA / "flores200_devtest" / f"{language}.jsonl").read_text().splitlines()[:40]
        rows = [tokenizer(json.loads(line)["text"][:60], return_tensors="pt").input_ids for line in lines]
        with torch.inference_mode():
            states.append(torch.stack([lm.model(row).last_hidden_state[0].mean(0) for row in rows]))
    scores = retrieval.retrieval(torch.stack(states), torch.arange(40).expand(2, -1))
    for name, margin in (("cosine", "absolute"), ("margin_distance", "distance"), ("margin_ratio", "ratio")):
        for src, tgt in ((0, 1), (1, 0)):
            assert 1 - scores[name][src, tgt].item() == pytest.approx(laser_xsim(states[src], states[tgt], margin))
    assert 0 < scores["margin_ratio"][0, 1] < 1


def test_retrieval_accuracy_by_hand():
    src = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    tgt = torch.tensor([[2.0, 0.1], [0.1, 3.0], [5.0, 0.0]])  # the third is nearest to the first
    ids = torch.arange(3).expand(2, -1)
    found = retrieval.retrieval(torch.stack([src, tgt]), ids)["cosine"]
    assert found[0, 1] == pytest.approx(1 / 3)
    assert found[1, 0] == pytest.approx(2 / 3)
    assert retrieval.retrieval(torch.stack([src, src]), ids)["cosine"][0, 1] == 1


def test_anisotropy_equals_a_naive_loop():
    states = noisy_translations(3, 9, 6, 4)
    measured = retrieval.anisotropy(states)
    for a in range(3):
        for b in range(3):
            values = [cosine(states[a, i], states[b, j]) for i in range(9) for j in range(9) if i != j]
            assert measured[a, b].item() == pytest.approx(sum(values) / len(values), abs=1e-6)


@pytest.mark.parametrize("hidden", [5, 40])
def test_cka_equals_its_definition_by_hsic(hidden):
    """Kornblith et al. 2019, equations 2 to 4: HSIC(K, L) = tr(KHLH) / (n - 1)^2."""
    states = noisy_translations(3, 12, hidden, 5)
    measured = retrieval.linear_cka(1e4 * states)
    centring = torch.eye(12, dtype=torch.float64) - 1 / 12
    grams = [each.double() @ each.double().T for each in states]

    def hsic(k: torch.Tensor, m: torch.Tensor) -> float:
        return float((k @ centring @ m @ centring).trace()) / 11**2

    for a in range(3):
        for b in range(3):
            expected = hsic(grams[a], grams[b]) / math.sqrt(hsic(grams[a], grams[a]) * hsic(grams[b], grams[b]))
            assert measured[a, b].item() == pytest.approx(expected, abs=1e-5)


def test_separability_equals_a_naive_loop():
    generator = torch.Generator().manual_seed(6)
    states = [torch.randn(size, 4, generator=generator) + torch.randn(4, generator=generator) for size in (11, 8, 14)]
    units = [[row / row.norm() for row in each.double()] for each in states]
    for language, share in enumerate(retrieval.separability(states)):
        right = 0
        for i, row in enumerate(units[language]):
            centroids = [sum(each[1 - i % 2 :: 2]) / len(each[1 - i % 2 :: 2]) for each in units]
            right += min(range(3), key=lambda other: float((row - centroids[other]).norm())) == language
        assert share.item() == pytest.approx(right / len(units[language]))


def test_separability_of_languages_that_are_apart_is_one_and_of_one_language_is_chance():
    generator = torch.Generator().manual_seed(7)
    places = 5 * torch.eye(4)
    apart = [place + torch.randn(30, 4, generator=generator) * 0.1 for place in places]
    assert retrieval.separability(apart).tolist() == [1, 1, 1, 1]
    same = [torch.randn(400, 4, generator=generator) for _ in range(4)]
    assert retrieval.separability(same).mean().item() == pytest.approx(0.25, abs=0.08)
