"""What a GPU and its PyTorch can do: whether this build runs on the card, whether torch.compile works."""
