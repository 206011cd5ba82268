"""The copy engine's addition: a box of shared memory is added to one of a tensor in memory (cp.reduce.async.bulk.tensor, PTX ISA).

Gluon has an operation for it that it does not export.
"""

from triton._C.libtriton import ir
from triton.experimental.gluon.language._core import builtin


@builtin
def async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """Starts the addition; ``tma.store_wait`` returns once ``src`` has been read. In what order boxes are added, nobody knows."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)
