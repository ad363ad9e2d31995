"""Which nodes of an autograd graph are known to have no pieces, and how exactly they compute."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

import torch

from hypergrad.torch_internals import dtype_of, saved_by

# Those that are smooth, if only once, or linear: what is not listed may have pieces that nobody sees.
_NAMES = """
Acos Acosh AdaptiveAvgPool2D AdaptiveAvgPool3D Add Addbmm Addcdiv Addcmul Addmm Addmv Addr AffineGridGenerator Alias
AsStrided AsStridedScatter Asin Asinh Atan Atan2 Atanh AvgPool2D AvgPool3D Baddbmm BinaryCrossEntropy
BinaryCrossEntropyWithLogits BlockDiag Bmm Cat Celu ChannelShuffle Cholesky CholeskyInverse CholeskySolve Chunk Clone
Col2Im Complex Conj ConjPhysical ConstantPadNd ConvDepthwise2D ConvDepthwise3D ConvTbc Convolution
ConvolutionOverrideable Copy Cos Cosh CtcLoss CudnnAttention CudnnBatchNorm CudnnConvolution CudnnConvolutionTranspose
CudnnCtcLoss Cumprod Cumsum Deg2Rad DiagEmbed Diagonal DiagonalScatter Digamma Div Dot EfficientAttention Erf Erfc
Erfinv EuclideanDist Exp Exp2 Expand Expm1 FftC2C FftC2R FftR2C Fill FlashAttention Flip FusedDropout FusedRmsNorm
Gelu Glu GroupedMm HuberLoss Hypot I0 Igamma Igammac Im2Col Imag Kron Lerp Lgamma LiftFresh LinalgCholeskyEx
LinalgCross LinalgDet LinalgEig LinalgEigh LinalgInvEx LinalgLstsq LinalgLu LinalgLuFactorEx LinalgLuSolve
LinalgMatrixExp LinalgPinv LinalgQr LinalgSlogdet LinalgSolveEx LinalgSolveTriangular LinalgSvd Linear Log Log10 Log1P
Log2 LogSigmoid LogSoftmax Logaddexp Logaddexp2 Logcumsumexp Logsumexp LuUnpack MaskedSoftmax Matmul Mean
MiopenBatchNorm MiopenConvolution Mish MkldnnConvolution MkldnnLinear MkldnnRnnLayer Mm MpsConvolution MseLoss Mul Mv
Mvlgamma Nansum NarrowCopy NativeBatchNorm NativeDropout NativeGroupNorm NativeLayerNorm Neg NegView NllLoss NllLoss2D
Normal PackPaddedSequence Permute PixelShuffle PixelUnshuffle Polar Polygamma Pow Prod Rad2Deg Real Reciprocal
ReflectionPad1D ReflectionPad2D ReflectionPad3D Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D ReshapeAlias
ReshapeCopy Roll Rot90 Rsqrt Rsub SafeSoftmax ScaledDotProductCudnnAttention ScaledDotProductEfficientAttention
ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu ScaledDotProductFusedAttentionOverrideable Select
SelectScatter Sigmoid Silu Sin Sinc Sinh Slice SliceScatter SlowConv2D SlowConv3D SlowConvDilated2D SlowConvDilated3D
SlowConvTranspose2D SlowConvTranspose3D SmoothL1Loss SoftMarginLoss Softmax Softplus SpecialEntr SpecialErfcx
SpecialI0E SpecialI1 SpecialI1E SpecialLogNdtr SpecialNdtri SpecialXlog1Py Split SplitWithSizes Sqrt Squeeze Stack Std
StdMean Sub Sum T Tan Tanh ThnnFusedGruCell ThnnFusedLstmCell Trace Transpose TriangularSolve Tril Trilinear Triu
Unbind Unfold Uniform UnsafeSplit UnsafeSplitWithSizes UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2D
UpsampleLinear1D UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D
UpsampleNearestExact3D UpsampleTrilinear3D Values Var VarMean Vdot View ViewAsComplex ViewAsReal WeightNormInterface
Xlogy Zero
"""
_SMOOTH = frozenset(_NAMES.split())
# Whole names: of no function, of one that hands gradients on as they are.
_LINKS = {"AccumulateGrad", "CopyBackwards", "BackwardHookFunctionBackward", "_DDPSinkBackward"}
_ROUNDED_DIVISIONS = {"DivBackward2", "DivBackward3"}
# Kinds that are smooth with some settings: the name of the setting, and those.
_SETTINGS: dict[str, tuple[str, tuple[float, ...]]] = {
    "Norm": ("p", (2.0,)),
    "Cdist": ("p", (2.0,)),
    "EmbeddingBag": ("mode", (0, 1)),  # sum and mean
    "CudnnRnn": ("mode", (1, 2, 3)),  # tanh, LSTM and GRU
}
# Rounded to TF32 by default, on a CUDA device.
_TF32 = {"Convolution", "CudnnConvolution", "CudnnConvolutionTranspose", "CudnnRnn"}
_CAST = "ToCopy"


def rounding_of(node: Any, name: str, *, on_cuda: bool) -> float:
    """How exact a node computes: 0 if as its inputs are, infinite where it may have pieces that are not seen.

    Tensors that the node keeps are not looked at: somebody may have packed them.
    """
    kind = _kind(name)
    if kind in _TF32 and on_cuda and _rounds_convolutions():
        return math.inf
    if kind in _SETTINGS:
        setting, smooth = _SETTINGS[kind]
        return 0.0 if saved_by(node, setting) in smooth else math.inf
    dtype = dtype_of(node) if kind == _CAST else None
    if dtype is not None:
        return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
    return 0.0 if name in _LINKS or kind in _SMOOTH else math.inf


@cache
def is_smooth(name: str) -> bool:
    """Whether nodes of this name have no pieces and are exact, whatever their settings."""
    kind = _kind(name)
    return name in _LINKS or (kind in _SMOOTH and kind not in _TF32)


@cache
def _kind(name: str) -> str:
    found = re.fullmatch(r"(\w+?)Backward\d+", name)
    return "" if found is None or name in _ROUNDED_DIVISIONS else found[1]


def rounds_products() -> bool:
    """Whether products of matrices in float32 may be computed in less."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set per backend
        return True


def _rounds_convolutions() -> bool:
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # set per operation
        return True
