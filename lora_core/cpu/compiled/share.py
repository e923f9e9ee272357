"""A loop whose ranges threads take one after another, without the interpreter.

A thread that Python code runs on waits for the interpreter's lock, and where another holds it, until the system has
woken it again: beside a matrix product, on two cores of an Intel Xeon, a function that does nothing took 75 us on two
threads, and a loop that runs here 2. So OpenMP is handed compiled code, which takes ranges until there are none.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# what a loop allocates is all that can fail, unless Numba is told to look for other failures (NUMBA_BOUNDSCHECK)
FAILED = "a thread found no memory for its scratch"
BYTES, NUMBER, FLAG = ir.IntType(8).as_pointer(), ir.IntType(32), ir.IntType(1)
REGION = ir.FunctionType(ir.VoidType(), [BYTES])
# void GOMP_parallel(void (*region)(void *), void *data, unsigned threads, unsigned flags). Source: GCC's libgomp
OPENMP = ir.FunctionType(ir.VoidType(), [REGION.as_pointer(), BYTES, NUMBER, NUMBER])


def _share(
    typing: Any, loop: Any, openmp: Any, threads: Any, counter: Any, step: Any, count: Any, arguments: Any
) -> Any:
    """Call loop(*arguments, first, last) on ranges that cover range(count); raise MemoryError where a call failed.

    loop is a compiled function without a result, openmp the address of GOMP_parallel, which is not called for one
    thread, counter an array whose one int64 is where the next range begins: all who share it share the ranges. Each is
    step long, the last one shorter. A thread whose call failed takes no more of them.
    """
    called = loop.get_call_type(typing, (*arguments, types.intp, types.intp), {})

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        _, parallel, several, numbers, length, end, values = given
        made = loop.dispatcher.overloads[called.args]
        context.add_linking_libs([made.library])
        begins = context.make_array(signature.args[3])(context, builder, numbers).data
        parts = cgutils.unpack_tuple(builder, _uncounted(context, builder, arguments, values))
        # what a thread gets is one pointer: to whether a call has failed, and to all that the calls need
        packed = cgutils.pack_struct(builder, [ir.Constant(FLAG, 0), begins, length, end, *parts])
        data = cgutils.alloca_once_value(builder, packed)
        region = ir.Function(builder.module, REGION, builder.module.get_unique_name("region"))
        region.linkage = "internal"
        _take_ranges(context, region, data.type, called, context.declare_function(builder.module, made.fndesc))

        pointer = builder.bitcast(data, BYTES)
        with builder.if_else(builder.icmp_signed(">", several, several.type(1))) as (many, one):
            with many:
                run = builder.inttoptr(parallel, OPENMP.as_pointer())
                builder.call(run, [region, pointer, builder.trunc(several, NUMBER), NUMBER(0)])
            with one:
                builder.call(region, [pointer])
        with builder.if_then(builder.load(cgutils.gep_inbounds(builder, data, 0, 0))):
            context.call_conv.return_user_exc(builder, MemoryError, (FAILED,))
        return context.get_dummy_value()

    number = types.intp
    return types.void(loop, number, number, counter, number, number, arguments), generate


# (loop, openmp, threads, counter, step, count, arguments) in compiled code
share: Any = intrinsic(_share)


def _uncounted(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Return a value whose arrays no one counts references to: their caller holds them.

    Counts are kept beside the array, and threads that raise and lower one for each row of a weight wait for each other:
    on two threads nine rows times [704, 256] took 184 us, twice as long as on one, and without counts 54.
    """
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        return array._getvalue()
    parts: Any = kind if isinstance(kind, types.BaseTuple) else ()
    for at, part in enumerate(parts):
        inner = _uncounted(context, builder, part, builder.extract_value(value, at))
        value = builder.insert_value(value, inner, at)
    return value


def _take_ranges(context: Any, region: Any, kind: Any, called: Any, function: Any) -> None:
    """Write the body of a region: what a thread does with the data of this kind."""
    builder = ir.IRBuilder(region.append_basic_block())
    data = builder.bitcast(region.args[0], kind)
    _, begins, step, count, *arguments = cgutils.unpack_tuple(builder, builder.load(data))
    take, work, fail, leave = (region.append_basic_block(name) for name in ("take", "work", "fail", "leave"))
    builder.branch(take)

    builder.position_at_end(take)
    first = builder.atomic_rmw("add", begins, step, "monotonic")
    builder.cbranch(builder.icmp_signed("<", first, count), work, leave)

    builder.position_at_end(work)
    after = builder.add(first, step)
    last = builder.select(builder.icmp_signed("<", after, count), after, count)
    values = [*arguments, first, last]
    status, _ = context.call_conv.call_function(builder, function, called.return_type, called.args, values)
    builder.cbranch(status.is_error, fail, take)

    builder.position_at_end(fail)
    builder.store(FLAG(1), cgutils.gep_inbounds(builder, data, 0, 0))
    builder.branch(leave)

    builder.position_at_end(leave)
    builder.ret_void()
