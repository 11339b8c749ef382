"""Triton's interpreter at a pace at which a whole suite runs through it.

Most of its time goes where nothing of a kernel is computed: with each call of a kernel's helper it replaces the functions of
`triton.language` again; it works out whether sums and products of integers overflow, which it only reports when debugging; it
describes the type of each intermediate result from scratch. Here functions are replaced once, overflow is left out and types are
remembered. What a kernel computes stays the interpreter's.
"""

from collections.abc import Callable
from functools import cache

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """For the rest of the process, in which kernels can no longer be compiled."""
    interpreter._patch_lang = replaced_once(interpreter._patch_lang)
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._get_np_dtype = remembered_by_name(interpreter._get_np_dtype)
    tl.block_type.__init__ = remembered_blocks(tl.block_type.__init__)
    tl.tensor.__init__ = remembered_shapes(tl.tensor.__init__)


def replaced_once(replace: Callable) -> Callable:
    """Of a function's modules: those of `triton.language` that it sees. What it returns would undo the replacement."""
    done = set()

    @cache
    def replace_for(function: Callable) -> None:
        seen = {module.__name__ for module in function.__globals__.values() if module is tl or module is tl.core}
        if not seen <= done:
            replace(function)
            done.update(seen)

    def replace_if_new(function: Callable) -> interpreter._LangPatchScope:
        replace_for(function)
        return interpreter._LangPatchScope()

    return replace_if_new


def remembered_by_name(find: Callable) -> Callable:
    """Types are not hashable, but their names say all about them."""
    found = {}

    def find_by_name(kind: tl.dtype):
        if kind.name not in found:
            found[kind.name] = find(kind)
        return found[kind.name]

    return find_by_name


def remembered_blocks(describe: Callable) -> Callable:
    """Of `block_type`, whose fields nobody changes."""
    fields = {}

    def describe_once(block: tl.block_type, element: tl.dtype, shape) -> None:
        key = element.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if key not in fields:
            describe(block, element, shape)
            fields[key] = dict(vars(block))
        vars(block).update(fields[key])

    return describe_once


def remembered_shapes(describe: Callable) -> Callable:
    """Of `tensor`, which takes all but its data from its type."""
    fields = {}

    def describe_once(tensor: tl.tensor, handle, kind: tl.dtype) -> None:
        if kind.name not in fields:
            describe(tensor, handle, kind)
            fields[kind.name] = {name: field for name, field in vars(tensor).items() if name not in ("handle", "type")}
        vars(tensor).update(fields[kind.name], handle=handle, type=kind)

    return describe_once
