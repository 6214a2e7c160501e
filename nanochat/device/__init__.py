"""What a device and its PyTorch can do: dtypes, whether this build runs on the card, whether torch.compile works."""
