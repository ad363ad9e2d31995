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
Log2 LogSigmoid LogSoftmax Logaddexp Logaddexp2 Logcumsumexp Logit Logsumexp LuUnpack MaskedSoftmax Matmul Mean
MiopenBatchNorm MiopenConvolution Mish MkldnnConvolution MkldnnLinear MkldnnRnnLayer Mm MpsConvolution MseLoss Mv
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
_LINKS = {"AccumulateGrad", "CopySlices", "CopyBackwards", "BackwardHookFunctionBackward", "_DDPSinkBackward"}
_ROUNDED_DIVISIONS = {"DivBackward2", "DivBackward3"}
# Rounded to TF32 by default, on a CUDA device.
_TF32 = {"ConvolutionBackward0", "CudnnConvolutionBackward0", "CudnnConvolutionTransposeBackward0", "CudnnRnnBackward0"}


@cache
def _is_smooth(name: str) -> bool:
    if name in _LINKS:
        return True
    kind = re.fullmatch(r"(\w+?)Backward\d*", name)
    return kind is not None and kind[1] in _SMOOTH and name not in _ROUNDED_DIVISIONS


def rounding_of(node: Any, name: str) -> float:
    """How exact a node computes: 0 if as its inputs are, infinite where it may have pieces that are not seen."""
    if name == "ToCopyBackward0":
        dtype = dtype_of(node)
        if dtype is None:
            return math.inf
        return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0
    if name in _TF32 and _on_cuda(node) and _rounds_convolutions():
        return math.inf
    if name == "CudnnRnnBackward0":
        return math.inf if saved_by(node, "mode") == 0 else 0.0  # of ReLUs
    return 0.0 if _is_smooth(name) else math.inf


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


def _on_cuda(node: Any) -> bool:
    weight = saved_by(node, "weight", saved_by(node, "weight_buf"))
    return weight is None or bool(weight.is_cuda)
