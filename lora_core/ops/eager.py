"""Calls an operation's implementation directly, past PyTorch's dispatcher, where only autograd has to know of the call.

An operation written in Python costs some 100 microseconds a call in the dispatcher, more than a small layer's products.
Tracing, faking, transforming and counting need it; in plain eager code autograd alone has to know, and
torch.autograd.Function tells it for a tenth of that. What runs is the same either way:

    wrapper, as lora_linear
      intercepted (compiling, a mode, functorch, __torch_dispatch__)? operation -> dispatcher -> implementation
      gradients?                                                      autograd.Function       -> implementation
      neither                                                                                    implementation
"""

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_core.errors import ConfigError
from lora_core.ops.checks import inside_functorch, outside_autocast
from lora_core.quant import operations

# types of arguments, other than lists, that do not handle operations themselves
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, torch.Size, torch.dtype, tuple, float, int, bool, types.NoneType})
# asked at every call: found once
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_tracing_state = torch._C._get_tracing_state
# what runs an operation on a type of device
_implementations: dict[tuple[Any, str], Callable[..., Any]] = {}
# of what torch.ops.lora_core has, the definitions of operations with an implementation
_definitions: dict[Any, Any] = {}


def register(operation: Any, device_type: str, implementation: Callable[..., Any]) -> None:
    """Let this function run the operation on this type of device, called by the dispatcher or past it.

    In place of a result that nobody wants it returns None; the dispatcher, which takes none, gets an empty tensor.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        made = implementation(*args, **kwargs)
        return without_view(made) if isinstance(made, Tensor) else none_to_empty(_first(args), made)

    operation.register_kernel(device_type)(kernel)
    _implementations[operation, device_type] = implementation
    _definitions[operation._opoverload._overloadpacket] = operation


def unregister(operation: Any, device_type: str) -> None:
    """Let the operation's own body, the reference, run it on this type of device again."""
    operation.register_kernel(device_type)(operation._init_fn)
    # another thread may have been here
    _implementations.pop((operation, device_type), None)


def registered(name: str, device_type: str) -> Callable[..., Any] | None:
    """Return what was registered to run the operation of this name, "lora_core::lora_linear", or None."""
    found = ((operation._qualname, device, run) for (operation, device), run in _implementations.items())
    return next((run for own, device, run in found if (own, device) == (name, device_type)), None)


def none_to_empty(like: Tensor, made: Any) -> Any:
    """Return the results of an operation with an empty tensor, of the device and dtype of `like`, in place of None."""
    # a tensor each: an operation may not return one twice
    return type(made)(like.new_empty(0) if t is None else t for t in made)


def call(operation: Any, *args: Any) -> Any:
    """Return operation(*args), directly where nothing intercepts it and no gradient is asked for.

    Outside autocast: a backward computes in the dtypes of its forward.
    """
    run = None if _asks_for_gradients(args) else _direct_implementation(operation, args)
    return _outside_autocast(operation if run is None else run, args)


def gradients(operation: Any, *args: Any) -> Any:
    """Return call(operation, *args) of an operation that is a derivative, or what its body, the reference, makes of it.

    Made of PyTorch's operations, that takes a batch of gradients (is_grads_batched), which has no memory of its own,
    and can be differentiated.
    """
    if not torch._C._functorch.is_legacy_batchedtensor(_first(args)) and not _asks_for_gradients(args):
        return call(operation, *args)
    return _outside_autocast(operation._init_fn, args)


def _outside_autocast(run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with outside_autocast(_first(args)):
        return run(*args)


def hidden_of(hidden: Tensor, x: Tensor | None, takes_x: bool, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return S for a backward: as the forward left it or, where gradients are to be differentiated, made anew of x.

    Raises:
        ConfigError: if that takes x, as the gradients of both x and B do, and x was not kept.
    """
    if not torch.is_grad_enabled():
        return hidden
    if x is not None:
        return make(x)
    if takes_x:
        raise ConfigError(
            "a second derivative (create_graph=True) in x and B takes x, which is not kept where A is frozen: let A "
            "require a gradient, or use torch.func"
        )
    return hidden


def _asks_for_gradients(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for a in args for t in _tensors_of(a))


def _run(packet: Any, *args: Any) -> Any:
    """Return packet(*args), one of torch.ops.lora_core, likewise."""
    operation = None if torch.compiler.is_compiling() else _definitions.get(packet)
    return packet(*args) if operation is None else call(operation, *args)


operations.run = _run


def differentiable(operation: Any, save: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operation's derivative, and return what calls it, past the dispatcher where nothing intercepts it.

    Args:
        operation: a torch.library.CustomOpDef whose first argument is a tensor; it returns tensors, in a list where it
            takes lists of tensors.
        save, backward: as register_autograd takes them. `backward` makes its products by `gradients`, of S that
            hidden_of gives it, so that it may be differentiated, which takes grad mode.
    """
    operation.register_autograd(backward, setup_context=save)

    def forward(ctx: Any, *args: Any) -> Any:
        # what another thread has taken back since is the dispatcher's to run
        made = _implementations.get((operation, _first(args).device.type), operation)(*args)
        output = without_view(made) if isinstance(made, Tensor) else type(made)(map(without_view, made))
        save(ctx, args, output)
        return output

    def forward_of_lists(ctx: Any, *given: Any) -> Any:
        *flat, ctx.layout = given
        return tuple(forward(ctx, *_nested(flat, ctx.layout)))

    def backward_of_lists(ctx: Any, *grads: Any) -> Any:
        return *_flat(backward(ctx, grads), ctx.layout), None

    of_lists = any(str(argument.type) == "List[Tensor]" for argument in operation._opoverload._schema.arguments)
    methods = (forward_of_lists, backward_of_lists) if of_lists else (forward, backward)
    apply = _function(operation, *methods)

    def run(*args: Any) -> Any:
        alone = _direct_implementation(operation, args)
        if alone is None:
            return operation(*args)
        if not torch.is_grad_enabled():
            return alone(*args)
        if not of_lists:
            return apply(*args)
        layout = [len(a) if _is_list(a) else -1 for a in args]
        return apply(*_flat(args, layout), layout)

    return run


def _function(operation: Any, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return what applies an autograd.Function, which goes by the operation's name: y.grad_fn shows it."""
    name = "".join(part.capitalize() for part in operation._opoverload._opname.split("_"))
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = types.new_class(name, (torch.autograd.Function,), exec_body=lambda space: space.update(methods))
    # past what Function.apply does for functorch, which is not at work here
    return super(torch.autograd.Function, function).apply


def without_view(result: Tensor) -> Tensor:
    """Return a result that autograd does not take for a view: one of several may not be changed in place."""
    return torch.ops.aten._unsafe_view.default(result, result.shape) if result._is_view() else result


def _first(args: Sequence[Any]) -> Tensor:
    """Return the first tensor, which every operation takes first, perhaps in a list."""
    tensor: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    return tensor


def _is_list(value: Any) -> bool:
    """Say whether this is a list of tensors; an empty list is a constant."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)


def _flat(values: Sequence[Any], layout: Sequence[int]) -> Iterator[Any]:
    """Yield values, those of lists one after another: layout has the length of each list, -1 for what is none."""
    for value, length in zip(values, layout, strict=True):
        if length < 0:
            yield value
        else:
            yield from [None] * length if value is None else value


def _nested(flat: Sequence[Any], layout: Sequence[int]) -> Iterator[Any]:
    """Yield what _flat was given."""
    first = 0
    for length in layout:
        yield flat[first] if length < 0 else list(flat[first : first + length])
        first += abs(length)


def _direct_implementation(operation: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Return what runs the operation on these arguments, or None where the dispatcher has to be asked."""
    if dispatch_is_intercepted():
        return None
    if not _PLAIN_TYPES.issuperset(map(type, args)) and not all(map(_is_plain, args)):
        return None
    return _implementations.get((operation, _first(args).device.type))


def _is_plain(value: Any) -> bool:
    """Say whether a value is, or holds, no tensor of a class that handles operations itself."""
    if type(value) is list and _PLAIN_TYPES.issuperset(map(type, value)):
        return True
    return all(type(t).__torch_dispatch__ is Tensor.__torch_dispatch__ for t in _tensors_of(value))


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors that an argument is, or is a list of."""
    return (t for t in (value if type(value) is list else (value,)) if isinstance(t, Tensor))


def dispatch_is_intercepted() -> bool:
    """Say whether a compiler, a tracer, a transform or a mode has to see operations go through the dispatcher."""
    return bool(
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or inside_functorch()
        or _tracing_state() is not None
    )
