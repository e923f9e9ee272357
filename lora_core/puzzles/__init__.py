"""Exercises that check themselves: stubs in docs/puzzles, and here what says whether, and why not, they are solved."""
