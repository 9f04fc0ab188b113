"""Turn a name into a checked set of tensors, and a set of tensors into files again."""
