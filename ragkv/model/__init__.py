"""What a model is to ragkv: all that touches transformers' insides. Nothing here knows a model by name."""
