"""A rank whose weights are not the others' is found, named, and ends the run on all ranks."""

from pathlib import Path

import pytest
import torch
from torch import nn

from mlalign import guards
from mlalign.errors import UserError


def sentence(bad_rank: int | None) -> str:
    from mlalign import distributed

    torch.manual_seed(1)
    lm = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lm[0].weight.requires_grad_(False)
    if distributed.rank() == 1:
        lm[0].weight += 1  # frozen: no copy that training changes
    if distributed.rank() == bad_rank:
        with torch.no_grad():
            lm[1].weight.view(torch.int32)[2, 3] ^= 1  # one bit
    try:
        guards.refuse_diverged(lm, 7, Path("runs/x"))
    except UserError as error:
        return str(error)
    return "alike"


@pytest.mark.parametrize("bad", [1, 3])
def test_one_bit_on_one_rank_is_found_on_all(ranks, bad):
    for found in ranks(4).run(sentence, bad):
        assert found.startswith(f"after step 7 rank {bad} has other weights than rank 0, in 1.weight first")


def test_equal_copies_pass(ranks):
    assert set(ranks(4).run(sentence, None)) == {"alike"}
    assert sentence(0) == "alike", "a rank alone has no copies"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_ends_the_run(value):
    guards.refuse_non_finite({"train/task_loss": 1.0}, 3, Path("runs/x"))
    with pytest.raises(UserError, match=r"train/grad_norm is (nan|inf) after step 3"):
        guards.refuse_non_finite({"train/task_loss": 1.0, "train/grad_norm": value}, 3, Path("runs/x"))
