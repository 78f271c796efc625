"""Pickles that hold data only, read without Python's unpickler.

A pickle is the program of a stack machine. Python's own imports and calls what the program names, and reserves memory
for what it merely announces. This one has the instructions that dicts of tensors need, and the names that it is given.

Source: cpython `Lib/pickletools.py`, `Lib/pickle.py`.
"""

import pickletools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """What a pickle has asked for by name."""

    name: str
    value: Any


def run_pickle(program, known, load):
    """The object that a pickle describes: of dicts with unique strings as keys, tuples, strings, integers, booleans.

    Args:
        program: the pickle, bytes.
        known: `{"module name": value}`: what it may ask for and, if it is a function, call. A function gets `Global`s
            for names, and has to check the types of its arguments.
        load: a function from a persistent id to the object it stands for.

    Raises:
        ValueError or another exception: the pickle is damaged, or asks for more.

    Example:

        assert run_pickle(b"\\x80\\2}X\\1\\0\\0\\0aK\\7s.", {}, None) == {"a": 7}
    """
    stack: list = []
    marks: list = []
    memo: dict = {}

    def pop(n):
        if not 0 <= n <= len(stack):
            raise ValueError("a pickle that takes more from the stack than there is")
        at = len(stack) - n
        items = stack[at:]
        del stack[at:]
        return items

    def pop_to_mark():
        return pop(len(stack) - marks.pop())

    def find(name):
        if name not in known:
            raise ValueError(f"a pickle that asks for {name!r}")
        return Global(name, known[name])

    def call(function, arguments):
        if not (isinstance(function, Global) and callable(function.value) and isinstance(arguments, tuple)):
            raise ValueError("a pickle that calls what is no function")
        return function.value(*arguments)

    def set_items(items):
        for name, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(stack[-1], dict) or not isinstance(name, str) or name in stack[-1]:
                raise ValueError("a pickle with anything but dicts whose keys are unique strings")
            stack[-1][name] = value

    for opcode, argument, position in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                set_items(pop(2))
            case "SETITEMS":
                set_items(pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(find(argument))
            case "STACK_GLOBAL":
                match pop(2):
                    case [str(module), str(name)]:
                        stack.append(find(f"{module} {name}"))
                    case _:
                        raise ValueError("a pickle that asks for something without a name")
            case "BINPERSID":
                stack.append(load(*pop(1)))
            case "REDUCE":
                stack.append(call(*pop(2)))
            case "BUILD":
                # A module's state dict has the attribute `_metadata`, the versions of its parts: passed over.
                if not all(isinstance(item, dict) for item in [*pop(1), stack[-1]]):
                    raise ValueError("a pickle that sets the attributes of an object")
            case "STOP":
                if len(stack) != 1 or position != len(program) - 1:
                    raise ValueError("a pickle that is not over at its end")
                return stack[0]
            case name:
                raise ValueError(f"a pickle with the instruction {name}")
