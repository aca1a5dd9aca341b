"""Stand-ins for Huawei's CANN libraries that do nothing, so that the real torch_npu imports where there is no NPU.

``python tests/ascend/stub_cann.py SITE_PACKAGES FOLDER`` writes them; they are found by ``LD_LIBRARY_PATH=FOLDER``, and
``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` keeps torch from loading torch_npu by itself.  Nothing computes.  What is real above them are the
schemas of torch_npu's ops, their meta kernels, and torchair's conversion of a graph up to the start of its engine.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

LIBRARIES = (
    "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel", "ascend_protobuf", "fmk_parser", "nnopbase", "opapi", "runtime",
)  # fmt: skip
SPEAKING = {  # what is asked for an answer; all else says 0, which is success
    "aclGetRecentErrMsg": 'const char *NAME(void) { return "no device, CANN is a stub"; }',
    "aclrtGetSocName": 'const char *NAME(void) { return "Ascend910B1"; }',
    "aclrtGetDeviceCount": "int NAME(uint32_t *count) { *count = 1; return 0; }",
    "aclrtGetDevice": "int NAME(int32_t *device) { *device = 0; return 0; }",
    "aclrtGetMemInfo": "int NAME(int kind, size_t *left, size_t *all) { *left = *all = (size_t)8 << 30; return 0; }",
    "aclrtMalloc": "int NAME(void **at, size_t size) { *at = aligned_alloc(512, (size + 1023) / 512 * 512); return 0; }",
    "aclrtMallocAlign32": "int NAME(void **at, size_t size) { *at = aligned_alloc(512, (size + 1023) / 512 * 512); return 0; }",
    "aclrtMallocHost": "int NAME(void **at, size_t size) { *at = malloc(size + 64); return 0; }",
    "aclrtFree": "int NAME(void *at) { free(at); return 0; }",
    "aclrtFreeHost": "int NAME(void *at) { free(at); return 0; }",
    "aclrtMemcpy": "int NAME(void *to, size_t room, const void *from, size_t size) { memcpy(to, from, size); return 0; }",
    "aclrtMemcpyAsync": "int NAME(void *to, size_t room, const void *from, size_t size) { memcpy(to, from, size); return 0; }",
    "aclrtMemset": "int NAME(void *at, size_t room, int value, size_t size) { memset(at, value, size); return 0; }",
    **dict.fromkeys(
        tuple(f"aclrt{name}" for name in ("CreateStream", "CreateStreamWithConfig", "CreateEventExWithFlag", "CreateEventWithFlag",
              "GetCurrentContext")),
        "int NAME(void **handle) { *handle = malloc(64); return 0; }",
    ),
    "aclGetCompileoptSize": "size_t NAME(int option) { return 16; }",
    "aclGetCompileopt": 'int NAME(int option, char *value, size_t room) { strncpy(value, "disable", room); return 0; }',
    "strcpy_s": "int NAME(char *to, size_t room, const char *from) { strncpy(to, from, room); return 0; }",
    "vsnprintf_s": "int NAME(char *to, size_t room, size_t most, const char *as, va_list list) { return vsnprintf(to, room, as, list); }",
    "snprintf_s": "int NAME(char *to, size_t room, size_t most, const char *as, ...)"
    " { va_list list; va_start(list, as); int n = vsnprintf(to, room, as, list); va_end(list); return n; }",
}  # fmt: skip
HEAD = "".join(f"#include <{name}.h>\n" for name in ("stdarg", "stddef", "stdint", "stdio", "stdlib", "string"))


def symbols(library: Path, which: str) -> set[str]:
    """Names a library defines or leaves to others, as ``nm`` lists them; weak ones are no demand."""
    lines = subprocess.run(["nm", "--dynamic", which, str(library)], capture_output=True, text=True).stdout.splitlines()
    return {
        line.split()[-1].split("@")[0] for line in lines if line.split() and not (which.startswith("--undef") and line.split()[-2] == "w")
    }


def looked_up(library: Path) -> set[str]:
    """Names that a library only looks up while it runs, found among its texts."""
    return {name.decode() for name in re.findall(rb"(?<=\0)(?:acl(?!nn)[a-z]*[A-Z]|rt[A-Z])\w+(?=\0)", library.read_bytes())}


def definition(number: int, name: str) -> str:
    """C of a function that says what is expected of it, or nothing."""
    if name in SPEAKING:
        return SPEAKING[name].replace("NAME", name)
    if name.startswith("_Z"):
        return f'long stub_{number}(void) __asm__("{name}"); long stub_{number}(void) {{ return 0; }}'
    if re.match(r"acl(op|tdt)?Create", name):
        return f"void *{name}(void) {{ return malloc(64); }}"
    return f"int {name}(void) {{ return 0; }}"


def build(site_packages: Path, folder: Path) -> int:
    """Writes the libraries into ``folder``; returns how many functions they hold."""
    npu = site_packages / "torch_npu"
    asking = [*npu.glob("_C*.so"), *npu.glob("lib/*.so"), *npu.glob("dynamo/torchair/core/*.so")]
    system = [Path(sys.executable).resolve(), *Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib").glob("libpython3*.so*")]
    for folder_of_libraries in ("/lib", "/usr/lib", "/lib64"):
        for name in ("c", "m", "gcc_s", "stdc++", "pthread", "dl", "rt", "uuid"):
            system += Path(folder_of_libraries).glob(f"*linux-gnu*/lib{name}.so*")
        system += Path(folder_of_libraries).glob("ld-linux*.so*")
    there = {"__tls_get_addr"}.union(
        *(symbols(path, "--defined-only") for path in [*asking, *(site_packages / "torch/lib").glob("*.so*"), *system])
    )
    wanted = set().union(*(symbols(path, "--undefined-only") | looked_up(path) for path in asking)) - there
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stub.c"
    source.write_text(HEAD + "\n".join(definition(number, name) for number, name in enumerate(sorted(wanted))) + "\n")
    compiler = ["gcc", "-shared", "-fPIC", "-w", "-x", "c"]
    subprocess.run([*compiler, "-o", str(folder / "libascendcl.so"), str(source)], check=True)
    for name in LIBRARIES:  # a name that is looked up in one of them is found in the one they all need
        where = ["-o", str(folder / f"lib{name}.so"), "/dev/null", f"-L{folder}", "-Wl,--no-as-needed", "-lascendcl", "-Wl,-rpath,$ORIGIN"]
        subprocess.run([*compiler, *where], check=True)
    return len(wanted)


if __name__ == "__main__":
    print(f"{build(Path(sys.argv[1]), Path(sys.argv[2]))} functions that do nothing, in {len(LIBRARIES) + 1} libraries")
