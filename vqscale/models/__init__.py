"""The networks: tokenizer, prior, and how codes are searched and drawn. Everything here is plain torch."""
