"""Attention of bfloat16 tokens on the CPU by the native kernel, inside ``F.scaled_dot_product_attention``.

On the CPU that function ends in one operator of torch. :func:`switch` gives it our kernel (csrc/attention.h), which
hands back to torch's whatever it does not take: other dtypes, dropout, causal masks, odd or large head sizes.

``lrqdit.quantize``, ``lrqdit.observe`` and diffusers, when it loads a quantized model, switch it on (:func:`start`) and
log a line, unless the user chose before, ``LRQDIT_ATTENTION=torch`` is set, or the CPU has AMX that our kernels do not
use.
``lrqdit.load_checkpoint`` leaves it to :func:`switch`.
"""

import contextlib
import ctypes
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lrqdit import native
from lrqdit.errors import ConfigError, KernelError

ENVIRONMENT = "LRQDIT_ATTENTION"
CHOICES = ("native", "torch")
MAX_WIDTH = 256  # of a head
INSTRUCTION_SET = "avx512bf16"
OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"
AMX = "amx"
SLOW_BESIDE_AMX = (
    "this CPU has AMX and our kernels do not use it now; without it, the native attention had 0.2 to 0.4 times the "
    "speed of torch's on one such CPU"
)
MASK_TYPES = {torch.float32: 0, torch.bfloat16: 1}

_Strides = ctypes.c_int64 * 3
_registration: torch.library.Library | None = None  # the kernel is torch's again once this is dropped
_torch_kernel: Any = None
_is_chosen = False
_log = logging.getLogger("lrqdit")


def why_torch() -> str:
    """Why torch's own attention runs on this CPU whatever is chosen; "" if ours can."""
    if native.LIBRARY is None:
        return native.WHY_REFERENCE
    if not native.LIBRARY.lrq_has_pairs():
        missing = native.instruction_sets(native.LIBRARY).get(INSTRUCTION_SET, "this CPU has no AVX-512 BF16")
        return missing or f"{native.ENVIRONMENT} chose an instruction set without products of bfloat16"
    if not hasattr(torch.library, "get_kernel"):
        return f"torch {torch.__version__} cannot hand over its own kernel; a newer one can"
    return ""


def current() -> str:
    """Whose attention takes bfloat16 tokens on the CPU now: one of CHOICES."""
    return "torch" if _registration is None or why_torch() else "native"


def switch(name: str) -> None:
    """Use ``"native"`` or ``"torch"`` attention in this process from now on, quantized models or not.

    Raises:
        ConfigError: if it is neither.
        KernelError: if the native one cannot run here.
    """
    global _registration, _is_chosen
    if name not in CHOICES:
        raise ConfigError(f"attention {name!r} is not one of {', '.join(CHOICES)}")
    if name == "native" and (why := why_torch()):
        raise KernelError(f"native attention: {why}")
    _is_chosen = True
    if name == "torch":
        _registration = None
    else:
        _register()
        _warn()


def _register() -> None:
    global _registration, _torch_kernel
    if _registration is not None:
        return
    _torch_kernel = torch.library.get_kernel(f"aten::{OPERATOR}", "CPU")
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced is what is meant
        library.impl(OPERATOR, _attend, "CPU", with_keyset=True)
    _registration = library


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """:func:`switch` within a ``with`` block."""
    global _is_chosen
    before = "torch" if _registration is None else "native", _is_chosen
    switch(name)
    try:
        yield
    finally:
        switch(before[0])
        _is_chosen = before[1]


def start() -> None:
    """Switch the native kernel on where it is the better one, unless somebody chose.

    Raises:
        ConfigError, KernelError: if the environment variable asks for what is not there.
    """
    if not _is_chosen and not why_not_by_default() and _registration is None:
        _register()
        _log.info(
            "attention of bfloat16 tokens on the CPU is lrqdit's in this process from now on, in every model; set "
            "%s=torch or call lrqdit.attention.switch('torch') to keep torch's", ENVIRONMENT,
        )  # fmt: skip
        _warn()


def describe() -> str:
    """Whose attention runs on the CPU and why not ours, one line."""
    if current() == "native":
        return "CPU attention: native, for bfloat16 tokens" + (f"; {SLOW_BESIDE_AMX}" if _leaves_amx() else "")
    if why := why_not_by_default():
        return f"CPU attention: torch ({why})"
    if _is_chosen:
        return "CPU attention: torch (chosen in this process)"
    return "CPU attention: native, for bfloat16 tokens, from the first quantized model on"


def _warn() -> None:
    if _leaves_amx():
        _log.warning("%s; lrqdit.attention.switch('torch') goes back", SLOW_BESIDE_AMX)


def _leaves_amx() -> bool:
    """Whether torch may use AMX on this CPU and our kernels do not."""
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return has_amx and native.LIBRARY is not None and native.LIBRARY.lrq_isa().decode() != AMX


def why_not_by_default() -> str:
    """Why :func:`start` leaves torch's attention on; "" if it does not.

    Raises:
        ConfigError, KernelError: as :func:`start` does.
    """
    wanted = os.environ.get(ENVIRONMENT, "")
    if wanted not in ("", *CHOICES):
        raise ConfigError(f"{ENVIRONMENT}={wanted!r} is not one of {', '.join(CHOICES)}; set one of them, or unset it")
    if wanted == "torch":
        return f"{ENVIRONMENT}=torch"
    why = why_torch()
    if wanted and why:
        raise KernelError(f"{ENVIRONMENT}={wanted}: {why}")
    if not why and not wanted and _leaves_amx():
        return SLOW_BESIDE_AMX
    return why


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the native kernel computes this."""
    assert native.LIBRARY is not None
    if not all(t.dtype == torch.bfloat16 and t.dim() == 4 and t.stride(3) == 1 for t in (query, key, value)):
        return False
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    if width > MAX_WIDTH or width % 2 or not query.numel() or not keys or key.shape != value.shape:
        return False
    if key.shape != (batch, heads, keys, width) or not native.LIBRARY.lrq_has_pairs():
        return False
    if mask is None:
        return True
    if mask.dtype not in MASK_TYPES or mask.dim() not in (2, 4) or mask.shape[-1] != keys or mask.stride(-1) != 1:
        return False
    sizes = (batch, heads, queries)[4 - mask.dim() :]
    return all(found in (1, size) for found, size in zip(mask.shape[:-1], sizes, strict=True))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v (FlashAttention, arXiv 2205.14135), products of bfloat16 with float32 sums.

    Args:
        query, key, value: bfloat16 (batch, heads, tokens, width), channels contiguous.
        mask: bfloat16 or float32 (queries, keys) or (batch, heads, queries, keys), each of them or 1 but the last.
        scale: of the products.

    Returns:
        The output, bfloat16, its dimensions in the query's order in memory; and the logarithm of the sum of
        exponentials, float32 (batch, heads, queries). Both are 0 where a mask of -inf leaves no key.

    Raises:
        KernelError: if memory is short.
    """
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    out = torch.empty_like(query)
    if out.stride(3) != 1:  # of a query whose channels overlap something else
        out = query.new_empty(query.shape)
    logsumexp = query.new_empty(batch, queries, heads, dtype=torch.float32).transpose(1, 2)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
    tensors = query, key, value, out, logsumexp, mask
    call = native.Attention(
        *(None if t is None else t.data_ptr() for t in tensors),
        *(batch, heads, queries, keys, width),
        *(_Strides() if t is None else _Strides(*t.stride()[:3]) for t in tensors),
        0 if mask is None else MASK_TYPES[mask.dtype],
        scale,
    )
    native.call_plain("lrq_attend", call, torch.get_num_threads())
    return out, logsumexp


def _attend(
    keys: Any, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if dropout_p or is_causal or not _takes(query, key, value, attn_mask):
        arguments = query, key, value, dropout_p, is_causal
        return _torch_kernel.call_boxed(keys, *arguments, attn_mask=attn_mask, scale=scale)
    return attend(query, key, value, attn_mask, 1 / math.sqrt(query.shape[3]) if scale is None else scale)
