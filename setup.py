"""Build: `olmfast` from olmfast/, and `olmfast.kernels` from the top-level folder kernels/.

The kernels stand at the top level because other merge tools import them alone; they are installed inside
the package because a top-level package called `kernels` would hide Hugging Face's own package of that name.
"""

from setuptools import find_packages, setup

kernel_packages = ["olmfast.kernels", *(f"olmfast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["olmfast", "olmfast.*"]), *kernel_packages],
    package_dir={"olmfast": "olmfast", "olmfast.kernels": "kernels"},
)
