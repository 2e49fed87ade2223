"""Builds the package. fusedloss/_build.py decides which sources are compiled and how; the JIT uses it as well.

Only a command that compiles needs torch: metadata and source distributions are made without it. Nothing is compiled
with FUSEDLOSS_JIT=1, or where torch is missing, as it is in pip's isolated build. The wheel is then the same for every
torch and Python, and the extension is compiled at its first use.
"""

import contextlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The first version that reads the licence as pyproject.toml gives it and makes wheels without the package `wheel`.
SETUPTOOLS = 77
COMPILING_COMMANDS = {"build", "build_ext", "develop", "editable_wheel", "install", "install_lib"}  # and bdist_*


def load_build():
    spec = importlib.util.spec_from_file_location("fusedloss_build", ROOT / "fusedloss" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


class BuildPackage(build_py):
    """Copies csrc/ into the package, for the JIT of an installed package. A checkout has it beside the package."""

    def run(self):
        if without_torch:
            print(
                "fusedloss: there is no torch here to compile against, so the first loss will compile; with torch "
                "installed, pip's option --no-build-isolation compiles now",
                file=sys.stderr,
                flush=True,
            )
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "fusedloss" / "csrc"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc", target, ignore=shutil.ignore_patterns(".*"))


def plan_extensions(build):
    """The plan, or an exit with one sentence if something that the build needs is missing."""
    try:
        build.check_path_of_sources(ROOT)
        plan = build.make_plan(ROOT / "csrc")
    except build.BuildError as error:
        raise SystemExit(f"fusedloss: {error}") from None
    print(f"fusedloss: building {plan.summary()}", file=sys.stderr, flush=True)
    return plan


def extensions(build, plan, cpp_extension):
    kind = cpp_extension.CUDAExtension if plan.toolkit else cpp_extension.CppExtension
    return [
        kind(
            name="fusedloss._C",
            sources=[os.path.relpath(path, ROOT) for path in plan.sources],
            include_dirs=[str(plan.csrc)],
            depends=[os.path.relpath(path, ROOT) for path in build.header_files(plan.csrc)],
            extra_compile_args={"cxx": plan.cxx_flags, "nvcc": plan.nvcc_flags},
            extra_link_args=plan.link_flags,
        )
    ]


def build_command(plan, cpp_extension):
    class BuildExtension(cpp_extension.BuildExtension):
        """torch's command, which also writes what the extension was built for beside it."""

        def finalize_options(self):
            super().finalize_options()
            self.force = True  # setuptools compares times only, and would not notice another compiler or other flags

        def run(self):
            super().run()
            for extension in self.extensions:
                plan.write_info(Path(self.get_ext_fullpath(extension.name)))

    return BuildExtension


if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    raise SystemExit(
        f"fusedloss: setuptools {setuptools.__version__} is too old, {SETUPTOOLS} or newer is needed: "
        "pip install --upgrade setuptools"
    )
compiles = any(argument in COMPILING_COMMANDS or argument.startswith("bdist") for argument in sys.argv[1:])
jit_only = os.environ.get("FUSEDLOSS_JIT") == "1"
# build_ext and FUSEDLOSS_CUDA=1 ask for a compiled part explicitly: they give one, or an error.
is_explicit = "build_ext" in sys.argv or os.environ.get("FUSEDLOSS_CUDA") == "1"
without_torch = not jit_only and not is_explicit and importlib.util.find_spec("torch") is None

with contextlib.ExitStack() as stack:
    ext_modules, cmdclass = [], {"build_py": BuildPackage}
    if compiles and not jit_only and not without_torch:
        build = load_build()
        plan = plan_extensions(build)
        cpp_extension = stack.enter_context(plan.environment())
        ext_modules = extensions(build, plan, cpp_extension)
        cmdclass["build_ext"] = build_command(plan, cpp_extension)
    setuptools.setup(ext_modules=ext_modules, cmdclass=cmdclass)
