"""Prints the documentation strings of the modules that have no Python source, as JSON: {module: text}.

It is run as a script by a bare interpreter (python -I -S), in which nothing else has been imported or changed yet: the
text depends on the Python alone.
"""

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import sys

_COMPILED = ("built-in", *importlib.machinery.EXTENSION_SUFFIXES)


def modules():
    """The compiled modules of the standard library that import here, by name."""
    for name in sorted(sys.stdlib_module_names):
        spec = None if "test" in name or name.startswith("xx") else importlib.util.find_spec(name)
        if spec and spec.origin and spec.origin.endswith(_COMPILED):
            try:
                yield name, importlib.import_module(name)
            except ImportError:  # its C library is not installed
                continue


def entries(name, thing, seen):
    """A title line and the documentation of a module, class or routine, then of all public ones inside it."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if text := inspect.getdoc(thing):
        yield f"{name}{getattr(thing, '__text_signature__', None) or ''}\n{text}\n"
    if inspect.ismodule(thing) or inspect.isclass(thing):
        for key, value in sorted(vars(thing).items()):
            public = inspect.isclass(value) or inspect.isroutine(value) or inspect.isdatadescriptor(value)
            if public and not key.startswith("_"):
                yield from entries(f"{name}.{key}", value, seen)


if __name__ == "__main__":
    # The objects stay alive as attributes of their modules, so their ids are not used again.
    seen: set[int] = set()
    print("\n" + json.dumps({name: "\n".join(entries(name, module, seen)) for name, module in modules()}))
