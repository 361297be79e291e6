"""Settings that pyproject.toml cannot hold: the platform of the wheel."""

import platform

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    """A wheel that PyPI accepts: on Linux it names the oldest glibc that it runs with.

    The extension needs only memcpy (glibc 2.14). `make dist` checks the tag with auditwheel.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of interpreter, ABI and platform."""
        interpreter, abi, system = super().get_tag()
        if platform.libc_ver()[0] == "glibc":
            system = system.replace("linux_", "manylinux_2_17_", 1)
        return interpreter, abi, system


setup(cmdclass={"bdist_wheel": Wheel})
