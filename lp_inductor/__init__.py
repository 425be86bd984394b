"""FP8 attention for any PyTorch model: ``torch.compile(model, backend="lp_fp8")``."""

from lp_inductor.backend import MissError, compile_with_fp8_fusion
from lp_inductor.config import ConfigError, Fp8Config
from lp_inductor.explain import Report, explain
from lp_inductor.export import aoti_compile_and_package, aoti_inductor_configs
from lp_inductor.functional import scaled_dot_product_attention_fp8
from lp_inductor.kernels import (
    Adapter,
    AttentionCall,
    Kernel,
    Library,
    MaskPart,
    Visibility,
    register_kernel,
    registered_kernels,
    unregister_kernel,
)
from lp_inductor.kernels.registry import KernelError
from lp_inductor.package import PackageError, PackageInfo, load_package, read_package
from lp_inductor.passes.result import Miss, MissCode, Ok
from lp_inductor.passes.site import Site

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AttentionCall",
    "ConfigError",
    "Fp8Config",
    "Kernel",
    "KernelError",
    "Library",
    "MaskPart",
    "Miss",
    "MissCode",
    "MissError",
    "Ok",
    "PackageError",
    "PackageInfo",
    "Report",
    "Site",
    "Visibility",
    "aoti_compile_and_package",
    "aoti_inductor_configs",
    "compile_with_fp8_fusion",
    "explain",
    "load_package",
    "read_package",
    "register_kernel",
    "registered_kernels",
    "scaled_dot_product_attention_fp8",
    "unregister_kernel",
]
