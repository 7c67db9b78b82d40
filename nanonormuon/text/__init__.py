"""From text to token shards: formats, tokenizers, preparation."""
