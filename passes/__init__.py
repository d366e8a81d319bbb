"""The rewrites: readers that recognise linear layers, refiners that take in what surrounds them, and the lowering."""

from __future__ import annotations

from .fold_bias import FoldBias
from .read_attention_op import ReadAttentionOp
from .read_decomposed_attention import ReadDecomposedAttention
from .read_dequantized_product import ReadDequantizedGemm, ReadDequantizedMatMul
from .read_group_query_attention import ReadGroupQueryAttention
from .read_matmul_nbits import ReadMatMulNBits
from .read_vendor_attention import ReadMultiHeadAttention, ReportOtherAttention
from .report_embedding import ReportEmbedding
from .report_quantized_activation import ReportFusedOp, ReportQuantizedActivation
from .report_unquantized import ReportDequantizedWeight, ReportFloatWeight, ReportRuntimeWeight
from .report_vendor_op import ReportVendorOp

READERS = (
    ReadMatMulNBits(),
    ReadDequantizedMatMul(),
    ReadDequantizedGemm(),
    ReportQuantizedActivation(),
    ReportFusedOp(),
    ReportVendorOp(),
    ReportEmbedding(),
    ReportFloatWeight(),
    ReportDequantizedWeight(),
    ReportRuntimeWeight(),  # last: it takes what no other reader knew
)
"""Asked in this order; the first that recognises a node speaks for it."""

ATTENTION_READERS = (
    ReadGroupQueryAttention(),
    ReadAttentionOp(),
    ReadMultiHeadAttention(),
    ReportOtherAttention(),
    ReadDecomposedAttention(),
)
"""Those that recognise attention."""

REFINERS = (FoldBias(),)
