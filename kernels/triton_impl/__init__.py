"""The fused versions in Triton. Loaded when one is asked for; they never import the reference.

Lengths are not specialised (``do_not_specialize``): a prompt of another length never waits for the compiler.
"""
