"""Checks and timings of the providers on the device at hand.

doctor.py        who computes what here, and a short self-test
conformance.py   every provider against the reference
timing.py        times of every provider beside a baseline
deep.py          conformance and times, for `wush-compile doctor --deep`
"""
