"""Ops that run compressed layers. One file per op: its plain-torch reference is the op, the CPU path and the oracle."""
