"""The avatars that the network `avatars` is trained on."""
