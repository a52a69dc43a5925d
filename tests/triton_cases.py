"""Triton for the tests of its kernels: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
reason = "the Triton kernels' tests need triton >= 3.6: pip install triton"
triton = pytest.importorskip("triton", minversion="3.6", reason=reason)

if DEVICE.type == "cpu":
    from triton.runtime import interpreter

    # The interpreter puts itself into triton.language again at each call of a function by a function, which takes most
    # of its time. Once for each module that a function may see is enough.
    LANGUAGES = (interpreter.tl, interpreter.tl.core)
    _enter, _entered = interpreter._patch_lang, set()

    def _enter_once(function):
        seen = {lang for lang in LANGUAGES if any(value is lang for value in function.__globals__.values())}
        if not seen <= _entered:
            _entered.update(seen)
            _enter(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = _enter_once
