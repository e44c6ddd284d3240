"""Runs real jobs without Ray and without the service, on one host or on several made of network namespaces.

Tests and benchmarks share it; it imports the product and neither of the two.
"""
