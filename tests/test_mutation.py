"""The list of planted errors: it fits the sources, and covers every property of the kernels."""

import re
from collections import Counter
from pathlib import Path

from mutation import MUTATIONS, ROOT

TESTS = Path(__file__).parent


def properties() -> list[str]:
    """File and name of every property test of the kernels."""
    found = []
    for path in sorted(TESTS.glob("test_kernels_*.py")):
        names = re.findall(r"^@given\(.*?^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        found += [f"{path.name}::{name}" for name in names]
    return found


def test_every_property_of_the_kernels_has_a_planted_error():
    assert len(properties()) >= 25
    assert [p for p in properties() if not any(p.startswith(m.test) for m in MUTATIONS)] == []


def test_every_planted_error_fits_the_sources_and_names_a_test():
    for mutation in MUTATIONS:
        assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1, mutation
        file, _, name = mutation.test.partition("::")
        assert f"def {name}" in (TESTS / file).read_text(encoding="utf-8"), mutation
    assert max(Counter((m.file, m.old) for m in MUTATIONS).values()) == 1
