"""What ExecuTorch's XNNPACK backend runs in integers, each fact once.

A kernel is a family of operators with its limits; a limit looks at an operator with its operands and returns the reason
why the kernel does not take it, or None. The quantizer's rules ask the limits before they quantize, the contract asks
them of the graph before it is lowered, and docs/support.md lists them. Measured with ExecuTorch's runtime.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Node

from .... import ops
from ....arguments import bind
from ....graph.attributes import constant
from ....reasons import because
from ....specs import FOUR_BITS, uneven_groups
from .case import Case, Kernel, Limit

__all__ = [
    "ACTIVATION_RANGE",
    "ADD",
    "AVERAGE",
    "CAT",
    "CHANNELS_LAST",
    "CLAMP",
    "CONVOLUTION",
    "FLOAT",
    "GROUP_RANGE",
    "GROUP_UNIT",
    "KERNELS",
    "LARGEST_CAT",
    "LARGEST_FACTOR",
    "LINEAR",
    "MATRIX",
    "MAX_POOL",
    "MEAN",
    "MUL",
    "NO_3D",
    "OUTSIDE",
    "PADDING",
    "POINTWISE",
    "PRODUCTS",
    "REASONS",
    "RESHAPE",
    "SLICE",
    "SQUEEZE",
    "SUB",
    "TRANSPOSED",
    "WEIGHT_RANGE",
    "Case",
    "Kernel",
    "Limit",
    "axis_of_channels",
    "group_size",
    "kernel_of",
    "not_int8",
    "not_static",
    "not_zero_padding",
    "one_scale_in_all",
    "scales_not_float32",
    "shifted_weight",
    "unfit_groups",
]

aten, Q = torch.ops.aten, torch.ops.quantized_decomposed

ACTIVATION_RANGE, WEIGHT_RANGE, GROUP_RANGE = (-128, 127), (-127, 127), FOUR_BITS
"""Bounds of the integers; weights in groups have 4 bits."""

LARGEST_FACTOR = 256.0
"""Products are requantized by (scale of the input) * (scale of the weight) / (scale of the output), which is less. Of
other kernels every ratio of scales that was tried runs: up to 257 for add, sub, mul, mean and 274 for clamps; down to
2**-16 for mul, 2**-10 for add and sub, 2**-8 for mean and clamps."""

LARGEST_CAT = 5  # tensors that one cat reads
GROUP_UNIT = 32
"""Weights that share a scale come in multiples of this."""


# --- products with weights --------------------------------------------------------------------------------------------


def half_in_float(case: Case) -> str | None:
    """A product is one of integers only when both of its sides are integers."""
    if case.weight is None:
        return because("configuration", "its weight stays in float, so XNNPACK would multiply in float")
    if case.activation is None:
        return because("configuration", "only its weight is quantized, and XNNPACK has no weight-only kernel")
    return None


def dynamic_per_tensor(case: Case) -> str | None:
    """Dynamic activations need weights with a scale for each channel."""
    if case.activation != "dynamic" or case.weight in ("channel", "group"):
        return None
    return because("configuration", "XNNPACK's dynamic kernels need per-channel weights; set is_per_channel=True")


def grouped_weights(case: Case) -> str | None:
    """Weights in groups: of linears with dynamic activations, in rows that they fill."""
    _, weight = case.factors()
    if not case.group or weight is None:
        return None
    if len(weight) != 2:
        return because("configuration", "XNNPACK's convolutions take one weight scale per channel, not one per group")
    if case.activation != "dynamic":
        return because(
            "configuration", "XNNPACK takes groups of weights with dynamic activations only; set is_dynamic=True"
        )
    width = weight[1]
    return uneven_groups(width, case.group, f"its {width} inputs")


def computed_parameters(case: Case) -> str | None:
    """Weight and bias are constants."""
    for kind, operand in zip(("weight", "bias"), ops.factors(case.node)[1:], strict=True):
        if isinstance(operand, Node) and not case.is_constant(operand):
            why = f"its {kind} {operand.name} is computed at run time; XNNPACK packs constant weights and biases only"
            return because("computed_operand", why)
    return None


def unbatched(case: Case) -> str | None:
    """Convolutions have a batch dimension."""
    x, weight = case.factors()
    if x is None or weight is None or len(x) == len(weight):
        return None
    of, all_of = len(x), len(weight)
    return because(
        "shape", f"its input has {of} dimensions and its weight {all_of}; XNNPACK needs as many, with the batch"
    )


def not_static(case: Case) -> str | None:
    """Static qparams only."""
    static = case.activation == "static" and case.output
    why = "XNNPACK runs it in integers with static qparams only, which this configuration does not use"
    return None if static else because("configuration", why)


def dynamic_convolution(case: Case) -> str | None:
    """Dynamic activations: 2-D convolutions that are not depthwise."""
    _, weight = case.factors()
    if case.activation != "dynamic" or weight is None:
        return None
    if len(weight) != 4:
        return because("configuration", "XNNPACK's dynamic convolutions are 2-d only")
    # also an image of one channel: to XNNPACK that is depthwise
    inputs = weight[0] // case.argument("groups") if ops.is_conv_transpose(case.node) else weight[1]
    depthwise = inputs == 1
    return because("configuration", "XNNPACK has no dynamic depthwise convolution") if depthwise else None


def one_scale_in_all(case: Case) -> str | None:
    """Dynamic activations: of one image, since the kernel chooses a scale for each."""
    x, _ = case.factors()
    if case.activation != "dynamic" or x is None or (isinstance(x[0], int) and x[0] == 1):
        return None
    why = f"its batch is {x[0]}; XNNPACK's dynamic convolution has a scale for each image, the graph one in all"
    return because("shape", why)


def grouped_transpose(case: Case) -> str | None:
    """Transposed, with a scale for each channel: one group, channels on axis 1."""
    groups = case.argument("groups")
    if case.weight != "channel" or (groups == 1 and case.axis in (None, 1)):
        return None
    axis = "" if case.axis is None else f"axis={case.axis} and "
    needed = "with per-channel weights, XNNPACK's transposed convolution needs axis=1 and groups=1"
    return because("groups", f"{needed}, this one has {axis}groups={groups}")


def not_zero_padding(case: Case) -> str | None:
    """Zeros only, and nothing cut off."""
    mode, value, amounts = (case.argument(name) for name in ("mode", "value", "pad"))
    if not ops.pads_zeros(case.node):
        return because("padding", f"mode={mode!r}, value={value}: XNNPACK's convolutions pad with zeros")
    crops = any(isinstance(amount, int) and amount < 0 for amount in amounts)
    return because("padding", f"pad={list(amounts)}: it crops, XNNPACK's convolutions only pad") if crops else None


def group_size(size: int) -> str | None:
    """Of weights in groups."""
    return (
        None
        if size >= GROUP_UNIT and size % GROUP_UNIT == 0
        else f"XNNPACK takes groups of a multiple of {GROUP_UNIT}, got {size}"
    )


# --- weights as a graph stores them: of their dequantize --------------------------------------------------------------


def shifted_weight(weight: Node) -> str | None:
    """Zero points of 0."""
    if weight.target is Q.dequantize_per_tensor.default:
        return "the weight has a zero point other than 0" if bind(weight)["zero_point"] != 0 else None
    zero_points = constant(bind(weight)["zero_points"])
    if zero_points is None or not bool(zero_points.any()):
        return None
    return "a channel of the weight has a zero point other than 0, which XNNPACK ignores"


def scales_not_float32(weight: Node) -> str | None:
    """Scales in float32; those of groups it stores in bfloat16."""
    scale, grouped = constant(weight.args[1]), weight.target is Q.dequantize_per_channel_group.default
    if scale is None or scale.dtype == torch.float32 or (grouped and scale.dtype == torch.bfloat16):
        return None
    return f"the scale of the weight is {scale.dtype}"


def not_int8(weight: Node) -> str | None:
    """Stored as torch.int8."""
    dtype = bind(weight)["dtype"]
    return None if dtype == torch.int8 else f"the weight is quantized to {dtype}"


def axis_of_channels(product: Node) -> int | None:
    """Along which axis scales of channels lie; None where a product takes one scale in all."""
    if ops.op_name(product) in ("mm", "matmul"):
        return None
    return 1 if ops.op_name(product) == "addmm" or ops.is_conv_transpose(product) else 0


def unfit_groups(weight: Node) -> str | None:
    """Groups of 4 bits, in multiples of 32; what is one group to a row is no group."""
    bound = bind(weight)
    size, bounds = bound["group_size"], (bound["quant_min"], bound["quant_max"])
    if size >= weight.meta["val"].shape[-1]:
        return None
    if bounds != GROUP_RANGE:
        return f"groups of weights have the range {bounds[0]}..{bounds[1]}"
    return group_size(size)


# --- other arithmetic -------------------------------------------------------------------------------------------------


def scaled_operand(case: Case) -> str | None:
    """alpha is 1."""
    alpha = case.argument("alpha")
    return because("factor", f"alpha={alpha}; the integer kernel takes alpha=1") if alpha not in (None, 1) else None


def scalar_operand(case: Case) -> str | None:
    """No single number that is computed while the program runs."""
    for name in ("self", "other"):
        operand = case.argument(name)
        if isinstance(operand, Node) and case.shape(name) == [] and not case.is_constant(operand):
            why = f"{operand} is a single number computed at run time; 8 bits would take its digits for all values"
            return because("computed_operand", why)
    return None


def alone(case: Case) -> str | None:
    """Two tensors or more."""
    one = len(case.argument("tensors") or ()) == 1
    return because("single", "XNNPACK concatenates two tensors or more") if one else None


def not_spatial_mean(case: Case) -> str | None:
    """Over height and width of a 4-d tensor, with keepdim=True."""
    x, dims, dtype = case.shape("self"), case.argument("dim"), case.argument("dtype")
    if dtype is not None:
        return because("conversion", f"dtype={dtype}, which XNNPACK's mean does not convert to; leave it out")
    spatial = x is not None and len(x) == 4 and sorted(dim % 4 for dim in dims or ()) == [2, 3]
    if spatial and case.argument("keepdim"):
        return None
    why = "XNNPACK averages in integers over dimensions 2 and 3 of a 4-d tensor with keepdim=True only"
    return because("average", why)


def not_to_one(case: Case) -> str | None:
    """To 1 x 1, of a batch."""
    x, size = case.shape("self"), list(case.argument("output_size"))
    one = size in ([1], [1, 1]) and x is not None and len(x) == 4
    why = f"output size {size}; XNNPACK pools in integers to 1 x 1 of a batch only"
    return None if one else because("average", why)


def unusual_pool(case: Case) -> str | None:
    """With strides up to the kernel's size; ceil_mode with fixed shapes only."""
    x, kernel = case.shape("self"), _pair(case.argument("kernel_size"))
    stride = _pair(case.argument("stride") or kernel)
    if any(step > size for step, size in zip(stride, kernel, strict=True)):
        why = f"stride {stride} is larger than the kernel {kernel}; XNNPACK's max pooling cannot skip"
        return because("stride", why)
    return ops.dynamic_ceiling(x or (), case.argument("ceil_mode"))


# --- moves ------------------------------------------------------------------------------------------------------------


def dynamic_slice(case: Case) -> str | None:
    """Of fixed shapes."""
    x = case.shape("self")
    fixed = x is not None and all(isinstance(size, int) for size in x)
    return None if fixed else because("dynamic_shape", "XNNPACK slices static shapes only")


def unknown_sizes(case: Case) -> str | None:
    """With one dynamic size: lowering writes it as a view."""
    dynamic = [size for size in case.shape("self") or () if not isinstance(size, int)]
    why = f"{len(dynamic)} sizes are dynamic; XNNPACK reshapes with one"
    return because("dynamic_shape", why) if len(dynamic) > 1 else None


def _pair(value: Any) -> tuple[int, int]:
    items = value if isinstance(value, (list, tuple)) else (value,)
    return items[0], items[-1]


# --- kernels ----------------------------------------------------------------------------------------------------------

_WEIGHTS = (half_in_float, dynamic_per_tensor, grouped_weights, computed_parameters)

CONVOLUTION = Kernel(
    "convolution", (*ops.CONV1D, *ops.CONV2D), (*_WEIGHTS, unbatched, dynamic_convolution), fuses=ops.RELUS
)
TRANSPOSED = Kernel(
    "transposed convolution", (*ops.CONV_TRANSPOSE1D, *ops.CONV_TRANSPOSE2D),
    (*_WEIGHTS, unbatched, dynamic_convolution, grouped_transpose), fuses=ops.RELUS,
)  # fmt: skip
LINEAR = Kernel("linear", ops.LINEAR, _WEIGHTS, fuses=ops.RELUS)
MATRIX = Kernel("product with a constant matrix", ops.MM, (*_WEIGHTS, unbatched), ops.RELUS)
PADDING = Kernel("zeros padded before a convolution", ops.PAD, (not_zero_padding,))
ADD = Kernel("add", ops.ADD, (not_static, scaled_operand, scalar_operand), fuses=ops.RELU)
SUB = Kernel("sub", ops.SUB, (not_static, scaled_operand, scalar_operand))
MUL = Kernel("mul", ops.MUL, (not_static, scalar_operand))
CAT = Kernel("cat", ops.CAT, (not_static, alone), moves=True)
MEAN = Kernel("mean", (aten.mean.dim,), (not_static, not_spatial_mean))
AVERAGE = Kernel("adaptive_avg_pool2d", (aten.adaptive_avg_pool2d.default,), (not_static, not_to_one))
MAX_POOL = Kernel("max_pool2d", (aten.max_pool2d.default,), (unusual_pool,), moves=True)
CLAMP = Kernel("clamp", (*ops.RELUS, *ops.CLAMP))
RESHAPE = Kernel("reshape", (*ops.RESHAPE, *ops.PERMUTE), moves=True)
SLICE = Kernel("slice", ops.SLICE, (dynamic_slice,), moves=True)
SQUEEZE = Kernel("squeeze", ops.SQUEEZE, (unknown_sizes,), moves=True)

PRODUCTS = (CONVOLUTION, TRANSPOSED, LINEAR, MATRIX)
KERNELS = (*PRODUCTS, PADDING, ADD, SUB, MUL, CAT, MEAN, AVERAGE, MAX_POOL, CLAMP, RESHAPE, SLICE, SQUEEZE)

_KERNEL_OF = {op: kernel for kernel in reversed(KERNELS) for op in kernel.ops}


def kernel_of(node: Node) -> Kernel | None:
    """The kernel that an operator may run in."""
    if node.target in ops.CONVOLUTION:
        return TRANSPOSED if ops.is_conv_transpose(node) else CONVOLUTION
    return _KERNEL_OF.get(node.target)


CHANNELS_LAST = frozenset((
    *CONVOLUTION.ops, *TRANSPOSED.ops, *ops.CONVOLUTION, *ops.BATCH_NORM, *MAX_POOL.ops, *MEAN.ops, *AVERAGE.ops,
    aten.avg_pool2d.default, aten.max.dim, aten.prelu.default, aten.upsample_bilinear2d.vec,
))  # fmt: skip
"""Whose results XNNPACK keeps channels last, until an operator needs another order."""

POINTWISE = (
    aten.abs.default, aten.ceil.default, aten.cos.default, aten.exp.default, aten.floor.default,
    aten.gelu.default, aten.hardswish.default, aten.leaky_relu.default, aten.log.default, aten.maximum.default,
    aten.minimum.default, aten.neg.default, aten.rsqrt.default, aten.sigmoid.default, aten.sin.default,
    aten.sqrt.default, aten.square.default, aten.tanh.default,
)  # fmt: skip
FLOAT = (
    *POINTWISE, aten.avg_pool2d.default, aten.baddbmm.default, aten.batch_norm.default, aten.bmm.default,
    aten.channel_shuffle.default, aten.constant_pad_nd.default, aten.div.Tensor, aten.elu.default, aten.expand.default,
    aten.glu.default, aten.layer_norm.default, aten.pad.default, aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default, aten.prelu.default, aten.rms_norm.default, aten.rsub.Scalar, aten.silu.default,
    aten.softmax.int, aten.stack.default, aten.upsample_bilinear2d.vec,
)  # fmt: skip
OUTSIDE = (
    aten.amax.default, aten.cumsum.default, aten.embedding.default, aten.erf.default, aten.flip.default,
    aten.group_norm.default, aten.index.Tensor, aten.instance_norm.default, aten.log_softmax.int,
    aten.masked_fill.Scalar, aten.max_pool1d.default, aten.mean.default, aten.reciprocal.default,
    aten.repeat.default, aten.round.default, aten.sum.dim_IntList, aten.tile.default, aten.upsample_nearest2d.vec,
)  # fmt: skip

NO_3D = "ExecuTorch has no kernel for 3-D convolution, neither in XNNPACK nor portable"

REASONS = MappingProxyType(
    dict.fromkeys(FLOAT, "XNNPACK runs it in float, inside the delegate")
    | dict.fromkeys(OUTSIDE, "XNNPACK has no kernel for it, so it stays a portable float kernel")
    | dict.fromkeys((*ops.CONV3D, *ops.CONV_TRANSPOSE3D), NO_3D)
    | dict.fromkeys(
        map(ops.functional, ops.MM), "both factors are computed at run time, and XNNPACK multiplies those in float only"
    )
)
"""Why other operators stay in floating point."""
