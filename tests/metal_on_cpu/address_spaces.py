"""Metal's address spaces, which the emulation erases, checked by Clang: README.md says what is seen and what is not."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

from mlxeff import kernels

from .host import MetalError
from .translate import ATTRIBUTE, COMMENT, threadgroup_variables

SHIM = Path(__file__).resolve().with_name("address_spaces.h")
# No code is generated: any target does that has two types of 16 bits for `half` and `bfloat`.
CLANG = ["clang", "-x", "c++", "-std=c++17", "-target", "aarch64", "-ffreestanding", "-fsyntax-only", "-w"]
FLAGS = ["-ferror-limit=0", "-fno-color-diagnostics", "-include", str(SHIM)]
DUMP = ["-Xclang", "-ast-dump", "-Xclang", "-ast-dump-filter=metal_source"]  # of the types, declarations and casts

VECTOR = re.compile(r"\b((?:u?char|u?short|u?int|u?long|half|bfloat|float)[234])\s*\(")

# Lines of the dump.
FUNCTION = re.compile(
    r"-(?:Function|CXXMethod|CXXConstructor)Decl 0x\w+ [^']*?(\bused )?(?:constexpr )?(\w+) '([^']+)'"
)
TYPED = re.compile(
    r"-(?:(?:Var|Field|Function|CXXMethod|CXXConstructor|Typedef|TypeAlias)Decl"
    r"|(?:CStyle|CXXFunctional|CXXStatic|CXXReinterpret)CastExpr) 0x\w+ [^']*?(\w*) '([^']+)'"
)
DEDUCED = re.compile(r"-TemplateArgument type '([^']+)'")
CAST = re.compile(r"CastExpr .*<AddressSpaceConversion>")

# Types.
ARGUMENTS = re.compile(r"<([^<>]*)>")
POINTER = re.compile(r"([^,*&]*)[*&](?! )")  # what precedes each * and & (in a product, a space follows)
SPACE = re.compile(r"__(?:private|global|local|constant)\b|\bDeduced\b")


@functools.cache
def missing():
    """Why address spaces are not checked on this machine, or ""."""
    if kernels.has_metal():
        return "Metal's own compiler checks the address spaces here"
    if shutil.which("clang") is None:
        return "there is no clang to check address spaces with"
    done = _clang("")
    return f"this clang cannot check address spaces: {done.stderr[:200]}" if done.returncode else ""


def check(launches):
    """Raise MetalError unless the sources of all `launches` keep to Metal's rules of address spaces.

    Returns the names of the functions in their headers that no launch calls: of templates, little is checked then.
    """
    if missing():
        raise MetalError(missing())
    headers = {}
    for launch in {launch.source: launch for launch in launches}.values():
        header, kernel = split(launch)
        headers.setdefault(header, []).append((launch.name, kernel))
    return set().union(*(_check(header, kernels) for header, kernels in headers.items()))


def split(launch):
    """A launch's source in two: the header, which kernels of one file share, and the function that MLX generates."""
    generated = re.compile(r"(?:template <[^\n]*>\s*)?\[\[kernel\]\] void " + re.escape(launch.name) + r"\(")
    start = generated.search(launch.source).start()
    return launch.source[:start], launch.source[start:]


def _check(header, functions):
    if "threadgroup_variable<" in _translate(header):
        raise MetalError("address spaces: a threadgroup variable outside of a kernel's body")
    text = f'#line 1 "header"\n{_translate(header)}\n'
    for number, (name, function) in enumerate(functions):
        first = header.count("\n") + 1
        text += f'namespace kernel_{number} {{\n#line {first} "{name}"\n{_translate(function)}\n}}\n'
    text = f"namespace metal_source {{\n{text}}}\n"
    done, spelled = _clang(text, *DUMP), _clang(text, *DUMP, "-DSPELLED")
    if "metal_source" not in done.stdout or "metal_source" not in spelled.stdout:
        raise MetalError(f"address spaces: clang printed no types\n{done.stderr[:3000]}{spelled.stderr[:3000]}")
    found = [done.stderr] if done.returncode else [*_changes(done.stdout), *_without_space(spelled.stdout)]
    if found:
        raise MetalError("\n".join(["address spaces:", *dict.fromkeys(found)])[:6000])
    declared = [match.groups() for match in FUNCTION.finditer(done.stdout)]
    called = {name for used, name, _ in declared if used}
    return {name for _, name, _ in declared} - called - {name for name, _ in functions}


def _changes(dump):
    """What Clang accepts though the address space changes: some casts, and any pointer for a template's `thread T*`."""
    function = ""
    for line in dump.splitlines():
        if match := FUNCTION.search(line):
            function = f"{match.group(2)}: {match.group(3)}"
        if CAST.search(line):
            yield f"{function} casts to another address space"
        if match := DEDUCED.search(line):
            *_, kind = _parts(match.group(1))
            if SPACE.search(re.split("[*&]", kind)[-1]):
                yield f"{function} is called with another address space"


def _without_space(dump):
    """Declarations and casts whose pointers or references lack their address space, in a dump made with SPELLED."""
    for line in _written(dump):
        match = TYPED.search(line)
        if match and " implicit " not in line and not _spelled(match.group(2)):
            yield f"{match.group(1)}: {match.group(2)} lacks an address space"


def _written(dump):
    """The lines of a dump but for those of what Clang made of templates."""
    lines, kinds, made = dump.splitlines(), {}, None
    for line, following in zip(lines, [*lines[1:], ""]):
        depth = line.find("-")
        kind = kinds[depth] = line[depth + 1 :].partition(" ")[0]
        if made is None or depth <= made:
            specialised = kind == "ClassTemplateSpecializationDecl" or "-TemplateArgument" in following
            made = depth if specialised and kinds.get(depth - 2, "").endswith("TemplateDecl") else None
            if made is None:
                yield line


def _spelled(kind):
    return all(SPACE.search(pointed) for part in _parts(kind) for pointed in POINTER.findall(part))


def _parts(kind):
    """The template arguments in a type, innermost first, and at last the type without them."""
    while match := ARGUMENTS.search(kind):
        yield match.group(1)
        kind = kind[: match.start()] + kind[match.end() :]
    yield kind


def _translate(source):
    """Metal → C++ for the shim; lines keep their numbers."""
    source = COMMENT.sub(lambda match: "\n" * match.group(0).count("\n"), source)
    return VECTOR.sub(r"metal::make_vector<metal::\1>(", ATTRIBUTE.sub("", threadgroup_variables(source)))


def _clang(text, *flags):
    return subprocess.run([*CLANG, *FLAGS, *flags, "-"], input=text, capture_output=True, text=True)
