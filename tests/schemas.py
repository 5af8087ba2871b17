"""Compares an op's schema with the C++ function that implements it: the stable ABI would read an int as a double without a word."""

import re

import torch

SCHEMA_TO_CPP = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "std::optional<Tensor>",
    "Optional[List[Tensor]]": "std::optional<std::vector<Tensor>>",
    "List[Tensor]": "std::vector<Tensor>",
    "List[Optional[Tensor]]": "std::vector<std::optional<Tensor>>",
    "int": "int64_t",
    "List[int]": "std::vector<int64_t>",
    "float": "double",
    "bool": "bool",
    "str": "std::string",
}


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", source, flags=re.DOTALL)


def registrations(source: str) -> list[tuple[str, str]]:
    """(op, function) for every ``m.impl("op", TORCH_BOX(&function))``."""
    found = re.findall(r'\bm\.impl\(\s*"(\w+)"\s*,\s*TORCH_BOX\(\s*&?\s*([\w:]+)\s*\)\s*\)', without_comments(source))
    assert len(found) == len(re.findall(r"\bm\.impl\(", without_comments(source))), "a registration in a form that is not read"
    return [(op, function.split("::")[-1]) for op, function in found]


def signature(source: str, function: str) -> tuple[str, list[tuple[str, str]]]:
    """Return type and (type, name) of every parameter of a function's definition; aliases of the file resolved, const and & dropped."""
    source = without_comments(source)
    aliases = dict(re.findall(r"\busing\s+(\w+)\s*=\s*([^;]+);", source))
    # A definition: a line's start, specifiers and return type, the name, parameters without braces or semicolons, and a brace.
    found = re.findall(rf"^((?:[\w:<>,&*]|[ \t])+?)[\s&*]\b{function}\s*\(([^{{}};]*?)\)\s*\{{", source, flags=re.MULTILINE)
    assert len(found) == 1, f"{function}: {len(found)} definitions found, expected 1"
    returns, parameters = found[0]
    split, depth = [""], 0
    for character in parameters:
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            split.append("")
        else:
            split[-1] += character
    pairs = []
    for parameter in (p.strip() for p in split):
        if parameter:
            match = re.fullmatch(r"(.*[\s&>])(\w+)", parameter, flags=re.DOTALL)
            kind, name = match.groups() if match else (parameter, "")
            pairs.append((_plain(kind, aliases), name))
    return _plain(re.sub(r"\b(static|inline)\b", " ", returns), aliases), pairs


def _plain(kind: str, aliases: dict[str, str]) -> str:
    kind = re.sub(r"\bconst\b|&", " ", kind)
    for _ in range(4):  # aliases of aliases
        kind = re.sub(r"(?<!:)\b\w+\b", lambda m: aliases.get(m.group(), m.group()), kind)
    kind = re.sub(r"\btorch::stable::Tensor\b", "Tensor", kind)
    kind = re.sub(r"(?<!:)\b(vector|optional|string|tuple)\b", r"std::\1", kind)
    return re.sub(r"(?<!std::)\bint64_t\b|std::int64_t", "int64_t", re.sub(r"\s+", "", kind))


def disagreements(schema: torch.FunctionSchema, source: str, function: str) -> list[str]:
    """What is wrong with a C++ function as the kernel of a schema, a sentence each; empty if nothing is."""
    returns, parameters = signature(source, function)
    wrong = []
    outputs = [SCHEMA_TO_CPP[str(r.type)] for r in schema.returns]
    expected = "void" if not outputs else outputs[0] if len(outputs) == 1 else f"std::tuple<{','.join(outputs)}>"
    if returns != expected:
        wrong.append(f"{function} returns {returns}, its schema {expected}")
    arguments = [(SCHEMA_TO_CPP[str(a.type)], a.name) for a in schema.arguments]
    if len(parameters) != len(arguments):
        return [*wrong, f"{function} takes {len(parameters)} arguments, its schema {len(arguments)}"]
    places = {name: i for i, (_, name) in enumerate(arguments)}
    for i, ((kind, name), (expected, argument)) in enumerate(zip(parameters, arguments)):
        if kind != expected:
            wrong.append(f"argument {i} of {function}, {argument}, is {kind}, in its schema {expected}")
        if (
            places.get(name.rstrip("_"), i) != i
        ):  # of arguments of one type, a name in another's place tells that they are swapped
            wrong.append(f"argument {i} of {function} is called {name}, in its schema {argument}")
    return wrong
