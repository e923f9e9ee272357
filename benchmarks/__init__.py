"""Benchmarks: providers of one operation side by side in one process, recorded as append-only JSON lines."""
