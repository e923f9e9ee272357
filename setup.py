"""Install map: the folders kernels/ and quant/ are installed inside lora_core.

A top-level import called "kernels" would shadow the PyPI package of that name, which transformers imports.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
MOVED = {f"lora_core.{folder}": folder for folder in ("kernels", "quant") if (HERE / folder).is_dir()}
# files to copy and edit, not modules to import
if (HERE / "docs" / "puzzles").is_dir():
    MOVED["lora_core.puzzles.stubs"] = "docs/puzzles"

setup(
    packages=[*find_packages(include=["lora_core", "lora_core.*"]), *MOVED],
    package_dir=MOVED,
    # a source distribution has more: MANIFEST.in
    include_package_data=False,
    package_data={
        "lora_core": ["py.typed"],
        "lora_core.plan": ["*.json"],
        "lora_core.kernels": ["*.json"],
        "lora_core.demo": ["*.json", "*.safetensors", "*.html"],
    },
)
