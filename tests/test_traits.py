"""What a model is asked before it is relied on: `is_plain` in test_head, whether tokens see later ones here."""

import pytest
import torch
from test_model import ARCHITECTURES, build, inputs, passes

from mlalign import traits
from mlalign.model import AlignedModel


def both_ways(attention: str):
    """A Llama whose tokens see all others; with sdpa, only where there is a mask: else that goes by a block's flag."""
    lm = build("llama")
    lm.config._attn_implementation = attention
    lm.config.is_causal = False
    return lm


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_on_the_right_needs_no_mask(architecture):
    lm = build(architecture)
    aligned = AlignedModel(lm, 2, "mean").train()
    bitext = passes(inputs(), inputs())
    wanted = aligned(bitext=bitext)
    aligned.ask()
    assert not aligned.masked
    assert lm.training
    torch.testing.assert_close(aligned(bitext=bitext), wanted)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_that_sees_later_tokens_is_told_of_padding(attention):
    aligned = AlignedModel(both_ways(attention), 2, "mean")
    aligned.ask()
    assert aligned.masked
    assert not traits.is_causal(both_ways(attention).get_decoder())
