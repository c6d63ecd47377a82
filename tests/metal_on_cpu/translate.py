"""Metal source, as MLX generates it → C++ for `metal.h`, with the entry that calls the kernel for one thread."""

import re

ATTRIBUTE = re.compile(r"\[\[[^\[\]]*\]\]")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
SWIZZLE = re.compile(r"\.([xyzw]{2,4})\b(?!\s*\()")
THREADGROUP = re.compile(r"\bthreadgroup\s+([^;(){}=*&\[]*(?:\[[^\]]*\][^;(){}=*&\[]*)*);")
UNTRANSLATED = re.compile(r"\bthreadgroup\s+[^;{}*&]*;")  # would be a variable of one thread
DECLARATION = re.compile(r"^(.*?[\w>])\s+(\w+\s*(?:\[.*?)?(?:,.*)?)$", re.DOTALL)
INSTANTIATION = re.compile(r"\ntemplate \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*)\) .*;\n$")
PARAMETER = re.compile(r"^\s*(.*?)\s*(\w+)\s*\[\[(\w+)(?:\((\d+)\))?\]\]$", re.DOTALL)


def translate(source, name):
    """C++ source of the kernel `name`; its lines keep their numbers in `source`."""
    source = COMMENT.sub(lambda match: "\n" * match.group(0).count("\n"), source)
    found = INSTANTIATION.search(source)
    function = found.group(1) if found else name
    body = source[: found.start()] if found else source
    start = body.index(f"[[kernel]] void {name}(")
    signature = body[body.index("(", start) + 1 : body.index(") {\n", start)]
    arguments = ", ".join(argument(parameter) for parameter in signature.split(",\n"))
    text = SWIZZLE.sub(swizzle, ATTRIBUTE.sub("", threadgroup_variables(body)))
    return (
        f'#line 1 "{name}"\n{text}\n'
        "template <typename T> inline T attribute(T value) { return value; }\n"
        "inline uint3 attribute(metal_on_cpu::Triple t) { return uint3(t.x, t.y, t.z); }\n"
        f'extern "C" void metal_kernel_entry(void** buffers) {{\n  {function}({arguments});\n}}\n'
    )


def argument(parameter):
    """The C++ expression for one parameter of the signature: a buffer or an attribute of the thread."""
    kind, _, attribute, number = PARAMETER.match(parameter).groups()
    if attribute != "buffer":
        return f"attribute(metal_on_cpu::attributes().{attribute})"
    pointer = f"static_cast<{kind.rstrip('*& ')}*>(buffers[{number}])"
    return f"*{pointer}" if kind.endswith("&") else pointer


def swizzle(match):
    return f".template pick<{', '.join(str('xyzw'.index(letter)) for letter in match.group(1))}>()"


def threadgroup_variables(body):
    """`threadgroup float a[4], b;` → references to memory that the threads of a group share."""
    count = 0

    def declare(match):
        nonlocal count
        kind, declarators = DECLARATION.match(match.group(1).strip()).groups()
        text = ""
        for declarator in declarators.split(","):
            variable, bracket, sizes = declarator.strip().partition("[")
            text += f"auto& {variable.strip()} = threadgroup_variable<{kind}{bracket}{sizes}>({count}); "
            count += 1
        return text.strip() + "\n" * match.group(0).count("\n")

    body = THREADGROUP.sub(declare, body)
    if left := UNTRANSLATED.search(body):
        raise ValueError(f"metal_on_cpu: cannot translate the declaration {left.group(0)!r}")
    return body
