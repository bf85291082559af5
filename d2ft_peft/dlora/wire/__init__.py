"""What crosses between edge and cloud: messages in frames, sizes checked before anything is allocated.

docs/dlora_protocol.md is the page that this folder implements.
"""
