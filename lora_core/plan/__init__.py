"""Calculators: what fine-tuning a model of a given shape trains, and what memory it takes."""
