"""Checks and timings of the providers on the device at hand.

doctor.py        what runs where, and a short self-test
conformance.py   every provider against the reference
timing.py        times of every provider beside a baseline
deep.py          both, for `wush-compile doctor --deep`
"""
