"""Everything static stands in pyproject.toml; this adds the compiled extension."""

from setuptools import setup
from usp_build.command import BuildNative, TagForEveryPython, extensions

COMMANDS = {"build_ext": BuildNative, "bdist_wheel": TagForEveryPython}
setup(ext_modules=extensions(), cmdclass=COMMANDS)
