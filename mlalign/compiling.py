"""`model.compile`: torch.compile of the decoder's blocks, made once for all of them and for passes of all shapes."""

import os
import shutil
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton
from torch.utils.cpp_extension import get_cxx_compiler

from mlalign import distributed
from mlalign.errors import UserError
from mlalign.model import decoder_parts
from mlalign.zero import stage


def check_compile(zero: dict[str, Any]) -> None:
    """Raise UserError where `model.compile` cannot be: under ZeRO-3, or with nothing to compile with."""
    if stage(zero) == 3:
        raise UserError(
            "model.compile needs ZeRO stage 0, 1 or 2: ZeRO-3 gathers parameters inside of what is compiled"
        )
    if distributed.uses_cuda():
        missing = _no_c_compiler() if has_triton() else "triton"
    else:
        missing = None if shutil.which(get_cxx_compiler()) else get_cxx_compiler()
    if missing:
        raise UserError(f"model.compile needs {missing}, which is not there: install it, or set it to false")


def _no_c_compiler() -> str | None:
    """What of a C compiler is not there: with it Triton compiles what launches its kernels, also at run time."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return None if any(map(shutil.which, names)) else " or ".join(names)


def compile_blocks(lm: nn.Module) -> None:
    """Have torch compile the blocks when they first run: once for all of them, and for all shapes."""
    # Passes of several kinds (with gradient and without, padded and packed, of either mode) are versions of one code.
    torch._dynamo.config.recompile_limit = 64
    # torch's random numbers, not inductor's: a compiled run drops out what a plain one does, in every kind of pass.
    torch._inductor.config.fallback_random = True
    decoder, stack, _ = decoder_parts(lm)
    for block in getattr(decoder, stack):
        block.compile(dynamic=True)
