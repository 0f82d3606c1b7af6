"""Providers: who computes an op. One table, resolved once a process and device; the reference is always there.

A provider is registered for an op's name and a device type with a predicate that says, from capability and arguments
alone, whether it takes a call. `WUSH_PROVIDER=reference` (or another provider's name) forces one.
"""
