"""Builds the package. Which sources are compiled, and how, stands in fusedloss/_build.py, which the JIT reads as well.

Only a command that compiles needs torch: metadata and source distributions are made without it. With FUSEDLOSS_JIT=1,
and where torch is missing, as where pip builds in isolation, nothing is compiled; the wheel, which is the same for
every torch and Python, compiles at its first use.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SETUPTOOLS = 77  # reads the licence as pyproject.toml gives it, and makes wheels by itself


def load_build():
    spec = importlib.util.spec_from_file_location("fusedloss_build", ROOT / "fusedloss" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there for the module they are in
    spec.loader.exec_module(module)
    return module


class BuildPackage(build_py):
    """Takes csrc/ along, for the JIT of an installed package. A checkout has it beside the package."""

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


class BuildExtension(build_ext):
    """Makes the plan when the build starts, and then hands over to torch's command of the same name."""

    def run(self):
        build = load_build()
        try:
            build.check_path_of_sources(ROOT)
            plan = build.make_plan(ROOT / "csrc")
        except build.BuildError as error:
            raise SystemExit(f"fusedloss: {error}") from None
        print(f"fusedloss: building {plan.summary()}", file=sys.stderr, flush=True)
        with plan.environment() as torch_build:
            kind = torch_build.CUDAExtension if plan.toolkit else torch_build.CppExtension
            vars(self.extensions[0]).update(
                vars(
                    kind(
                        name=self.extensions[0].name,
                        sources=[os.path.relpath(path, ROOT) for path in plan.sources],
                        include_dirs=[str(plan.csrc)],
                        depends=[os.path.relpath(path, ROOT) for path in build.header_files(plan.csrc)],
                        extra_compile_args={"cxx": plan.cxx_flags, "nvcc": plan.nvcc_flags},
                        extra_link_args=plan.link_flags,
                    )
                )
            )
            command = torch_build.BuildExtension(self.distribution)
            vars(command).update(vars(self), force=True)
            command.run()
        library = Path(self.get_ext_fullpath(self.extensions[0].name))
        plan.write_info(library)


if int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    raise SystemExit(
        f"fusedloss: setuptools {setuptools.__version__} is too old, {SETUPTOOLS} or newer is needed: "
        "pip install --upgrade setuptools"
    )
# Whoever asks for a compiled part in so many words gets it, or an error.
insists = "build_ext" in sys.argv or os.environ.get("FUSEDLOSS_CUDA") == "1"
jit_only = os.environ.get("FUSEDLOSS_JIT") == "1"
without_torch = not jit_only and not insists and importlib.util.find_spec("torch") is None
setuptools.setup(
    ext_modules=[] if jit_only or without_torch else [setuptools.Extension("fusedloss._C", sources=[])],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildExtension},
)
