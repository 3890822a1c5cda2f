"""What every part uses and what knows nothing of fields: checks, files, messages, tensors."""
