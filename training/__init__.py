"""How the bundled model was made: data, tokenizer, training, export, evaluation. Not installed with ragkv."""
