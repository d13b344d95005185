"""The packages are the folders on disk: `flowlang`, and `grammar`, `backends`, `stdlib`, which are installed inside it."""

from setuptools import find_namespace_packages, setup

CACHES = ["__pycache__", "*.__pycache__"]


def packages() -> list[str]:
    found = find_namespace_packages(include=["flowlang", "flowlang.*"], exclude=CACHES)
    for top in ("grammar", "backends", "stdlib"):
        found.append(f"flowlang.{top}")
        found.extend(f"flowlang.{top}.{p}" for p in find_namespace_packages(top, exclude=CACHES))
    return found


setup(packages=packages())
