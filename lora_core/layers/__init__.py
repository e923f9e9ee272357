"""Adapter layers and quantised layers: short nn.Modules, one kind a file."""
