"""``cnncomp::conv2d_vnm_int8``, ``linear_vnm_int8`` and ``conv2d_vnm_f16``: V:2:M weights with V = 64, packed by
:func:`cnncomp.sparsity.pack_vnm`. On a GPU the input is copied into units of images, channel by channel, first, if it does not
lie in them."""

from __future__ import annotations

from cnncomp.ops.packed import Format, define_conv, define_linear_int8
from cnncomp.sparsity import vnm
from cnncomp.sparsity.vnm import check_packed, unpack_vnm

VNM = Format("vnm", check_packed, unpack_vnm, vnm)

define_conv(VNM, "int8")
define_conv(VNM, "f16")
define_linear_int8(VNM)
