"""Operators of libraries that AOTInductor cannot call, called from a package all the same.

AOTInductor calls operators that return new tensors, and only tensors. Others it refuses ("Can't
generate FallbackKernel"), such as one that may be handed the tensor to write into::

    fa3_fwd::fwd(Tensor q, ..., Tensor(out!)? out=None, ...) -> (Tensor(out!), Tensor, ...)

A kernel then calls an operator of its own, in a form that AOTInductor knows, and names the
library's with an :class:`Adapter`. The generated code holds a C function for it, of the kind that
Inductor calls a C shim (``aot_inductor.custom_ops_to_c_shims``), which calls the library's operator
through the dispatcher with PyTorch's stable C interface. Nothing is linked and no Python is asked;
the library must be loaded before the first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: C++ types of a shim's arguments by schema type: required, optional.
_TYPES = {
    "Tensor": ("AtenTensorHandle", "AtenTensorHandle*"),
    "int": ("int64_t", "int64_t*"),
    "float": ("double", "double*"),
    "bool": ("int32_t", "int32_t*"),
}
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Adapter:
    """How a package calls an operator that AOTInductor itself does not.

    Attributes:
        operator: ``"namespace::name"``, what the kernel calls. It is defined in the compiling
            process, with a fake kernel, changes nothing, and returns one tensor.
        target: ``"namespace::name"``, the library's operator. Arguments of the same name are
            handed on, all others keep their defaults; its first result is the one returned.
    """

    operator: str
    target: str

    def shims(self) -> list[str]:
        """The C functions in source, one for each kind of device.

        Raises:
            ValueError: if the target is not loaded, or cannot be called so.
        """
        own, target = _schema(self.operator), _schema(self.target)
        names = {argument.name for argument in target.arguments}
        strange = [argument.name for argument in own.arguments if argument.name not in names]
        if strange:
            raise ValueError(f"{self.target} does not take {', '.join(strange)}")
        return [_shim(own, target, device) for device in _DEVICES]


def _schema(name: str) -> Any:
    schemas = [s for s in torch._C._jit_get_schemas_for_operator(name) if not s.overload_name]
    if not schemas:
        raise ValueError(f"there is no operator {name}: load its library first")
    return schemas[0]


def _shim(own: Any, target: Any, device: str) -> str:
    """The C function that Inductor calls for ``own`` on one kind of device."""
    given = {argument.name: argument for argument in own.arguments}
    parameters = [f"{_parameter_type(a)} {a.name}" for a in own.arguments]
    body = []
    for place, argument in enumerate(target.arguments):
        source = given.get(argument.name)
        body += _default(place, argument) if source is None else _handed_on(place, argument, source)
    slots = max(len(target.arguments), len(target.returns))
    others = [
        f"aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(stack[{place}]));"
        for place in range(1, len(target.returns))
    ]
    lines = [
        f"StableIValue stack[{slots}] = {{}};",
        "AtenTensorHandle handle = nullptr;",
        "AOTITorchError error = AOTI_TORCH_SUCCESS;",
        *body,
        f'error = aoti_torch_call_dispatcher("{target.name}", "", stack);',
        "if (error != AOTI_TORCH_SUCCESS) return error;",
        *others,
        "*result = reinterpret_cast<AtenTensorHandle>(stack[0]);",
        "return AOTI_TORCH_SUCCESS;",
    ]
    name = f"aoti_torch_{device}_{own.name.partition('::')[2]}"
    signature = ", ".join([*parameters, "AtenTensorHandle* result"])
    # Hidden: several models with such a function may be loaded into one process.
    head = f'__attribute__((visibility("hidden"))) AOTITorchError {name}({signature}) {{'
    return "\n".join([head, *(f"  {line}" for line in lines), "}"])


def _kind(argument: Any) -> tuple[str, bool]:
    """The type of an argument without ``?``, and whether it is optional."""
    kind, optional = argument.type, False
    if isinstance(kind, torch.OptionalType):
        kind, optional = kind.getElementType(), True
    if str(kind) not in _TYPES:
        raise ValueError(f"{argument.name}: an adapter hands on no {kind}")
    return str(kind), optional


def _parameter_type(argument: Any) -> str:
    kind, optional = _kind(argument)
    return _TYPES[kind][optional]


def _handed_on(place: int, target: Any, source: Any) -> list[str]:
    """Statements that put an argument of the shim into its place on the stack."""
    kind, may_be_none = _kind(source)
    wanted, optional = _kind(target)
    if kind != wanted or (may_be_none and not optional):
        raise ValueError(f"{target.name}: {source.type} does not become {target.type}")
    value = f"(*{source.name})" if may_be_none else source.name
    lines = _stored(place, kind, value, optional)
    return [f"if ({source.name} != nullptr) {{", *lines, "}"] if may_be_none else lines


def _stored(place: int, kind: str, value: str, optional: bool) -> list[str]:
    """Statements that store a value as PyTorch's ``StableIValue``.

    A tensor is handed over with a reference of its own. An optional value is a pointer to one on
    the heap, which the callee deletes, and zero stands for None.
    """
    slot = f"stack[{place}]"
    lines = []
    if optional:
        lines.append(f"{slot} = reinterpret_cast<StableIValue>(new StableIValue(0));")
        slot = f"*reinterpret_cast<StableIValue*>({slot})"
    if kind == "Tensor":
        return [
            f"error = aoti_torch_new_tensor_handle({value}, &handle);",
            "if (error != AOTI_TORCH_SUCCESS) return error;",
            *lines,
            f"{slot} = reinterpret_cast<StableIValue>(handle);",
        ]
    if kind == "float":
        return [
            *lines,
            f"{{ double number = {value}; __builtin_memcpy(&({slot}), &number, sizeof(number)); }}",
        ]
    if kind == "bool":
        value = f"({value} != 0)"
    return [*lines, f"{slot} = static_cast<StableIValue>({value});"]


def _default(place: int, argument: Any) -> list[str]:
    """Statements for an argument that is not handed on; none for None, which zero stands for."""
    if not argument.has_default_value():
        raise ValueError(f"{argument.name} has no default, and nothing is given for it")
    value = argument.default_value
    if value is None:
        return []
    kind, optional = _kind(argument)
    literal = repr(float(value)) if kind == "float" else str(int(value))
    return _stored(place, kind, literal, optional)
