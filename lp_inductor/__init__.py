"""FP8 attention for any PyTorch model: ``torch.compile(model, backend="lp_fp8")``."""

from lp_inductor.backend import MissError, compile_with_fp8_fusion
from lp_inductor.config import ConfigError, Fp8Config
from lp_inductor.explain import Report, explain
from lp_inductor.functional import scaled_dot_product_attention_fp8
from lp_inductor.kernels import (
    AttentionCall,
    Kernel,
    MaskPart,
    Visibility,
    register_kernel,
    registered_kernels,
    unregister_kernel,
)
from lp_inductor.kernels.registry import KernelError
from lp_inductor.passes.result import Miss, MissCode, Ok
from lp_inductor.passes.site import Site

__version__ = "0.1.0"

__all__ = [
    "AttentionCall",
    "ConfigError",
    "Fp8Config",
    "Kernel",
    "KernelError",
    "MaskPart",
    "Miss",
    "MissCode",
    "MissError",
    "Ok",
    "Report",
    "Site",
    "Visibility",
    "compile_with_fp8_fusion",
    "explain",
    "register_kernel",
    "registered_kernels",
    "scaled_dot_product_attention_fp8",
    "unregister_kernel",
]
