"""The module that PaddleNLP imports for `use_fused_rms_norm`; an ImportError says when the ops are not built."""

from oarlock.ops.library import load
from oarlock.ops.rms_norm import fused_add_rms_norm, fused_ln, fused_rms_norm

__all__ = ["fused_add_rms_norm", "fused_ln", "fused_rms_norm"]

load()
