"""Shared set-up of the test suite: interpreter mode, NaN-poisoned memory, tests left out without what they need."""

import errno
import importlib.util
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# without a GPU the kernels run in Triton's interpreter; it must be chosen before triton is imported
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# what makes cuBLAS deterministic, which deterministic mode warns of; it must be set before CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# the bounds are those of float32: cuBLAS adds the parts of a split sum in half precision unless told not to, and
# multiplies float32 in TF32 where the environment says so
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
# and oneDNN takes subnormals for zero where a CPU multiplies bfloat16 itself (VDPBF16PS, TDPBF16PS); it looks this up
# with its first product
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")

# the models are tiny and the tests run in two processes: more threads would only wait for one another
torch.set_num_threads(1)

# transformers and PEFT must not look for a model hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_empty = np.empty

settings.register_profile("default", deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
settings.register_profile("thorough", deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
# where a failure is expected, a smaller example of it is of no use
UNSHRUNK = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]
# and it may take the examples of a few runs of the suite to meet a rare one
settings.register_profile(
    "planted", settings.get_profile("default"), phases=UNSHRUNK, report_multiple_bugs=False, max_examples=100
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def absent(library: str) -> bool:
    """Say whether a library cannot be imported."""
    try:
        return importlib.util.find_spec(library) is None
    except ValueError:
        return True


# other libraries that the files of tests import as they are read
PEERS = ("accelerate", "bitsandbytes", "peft", "transformers", "numba", "playwright")
IMPORTED = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)


def needed(path: Path) -> set[str]:
    """Return the other libraries without which a file cannot be read, or one of the tests that it imports from."""
    imported = {*IMPORTED.findall(path.read_text(encoding="utf-8"))}
    beside = (path.with_name(f"{name}.py") for name in imported)
    return (imported & {*PEERS}).union(*(needed(helper) for helper in beside if helper.exists()))


FILES = sorted(Path(__file__).parent.glob("test_*.py"))
collect_ignore = [path.name for path in FILES if any(map(absent, needed(path)))]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the files that are left out, as nothing of them is counted."""
    if collect_ignore:
        terminalreporter.write_line(f"{len(collect_ignore)} files left out for want of what they import:")
        for name in collect_ignore:
            lacking = ", ".join(sorted(filter(absent, needed(Path(__file__).with_name(name)))))
            terminalreporter.write_line(f"  {name} (without {lacking})")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests without the GPU or library they need, and what only its own `-m` asks for: counted, not passed."""
    unwanted = {"interpreted"} if torch.cuda.is_available() else {"gpu"}
    unwanted |= {name for name in ("codegen", "browser") if name not in config.getoption("-m")}

    def lacks(item: pytest.Item) -> bool:
        libraries = [name for marker in item.iter_markers("peer") for name in marker.args]
        return any(item.get_closest_marker(name) for name in unwanted) or any(map(absent, libraries))

    left_out = [item for item in items if lacks(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _poisoned_empty(shape, dtype=np.float64, *args, **kwargs):
    memory = _empty(shape, dtype, *args, **kwargs)
    worst = {"f": np.nan, "c": np.nan, "i": -1, "u": 255, "b": True}
    if memory.dtype.kind in worst:
        memory[...] = worst[memory.dtype.kind]
    return memory


try:
    from numba.core.dispatcher import Dispatcher
except (ImportError, ValueError):
    Dispatcher = None
_compile = getattr(Dispatcher, "compile", None)


def _compile_with_numpys_own(*args, **kwargs):
    """Compile as ever: Numba knows functions by what they are when it first compiles, in a test or outside of any."""
    found, np.empty = np.empty, _empty
    try:
        return _compile(*args, **kwargs)
    finally:
        np.empty = found


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> object:
    """Fill what torch.empty and numpy.empty return with NaN: a result that reads memory nobody wrote cannot pass."""
    if Dispatcher is not None:
        monkeypatch.setattr(Dispatcher, "compile", _compile_with_numpys_own)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr("numpy.empty", _poisoned_empty)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a path, and all below it, answer as one without permission does: to root nothing is forbidden."""

    def forbid(place: Path) -> None:
        def guarded(call: Callable[..., object]) -> Callable[..., object]:
            def guard(path: object = ".", *arguments: object, **keywords: object) -> object:
                inside = isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(place)
                # that the place itself is there anybody may know who may read its folder
                if inside and not (call is stat and Path(str(path)) == place):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
                return call(path, *arguments, **keywords)

            return guard

        stat = os.stat
        for module, name in ((os, "stat"), (os, "scandir"), (os, "listdir"), (os, "mkdir"), (os, "open"), (io, "open")):
            monkeypatch.setattr(module, name, guarded(getattr(module, name)))

    return forbid


@pytest.fixture
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let operations between layers run on small models, whose few elements and short heads are left to PyTorch's."""
    monkeypatch.setattr("lora_core.layers.blocks.FEW", 0)

    def is_better(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> bool:
        return q.device.type == "cpu" and q.dtype == torch.float32 and scale > 0

    # what the loops take is asked of them, and tested there
    monkeypatch.setattr("lora_core.layers.block_attention.is_better", is_better)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _launches_are_listed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have tests of the kernels fail that launch what their files do not list, as it is compiled by no test."""
    if torch.cuda.is_available() or not request.path.name.startswith("test_kernels_"):
        yield
        return
    from launches import listed, recorded

    with recorded() as found:
        yield
    unlisted = found - listed()
    assert not unlisted, f"launched and not among the variants: {sorted(map(str, unlisted))}"
