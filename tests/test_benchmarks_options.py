"""Options that several commands of the benchmarks take: what is wrong with one is said."""

import argparse

import pytest

from benchmarks import options, shapes, tune


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (options.count, "0", "'0'; want a whole number of at least 1"),
        (options.count, "1.5", "'1.5'; want a whole number of at least 1"),
        # a digit to Python, of another script
        (options.count, "\u0663", "want a whole number of at least 1"),
        (options.seed, "-1", "'-1'; want a whole number of at least 0"),
        (options.shape, "foo", "shape 'foo' is not understood; write M=1024"),
        (options.shape, "M=1,N=2,M=3", "shape 'M=1,N=2,M=3' gives M twice"),
        (options.shape, "M=0", "want positive numbers under M"),
    ],
)
def test_an_option_is_refused_with_what_was_given_and_wanted(kind, text, said):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert said in str(error.value)


def test_options_are_read_as_what_they_say():
    assert options.count("7") == 7 and options.seed("0") == 0
    assert options.shape("M=1, N=2") == {"M": 1, "N": 2} and options.shape("4x8") == {"N": 4, "K": 8}
    assert shapes.written({"N": 4, "K": 8}, ",") == "N=4,K=8"
    assert options.lacking({"N": 4, "K": 8}, "MNKR") == "M, R" and not options.lacking({"N": 4, "K": 8}, "NK")


def test_a_folder_is_one_that_can_be_written_or_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert options.folder(str(tmp_path / "new" / "deep")) == tmp_path / "new" / "deep"
    assert not (tmp_path / "new").exists()
    for taken in ("file", "file/below"):
        with pytest.raises(argparse.ArgumentTypeError, match="file is a file; want a folder"):
            options.folder(str(tmp_path / taken))
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written in; want a folder of yours"):
        options.folder(str(tmp_path / "new"))


@pytest.mark.parametrize("arguments", [("--samples", "0"), ("--weight", "64", "-1")])
def test_tune_refuses_numbers_that_mean_nothing(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(list(arguments))
    assert stop.value.code == 2 and "want a whole number of at least 1" in capsys.readouterr().err
