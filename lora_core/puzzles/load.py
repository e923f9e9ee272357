"""Loading a learner's file, and saying in a line what is wrong with it."""

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from lora_core.puzzles.compare import WrongAnswer


def load(path: str | Path) -> ModuleType:
    """Return the file as a module.

    Raises:
        WrongAnswer: if it cannot be read or run, with the line.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location("exercise", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise WrongAnswer(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Triton looks the source of a kernel's module up
    sys.modules["exercise"] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise WrongAnswer(f"{path.name}, line {error.lineno}: {error.msg}") from None
    except ModuleNotFoundError as error:
        install = "pip install triton (Linux)" if error.name == "triton" else f"pip install {error.name}"
        raise WrongAnswer(f"this exercise needs {error.name}, which is not installed: {install}") from None
    except Exception as error:
        raise WrongAnswer(describe(error, path)) from None
    return module


def describe_loaded(error: BaseException) -> str:
    """Return an exception in a line, with the line that it came from in the file loaded last."""
    return describe(error, Path(str(sys.modules["exercise"].__file__)))


def describe(error: BaseException, path: Path) -> str:
    """Return an exception in a line, with the learner's line that it came from."""
    if isinstance(error, NotImplementedError):
        return f"{path} is not written yet: replace the line that raises NotImplementedError"
    inner = error
    # Triton's interpreter raises its own error from the kernel's
    while inner.__cause__ is not None:
        inner = inner.__cause__
    frames = [frame for e in (error, inner) for frame in traceback.extract_tb(e.__traceback__)]
    own = [frame for frame in frames if Path(frame.filename).name == path.name]
    place = f"{path.name}, line {own[-1].lineno}: {own[-1].line}\n  " if own else f"{path.name}: "
    first = (str(inner).strip().splitlines() or [""])[0]
    return f"{place}{type(inner).__name__}: {first}"
