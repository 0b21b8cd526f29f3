"""Public names and signatures are those of public_api.txt.

If you meant to change them, renew the file: `python tests/test_api.py`.
"""

import inspect
from pathlib import Path

import pranam_optax

STORED = Path(__file__).with_name("public_api.txt")
MODULES = (
    pranam_optax,
    pranam_optax.fitting,
    pranam_optax.problems,
    pranam_optax.original,
)


def signature(function):
    """Names, kinds and defaults of the parameters.

    Without annotations, whose text differs between versions of Python and JAX.
    """
    parameters = []
    empty = inspect.Parameter.empty
    full = inspect.signature(function)
    for parameter in full.parameters.values():
        if callable(parameter.default) and parameter.default is not empty:
            name = getattr(parameter.default, "__name__", "...")
            parameter = parameter.replace(default=_Named(name))
        parameters.append(parameter.replace(annotation=empty))
    return str(full.replace(parameters=parameters, return_annotation=empty))


class _Named:
    """Shown as a name: functions would show their address."""

    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return self.name


def members(cls):
    """Public methods, properties and fields of a class of ours."""
    for name in sorted(dir(cls)):
        owner = next((c for c in cls.__mro__ if name in vars(c)), cls)
        if name.startswith("_") or not owner.__module__.startswith("pranam_optax"):
            continue
        member = inspect.getattr_static(cls, name)
        if isinstance(member, (staticmethod, classmethod)):
            yield f"{name}{signature(member.__func__)}"
        elif inspect.isfunction(member):
            yield f"{name}{signature(member)}"
        else:
            yield name


def is_public(module, name):
    """In a file, what it defines; in a package, what it exports."""
    if name.startswith("_") or inspect.ismodule(getattr(module, name)):
        return False
    if module.__file__.endswith("__init__.py"):
        return True
    return getattr(getattr(module, name), "__module__", None) == module.__name__


def public_api():
    lines = []
    for module in MODULES:
        for name in sorted(vars(module)):
            if not is_public(module, name):
                continue
            value, full_name = getattr(module, name), f"{module.__name__}.{name}"
            if inspect.isclass(value):
                lines.append(f"{full_name}{signature(value)}")
                lines += [f"{full_name}.{member}" for member in members(value)]
            elif inspect.isfunction(value):
                lines.append(f"{full_name}{signature(value)}")
            else:
                lines.append(full_name)
    return lines


def test_public_names_and_signatures_are_those_stored():
    stored, actual = STORED.read_text().splitlines(), public_api()
    gone = [line for line in stored if line not in actual]
    new = [line for line in actual if line not in stored]
    assert stored == actual, (
        "The public interface has changed. If that is meant, say so in CHANGELOG.md "
        "and renew tests/public_api.txt with `python tests/test_api.py`.\n"
        + "\n".join([*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)])
    )


if __name__ == "__main__":
    STORED.write_text("\n".join(public_api()) + "\n")
    print(f"wrote {STORED}")
