"""Lossy codecs for gradients and updates, for slow networks.

*Codec*: turns a tensor into a payload of bytes and back. *Residual*: what a payload did not carry; it is added to the
next step's gradient, so that nothing is lost, only delayed. `choose` turns a spec into codecs.
Imports `ps.parameters` and `ps.memory`.
"""
