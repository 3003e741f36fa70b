"""Everything static stands in pyproject.toml; this adds the compiled extension."""

from setuptools import setup
from usp_build.command import BuildNative, extensions

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})
