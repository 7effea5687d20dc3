"""Products of quantized arrays whose blocks are taken apart where they are multiplied."""
